"""`headrace replay`: a past answer made again by the serving process that gave it, and what differs.

A client of ReplayRecommendation. Invariant: asks one address, changes nothing.
"""

import grpc

from core.errors import NotFoundError, StageError
from core.grpc_runtime import blocking_channel
from headrace.v1.recommender_service_pb2 import ReplayRecommendationRequest, ReplayRecommendationResponse
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub

# An older bundle may have to be loaded first.
_TIMEOUT_SECONDS = 60


def replay(address: str, recommendation_id: str, user_id: str = "") -> ReplayRecommendationResponse:
    """Asks serving at host:port.

    Raises:
        NotFoundError: it keeps no record of that answer.
        StageError: it does not answer, or the answer's bundle is gone.
    """
    request = ReplayRecommendationRequest(recommendation_id=recommendation_id, user_id=user_id)
    with blocking_channel(address) as channel:
        try:
            response: ReplayRecommendationResponse = RecommenderServiceStub(channel).ReplayRecommendation(
                request, timeout=_TIMEOUT_SECONDS
            )
        except grpc.RpcError as error:
            status: grpc.Call = error  # type: ignore[assignment]  # what the client raises is both
            told = status.details() or status.code().name
            if status.code() is grpc.StatusCode.NOT_FOUND:
                raise NotFoundError(told) from error
            raise StageError("serving", f"{address}: {told}") from error
    return response


def told(response: ReplayRecommendationResponse) -> str:
    """The outcome in lines for people."""
    logged = response.logged
    made_of = f"bundle {logged.versions.bundle_version}, state revision {logged.state_revision}"
    lines = [f"recommendation {logged.recommendation_id}: {len(logged.items)} items, {made_of}"]
    lines += [f"  {item.position:>3}  {item.score:.4f}  {item.item_id}  {item.title}" for item in logged.items]
    lines.append("the same again" if response.matches else "not the same again:")
    lines += [f"  {difference}" for difference in response.differences]
    return "\n".join(lines)
