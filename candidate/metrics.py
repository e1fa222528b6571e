"""Metrics of the candidate service.

Invariant: labels have few values (methods, sources, parts of the index), never ids.
"""

from core.telemetry import counter, gauge, histogram_ms

request_ms = histogram_ms("candidate", "request_ms", "Time of a call, from the handler's start.", ("method",))
refused = counter("candidate", "refused", "Calls that were refused or given up.", ("method", "reason"))
source_ms = histogram_ms("candidate", "source_ms", "Time that a source took.", ("source",))
sources_missing = counter("candidate", "sources_missing", "Times that a source was left out.", ("source", "reason"))
encoded_users = counter("candidate", "encoded_users", "Users encoded.", ("method",))
index_items = gauge("candidate", "index_items", "Vectors in the index.", ("part",))
index_recall = gauge("candidate", "index_recall", "Recall of the index, mean over searches that users made.")
index_rebuild_ms = histogram_ms("candidate", "index_rebuild_ms", "Time that a rebuild of the index took.")
shards_missing = counter("candidate", "shards_missing", "Answers without a shard of the index.", ("shard",))
items_applied = counter("candidate", "items_applied", "Items learnt from the items topic.", ("change",))
events_learnt = counter("candidate", "events_learnt", "Events and feedback read for co-visitation.")
co_visitation_pairs = gauge("candidate", "co_visitation_pairs", "Pairs of items held, counted from both.")
malformed = counter("candidate", "malformed", "Messages of the followed topics that could not be read.", ("topic",))


def count_malformed(topic: str) -> None:
    malformed.labels(topic).inc()
