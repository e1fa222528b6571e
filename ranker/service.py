"""The gRPC face of the ranker: requests to jobs, scores to responses.

Invariant: one response comes from one release, which it names; every score in it is finite.
"""

import time
from typing import Any

import grpc

from core.clock import Clock
from core.codec import from_ms
from core.errors import InvalidRequestError, NotFoundError, OverloadedError, RecommenderError, StageTimeoutError
from core.grpc_runtime import request_deadline
from features.vectors import SIGNATURE
from headrace.v1 import ranker_service_pb2 as pb
from headrace.v1.ranker_service_pb2_grpc import RankerServiceServicer
from ranker import metrics
from ranker.batcher import Batcher
from ranker.feed import Releases
from ranker.release import UserJob
from ranker.requests import jobs_of
from ranker.scorer import Scores

# A caller without a deadline: longer than any answer is worth waiting for.
DEFAULT_DEADLINE_MS = 2000
_REASONS: dict[type[RecommenderError], str] = {
    InvalidRequestError: "invalid",
    NotFoundError: "unknown_model",
    OverloadedError: "overloaded",
    StageTimeoutError: "late",
}


class RankerService(RankerServiceServicer):
    """RankCandidates and GetModelInfo."""

    def __init__(self, releases: Releases, batcher: Batcher[UserJob, Scores], clock: Clock) -> None:
        self._releases = releases
        self._batcher = batcher
        self._clock = clock

    async def RankCandidates(
        self, request: pb.RankCandidatesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RankCandidatesResponse:
        started = time.monotonic()
        deadline = request_deadline(context, DEFAULT_DEADLINE_MS)
        release = self._releases.current
        try:
            jobs = jobs_of(request, release, self._clock.now_ms())
            scores = await self._batcher.submit(jobs, deadline)
        except RecommenderError as error:
            metrics.refused.labels(_REASONS.get(type(error), "failed")).inc()
            raise
        metrics.request_ms.observe((time.monotonic() - started) * 1000)
        return pb.RankCandidatesResponse(
            users=[_ranked(one) for one in scores],
            model_version=release.model_version,
            bundle_version=release.manifest.bundle_version,
            feature_signature=SIGNATURE,
        )

    async def GetModelInfo(
        self,
        request: pb.RankerServiceGetModelInfoRequest,  # noqa: ARG002 - gRPC's signature
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002
    ) -> pb.RankerServiceGetModelInfoResponse:
        release = self._releases.current
        return pb.RankerServiceGetModelInfoResponse(
            bundle_version=release.manifest.bundle_version,
            model_version=release.model_version,
            feature_signature=SIGNATURE,
            parameter_count=release.scorer.model.parameter_count(),
            device=str(release.scorer.device),
            load_time=from_ms(release.load_time_ms),
            metrics=release.manifest.metrics,
        )


def _ranked(scores: Scores) -> pb.RankedUser:
    return pb.RankedUser(
        click_scores=scores.click.tolist(),
        conversion_scores=scores.conversion.tolist(),
        value_scores=scores.value.tolist(),
        scores=scores.score.tolist(),
        confidences=scores.confidence.tolist(),
    )
