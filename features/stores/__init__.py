"""Where features live: rows in the online store (Redis, in Feast's layout) and the Parquet event log."""
