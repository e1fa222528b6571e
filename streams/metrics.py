"""The metrics of the stream worker, in one place.

Set by the other modules of this folder. Invariant: every outcome of a message is counted once per time it is read, so
replays after a restart show as such and not as events.
"""

from core.telemetry import counter, gauge, histogram_ms

EVENTS = counter("streams", "events", "Messages read, by topic and outcome.", ("topic", "outcome"))
LATE = counter("streams", "late_events", "Events applied with a time before the user's watermark.")
OUTSIDE_HORIZON = counter(
    "streams", "outside_horizon", "Events before a full duplicate horizon: applied, uniqueness unknown."
)
MISSED = counter("streams", "missed", "Messages that Kafka dropped before they were read, by topic.", ("topic",))
DEAD_LETTERS = counter("streams", "dead_letters", "Messages sent to the dead letters, by topic.", ("topic",))
BACK_TO_MARKER = counter(
    "streams", "back_to_marker", "Times that rows were dropped and read again, by reason.", ("why",)
)
CONFLICTS = counter("streams", "row_conflicts", "Rows that another writer had changed, by view.", ("view",))
BATCH_EVENTS = gauge("streams", "batch_events", "Messages in the newest batch.")
WRITE_MS = histogram_ms("streams", "write_ms", "From a batch in memory to its rows in the store.")
CACHED_ROWS = gauge("streams", "cached_rows", "Rows in memory, by view.", ("view",))

LAG = gauge("streams", "lag", "Messages that are not read yet, by topic and partition.", ("topic", "partition"))
WATERMARK_AGE = gauge("streams", "watermark_age_ms", "Age of the newest event time that was applied.")
STALLED = gauge("streams", "stalled_partitions", "Partitions with lag whose position does not move.")

USERS_ENCODED = counter("streams", "users_encoded", "User vectors written.")
ENCODE_MS = histogram_ms("streams", "encode_ms", "One EncodeUsers call.")
ENCODE_FAILURES = counter("streams", "encode_failures", "Users that the candidate service refused to encode.")
DIRTY_USERS = gauge("streams", "dirty_users", "Users that wait for a vector.")
OLDEST_DIRTY = gauge("streams", "oldest_dirty_ms", "How long the longest waiting user has waited for a vector.")

ITEM_STATS_IN_DOUBT = gauge(
    "streams", "item_stats_in_doubt", "1 = a primary of the Redis Cluster has lost rows since the last rebuild."
)
BROADCASTS = counter("streams", "stats_broadcasts", "Item statistics sent to the replicas.")
LOG_ROWS = counter("streams", "event_log_rows", "Rows written to the event log, by table.", ("table",))
LOG_BUFFERED = gauge("streams", "event_log_buffered", "Rows that wait for the event log.")
ERASED_USERS = counter("streams", "erased_users", "Users removed by a tombstone.")
