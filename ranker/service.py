"""The gRPC face of the ranker: requests to jobs, scores to responses.

First and last on the ranker's path. Invariant: one response comes from one release, which it names; every score in it
is finite.
"""

import time

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
from ranker.release import UserJob
from ranker.releases import Releases
from ranker.requests import jobs_of
from ranker.scorer import Scores
from ranker.shadow import Shadow

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

    def __init__(
        self, releases: Releases, batcher: Batcher[UserJob, Scores], clock: Clock, shadow: Shadow | None = None
    ) -> None:
        self._releases = releases
        self._batcher = batcher
        self._clock = clock
        self._shadow = shadow

    async def RankCandidates(
        self, request: pb.RankCandidatesRequest, context: grpc.ServicerContext
    ) -> pb.RankCandidatesResponse:
        started = time.monotonic()
        deadline = request_deadline(context, DEFAULT_DEADLINE_MS)
        try:
            release = self._releases.named(request.bundle_version, request.model_version)
            jobs = jobs_of(request, release, self._clock.now_ms(), deadline)
            scores = await self._batcher.submit(jobs, deadline)
        except RecommenderError as error:
            metrics.refused.labels(_REASONS.get(type(error), "failed")).inc()
            raise
        if self._shadow is not None:
            self._shadow.offer(self._releases.shadow, jobs, scores)
        least = request.least_confidence if request.HasField("least_confidence") else None
        metrics.request_ms.observe((time.monotonic() - started) * 1000)
        return pb.RankCandidatesResponse(
            users=[_ranked(one, least) for one in scores],
            model_version=release.model_version,
            bundle_version=release.version,
            feature_signature=SIGNATURE,
        )

    async def GetModelInfo(
        self,
        request: pb.RankerServiceGetModelInfoRequest,  # noqa: ARG002 - gRPC's signature
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.RankerServiceGetModelInfoResponse:
        release, shadow = self._releases.current, self._releases.shadow
        return pb.RankerServiceGetModelInfoResponse(
            bundle_version=release.version,
            model_version=release.model_version,
            feature_signature=SIGNATURE,
            parameter_count=release.scorer.model.parameter_count(),
            device=str(release.scorer.device),
            load_time=from_ms(release.load_time_ms),
            metrics=release.manifest.metrics,
            loaded_bundle_versions=self._releases.versions(),
            form=release.scorer.network.form,
            shadow_bundle_version=shadow[0].version if shadow else "",
        )


def _ranked(scores: Scores, least_confidence: float | None) -> pb.RankedUser:
    ranked = pb.RankedUser(
        click_scores=scores.click.tolist(),
        conversion_scores=scores.conversion.tolist(),
        value_scores=scores.value.tolist(),
        scores=scores.score.tolist(),
        confidences=scores.confidence.tolist(),
        features=scores.features,
    )
    if least_confidence is not None:
        ranked.below_confidence.extend((scores.confidence < least_confidence).tolist())
        ranked.click_uncertainties.extend(scores.uncertainty.tolist())
    if scores.cut is not None:
        ranked.cut.extend(scores.cut.tolist())
    return ranked
