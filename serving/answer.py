"""The answer as the caller gets it, put together from what the stages found out.

Made once per request, after select. Invariant: every field of an answer that is known is filled in, and an answer from
mixed versions says so.
"""

from collections.abc import Sequence

from core.codec import from_ms
from headrace.v1 import types_pb2 as types
from headrace.v1.recommender_service_pb2 import Recommendation, RecommendResponse
from headrace.v1.types_pb2 import Versions
from serving.paging import next_cursor
from serving.query import Query, Ranking, UserFeatures
from serving.release import Release
from serving.trace import Trace

_TIMEOUTS = {
    types.DEGRADED_REASON_STORE_TIMEOUT,
    types.DEGRADED_REASON_RETRIEVAL_TIMEOUT,
    types.DEGRADED_REASON_RANKER_TIMEOUT,
}


def assemble(
    query: Query, user: UserFeatures, ranking: Ranking, items: Sequence[Recommendation], answer_time_ms: int
) -> RecommendResponse:
    """The response to a request, degraded reasons completed."""
    trace, release = query.trace, query.release
    # The last page of a list ends where the list does.
    if len(items) < query.num_items and query.page.snapshot is None:
        trace.degrade(types.DEGRADED_REASON_FEW_CANDIDATES)
    asked = query.request.bundle_version
    if trace.bundle_versions - {"", release.version} or asked not in ("", release.version):
        trace.degrade(types.DEGRADED_REASON_VERSION_MISMATCH)
    if query.budget.is_short and not _TIMEOUTS.isdisjoint(trace.reasons):
        trace.degrade(types.DEGRADED_REASON_DEADLINE_SHORT)
    response = RecommendResponse(
        recommendation_id=query.recommendation_id,
        items=items,
        served_tier=ranking.tier,
        degraded_reasons=trace.reasons,
        state_revision=user.state.revision,
        embedding_revision=user.embedding_revision,
        versions=versions_of(release, trace),
        experiment_arm=query.request.experiment_arm,
        stage_timings=trace.timings(),
        next_cursor=_next_cursor(query, ranking, items),
        answer_time=from_ms(answer_time_ms),
    )
    if user.state.watermark_ms:
        response.features_as_of_time.CopyFrom(from_ms(user.state.watermark_ms))
    return response


def _next_cursor(query: Query, ranking: Ranking, items: Sequence[Recommendation]) -> str:
    request = query.request
    if not (request.with_cursor or request.cursor):
        return ""
    shown = [item.item_id for item in items]
    is_ranked = ranking.tier in (types.SERVING_TIER_RANKED, types.SERVING_TIER_RERANKED_BATCH)
    waiting = ranking.candidates.tail(len(items)) if is_ranked else None
    return next_cursor(query.page, query.user_id, query.release.catalog, shown, waiting)


def versions_of(release: Release, trace: Trace | None = None) -> Versions:
    """The release's versions, or those that the other processes reported in this request."""
    manifest = release.manifest
    return Versions(
        bundle_version=manifest.bundle_version,
        model_version=(trace and trace.model_version) or manifest.model_version,
        index_version=(trace and trace.index_version) or manifest.index_version,
        embedding_version=(trace and trace.embedding_version) or manifest.embedding_version,
    )
