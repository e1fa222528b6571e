"""The front door: what should user U see now, in time, whatever is down.

A request runs through `pipeline` (hydrate, retrieve, filter, rank, rerank, select, log); what fails on the way becomes
a lower rung of `ladder` and a reason in the answer. Invariant: imports no model, index or stream engine; the other
processes are reached over gRPC, Kafka and Redis.
"""
