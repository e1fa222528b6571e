"""Why an item is, or is not, in a user's list: the pipeline run once more, and its trace read.

Behind the Explain RPC. Invariant: explains the very run that it looks at (same stages, same code, nothing logged as
shown); it never guesses from outside.
"""

from dataclasses import replace

from headrace.v1.recommender_service_pb2 import ExplainResponse, RecommendResponse
from serving.query import Query
from serving.trace import Drop

_CUT = "time was short, and of the ranker only the light scorer saw it"


def explanation(query: Query, response: RecommendResponse) -> ExplainResponse:
    """What became of `query.probe_item_id` in this answer."""
    explained = ExplainResponse(stage_timings=response.stage_timings, served_tier=response.served_tier)
    for recommendation in response.items:
        if recommendation.item_id == query.probe_item_id:
            explained.in_answer = True
            explained.recommendation.CopyFrom(recommendation)
            return explained
    drop = _drop(query)
    explained.dropped_by_stage = drop.stage
    explained.dropped_reason = drop.reason
    if drop.rank is not None:
        explained.rank_at_drop = drop.rank
    if drop.score is not None:
        explained.score_at_drop = drop.score
    return explained


def _drop(query: Query) -> Drop:
    trace, catalog = query.trace, query.release.catalog
    row = catalog.row(query.probe_item_id)
    if row < 0:
        return Drop("retrieve", "the catalogue does not know this item")
    dropped = trace.drop_of(row)
    if dropped is not None:
        return replace(dropped, reason=f"{dropped.reason}; {_CUT}") if row in trace.cut else dropped
    if not catalog.servable(query.now_ms)[row]:
        return Drop("filter", "not available, not published yet or expired")
    if any(report.name == "ladder" for report in trace.stages):
        return Drop("ladder", "not among the first of the rung's list")
    return trace.probe or Drop("retrieve", "no source proposed it", None, None)
