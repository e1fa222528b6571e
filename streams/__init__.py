"""The stream worker: events to user states, item statistics, embeddings and the event log.

Invariant: what it keeps is a function of the log alone; kill it at any moment and it catches up from its markers.
"""
