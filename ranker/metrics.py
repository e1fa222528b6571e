"""Metrics of the ranker service.

Invariant: labels have few values (outcomes, reasons), never ids.
"""

from prometheus_client import Histogram

from core.telemetry import counter, gauge, histogram_ms

request_ms = histogram_ms("ranker", "request_ms", "Time of a RankCandidates call, from the handler's start.")
refused = counter("ranker", "refused", "Calls that were refused or given up.", ("reason",))
batch_users = Histogram("headrace_ranker_batch_users", "Users scored together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
queue_ms = histogram_ms("ranker", "queue_ms", "Time from arrival to the start of the batch.")
batch_ms = histogram_ms("ranker", "batch_ms", "Time of a batch: features, model, calibration.")
dropped_users = counter("ranker", "dropped_users", "Users whose call was over before their turn; never computed.")
candidates = counter("ranker", "candidates", "Candidates scored.")
unknown_candidates = counter("ranker", "unknown_candidates", "Candidates that the catalogue does not know.")
cut_candidates = counter("ranker", "cut_candidates", "Candidates that only the light scorer saw: time was short.")
not_finite = counter("ranker", "not_finite", "Inputs and scores that were not finite and were replaced.")
malformed = counter("ranker", "malformed", "Messages of the compacted topics that could not be read.", ("topic",))
features = counter("ranker", "features", "Users by what was there of them when scored.", ("feature", "status"))
stability = gauge(
    "ranker",
    "feature_stability_index",
    "Population stability index of live values against the bundle's sample: 0.1 is stable, 0.25 needs a look.",
    ("feature",),
)
stage_ms = histogram_ms("ranker", "stage_ms", "Time of a batch's parts: features, model, health.", ("stage",))
shadow_users = counter(
    "ranker", "shadow_users", "Users scored in shadow, or left out because it was behind.", ("outcome",)
)
shadow_difference = Histogram(
    "headrace_ranker_shadow_score_difference",
    "Mean absolute difference of a user's scores between the shadow and the release that serves.",
    buckets=(0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
)
shadow_overlap = Histogram(
    "headrace_ranker_shadow_top10_overlap",
    "Share of the ten best items that the shadow and the release that serves agree on.",
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
loaded_bundles = gauge("ranker", "loaded_bundles", "Bundles in memory: current, previous, experiments, shadow.")
loads = counter("ranker", "bundle_loads", "Bundles loaded or refused.", ("outcome",))
load_time = gauge("ranker", "bundle_load_time_seconds", "When the bundle that serves was loaded, since the epoch.")
