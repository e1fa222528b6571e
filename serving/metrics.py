"""Metrics of the front door.

Written by the service from each request's trace. Invariant: labels have few values (stages, tiers, reasons), never ids.
"""

from core.telemetry import counter, gauge, histogram_ms

answer_ms = histogram_ms("serving", "answer_ms", "Time of an answer, from the handler's start.", ("tier",))
stage_ms = histogram_ms("serving", "stage_ms", "Time of a stage.", ("stage",))
removed_candidates = counter("serving", "removed_candidates", "Candidates that a stage took out.", ("stage",))
answers = counter("serving", "answers", "Answers by the rung that they came from.", ("tier",))
degraded = counter("serving", "degraded", "Answers that were not what they would be on a good day.", ("reason",))
unexpected_errors = counter("serving", "unexpected_errors", "Bugs that an answer from a lower rung covered up.")
impressions_dropped = counter("serving", "impressions_dropped", "Impression lists that did not reach Kafka.")
malformed = counter("serving", "malformed", "Messages of the compacted topics that could not be read.", ("topic",))
ingested = counter("serving", "ingested", "Events taken in by IngestService.", ("result",))
breaker_open = gauge("serving", "breaker_open", "1 while a dependency is left alone.", ("dependency",))
quality = gauge("serving", "quality", "Share of the candidates that are asked for: below 1 under pressure.")
admission_limit = gauge("serving", "admission_limit", "Requests that may go through all stages at once.")
loop_lag_ms = gauge("serving", "loop_lag_ms", "How late the loop or the door is: a request waits so long.")
answers_not_kept = counter("serving", "answers_not_kept", "Answers that cannot be replayed: the log was full.")
retrievals_saved = counter("serving", "retrievals_saved", "Requests answered from candidates of a moment before.")
