"""RecommenderService over gRPC: a thin adapter between the wire and `serving.recommender`.

Invariant: no logic of recommending lives here; errors are core.errors and become statuses in core.grpc_runtime.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping

import grpc

from core.clock import Clock
from core.codec import from_ms
from core.deadline import Deadline
from core.errors import InvalidRequestError
from core.grpc_runtime import request_deadline
from core.settings import ServingSettings
from headrace.v1 import recommender_service_pb2 as pb
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceServicer
from serving.answer import versions_of
from serving.breaker import CircuitBreaker
from serving.explain import explanation
from serving.recommender import Recommender
from serving.replay import Replayer
from serving.validation import check_batch, check_explain, check_replay

Context = grpc.ServicerContext
# Users of batch calls that are worked on at once; the rest of the capacity is for single requests.
_BATCH_CONCURRENCY = 16
# Time of an answer from the ladder.
_LADDER_MS = 0.3
_WATCH_SECONDS = 1.0


class RecommenderService(RecommenderServiceServicer):
    """The front door."""

    def __init__(
        self,
        recommender: Recommender,
        replayer: Replayer,
        breakers: Mapping[str, CircuitBreaker],
        settings: ServingSettings,
        clock: Clock,
        stopping: asyncio.Event,
    ) -> None:
        self._recommender = recommender
        self._replayer = replayer
        self._breakers = breakers
        self._settings = settings
        self._clock = clock
        self._stopping = stopping
        self._batch_slots = asyncio.Semaphore(_BATCH_CONCURRENCY)

    async def Recommend(self, request: pb.RecommendRequest, context: Context) -> pb.RecommendResponse:
        deadline = request_deadline(context, self._settings.deadline_ms)
        return (await self._recommender.recommend(request, deadline)).response

    async def RecommendBatch(self, request: pb.RecommendBatchRequest, context: Context) -> pb.RecommendBatchResponse:
        check_batch(request)
        count = len(request.requests)
        # Without a deadline of the caller every user has the time of a single request. What is kept back lets those
        # whose turn comes too late be answered from the ladder.
        deadline = request_deadline(context, self._settings.deadline_ms * count)
        deadline = deadline.minus_ms(count * _LADDER_MS)
        results = [
            asyncio.ensure_future(self._one_of_batch(entry, deadline, f"requests[{index}]."))
            for index, entry in enumerate(request.requests)
        ]
        try:
            return pb.RecommendBatchResponse(results=await asyncio.gather(*results))
        finally:
            for result in results:
                result.cancel()

    async def _one_of_batch(
        self, request: pb.RecommendRequest, deadline: Deadline, prefix: str
    ) -> pb.RecommendBatchResult:
        try:
            async with self._batch_slots:
                answered = await self._recommender.recommend(request, deadline, field_prefix=prefix)
        except InvalidRequestError as error:
            detail = pb.ErrorDetail(code="INVALID_ARGUMENT", message=str(error), field=error.field)
            return pb.RecommendBatchResult(user_id=request.user_id, error=detail)
        return pb.RecommendBatchResult(user_id=request.user_id, response=answered.response)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        check_explain(request, self._clock.now_ms())
        asked = request.request
        asked.explain = asked.dry_run = True
        deadline = request_deadline(context, self._settings.deadline_ms)
        answered = await self._recommender.recommend(
            asked, deadline, probe_item_id=request.item_id, field_prefix="request."
        )
        return explanation(*answered)

    async def ReplayRecommendation(
        self,
        request: pb.ReplayRecommendationRequest,
        context: Context,  # noqa: ARG002 - gRPC's signature, here and below
    ) -> pb.ReplayRecommendationResponse:
        check_replay(request)
        return await self._replayer.replay(request.recommendation_id, request.user_id)

    async def GetModelInfo(
        self,
        request: pb.GetModelInfoRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> pb.GetModelInfoResponse:
        release = self._recommender.releases.current
        manifest = release.manifest
        return pb.GetModelInfoResponse(
            versions=versions_of(release),
            bundle_created_time=from_ms(manifest.created_time_ms),
            data_watermark_time=from_ms(manifest.data_watermark_ms),
            feature_signature=manifest.feature_signature,
            item_count=len(release.catalog),
            metrics=manifest.metrics,
        )

    async def WatchServing(
        self,
        request: pb.WatchServingRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> AsyncIterator[pb.WatchServingResponse]:
        while not self._stopping.is_set():
            yield pb.WatchServingResponse(
                time=from_ms(self._clock.now_ms()),
                versions=versions_of(self._recommender.releases.current),
                answers_by_tier=self._recommender.answers_by_tier,
                breakers={name: breaker.state for name, breaker in self._breakers.items()},
                p95_ms=self._recommender.p95_ms(),
            )
            try:
                await asyncio.wait_for(self._stopping.wait(), _WATCH_SECONDS)
            except TimeoutError:
                continue
