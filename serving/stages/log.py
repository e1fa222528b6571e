"""Log: what was shown goes to Kafka, beside the answer and never in its way.

Last stage. Invariant: `log` returns at once; the queue is bounded, drops its oldest when full, and counts what is lost.
"""

import asyncio
from collections import deque
from concurrent.futures import Future
from typing import Protocol

from core.kafka import KafkaProducer, Written
from headrace.v1.events_pb2 import Impression, ImpressionList
from headrace.v1.recommender_service_pb2 import RecommendResponse
from headrace.v1.types_pb2 import ServingTier
from serving import metrics
from serving.feature_log import cut
from serving.query import Query, Tier

# Handed to the Kafka client and not yet acknowledged; the rest waits in our queue, where the oldest can be dropped.
_IN_FLIGHT_MAX = 1000


class ImpressionLog(Protocol):
    """Writes down what was shown."""

    def log(self, query: Query, response: RecommendResponse) -> None:
        """Returns at once and never fails."""
        ...


class KafkaImpressionLog:
    """Sends impression lists to the impressions topic from a bounded queue.

    Args:
        producer: of the topic's cluster.
        topic: the impressions topic.
        queue_max: lists waiting.
        feature_log_others: items that were not shown whose features are logged, of an answer that logs features.
    """

    def __init__(self, producer: KafkaProducer, topic: str, queue_max: int, feature_log_others: int) -> None:
        self._producer = producer
        self._topic = topic
        self._queue_max = queue_max
        self._feature_log_others = feature_log_others
        self._queue: deque[ImpressionList] = deque()
        self._in_flight = 0
        self._wake = asyncio.Event()

    def log(self, query: Query, response: RecommendResponse) -> None:
        if query.request.dry_run or not response.items:
            return
        if len(self._queue) >= self._queue_max:
            self._queue.popleft()
            metrics.impressions_dropped.inc()
        self._queue.append(impressions_of(query, response, self._feature_log_others))
        self._wake.set()

    async def run(self) -> None:
        """Sends what is queued, until cancelled."""
        loop = asyncio.get_running_loop()

        def acknowledged(done: Future[Written]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._acknowledged, done)

        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue and self._in_flight < _IN_FLIGHT_MAX:
                shown = self._queue.popleft()
                self._in_flight += 1
                sent = self._producer.send(self._topic, shown.user_id.encode(), shown.SerializeToString())
                sent.add_done_callback(acknowledged)

    def _acknowledged(self, done: Future[Written]) -> None:
        self._in_flight -= 1
        if done.exception() is not None:
            metrics.impressions_dropped.inc()
        if self._queue:
            self._wake.set()


def impressions_of(query: Query, response: RecommendResponse, feature_log_others: int) -> ImpressionList:
    context, versions, features = query.request.context, response.versions, query.trace.features
    return ImpressionList(
        event_id=f"impression:{response.recommendation_id}",
        user_id=query.user_id,
        recommendation_id=response.recommendation_id,
        event_time=response.answer_time,
        surface=context.surface,
        device=context.device,
        session_id=context.session_id,
        served_tier=tier_name(response.served_tier),
        experiment_arm=response.experiment_arm,
        bundle_version=versions.bundle_version,
        model_version=versions.model_version,
        index_version=versions.index_version,
        state_revision=response.state_revision,
        impressions=[
            Impression(
                item_id=item.item_id,
                position=item.position,
                propensity=item.propensity,
                score=item.score,
                sources=item.sources,
            )
            for item in response.items
        ],
        tags=context.tags,
        features=b""
        if features is None
        else cut(features, response.recommendation_id, [item.item_id for item in response.items], feature_log_others),
    )


def tier_name(tier: Tier) -> str:
    """ranked, reranked_batch, ... as in the settings' ladder."""
    return ServingTier.Name(tier).removeprefix("SERVING_TIER_").lower()
