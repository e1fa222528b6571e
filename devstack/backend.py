"""A product backend as seen from outside: asks for recommendations, sends events, keeps count of what it got.

Used by the demo, the end-to-end tests and the benchmarks. Invariant: every answer is counted, failed ones too;
nothing here looks inside a process.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from uuid import uuid4

import grpc
import numpy as np

from core.codec import from_ms
from core.errors import StageError
from core.kafka import KafkaProducer, Written
from core.settings import Settings
from core.topics import Topics
from headrace.v1.events_pb2 import Event
from headrace.v1.recommender_service_pb2 import RecommendRequest, RecommendResponse
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub
from headrace.v1.types_pb2 import DegradedReason, ServingTier


def tier_name(answer: RecommendResponse) -> str:
    """RANKED, POPULAR, ..."""
    return ServingTier.Name(answer.served_tier).removeprefix("SERVING_TIER_")


def reason_names(answer: RecommendResponse) -> list[str]:
    return [DegradedReason.Name(reason).removeprefix("DEGRADED_REASON_").lower() for reason in answer.degraded_reasons]


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50 and p99; None (JSON's null) where there is nothing."""
    if not values:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2)}


@dataclass
class Tally:
    """What a backend got: counts and latencies in milliseconds. Thread-safe."""

    answers: int = 0
    failed: int = 0
    empty: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    elapsed_ms: list[float] = field(default_factory=list)
    stage_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, answer: RecommendResponse, elapsed_ms: float) -> None:
        with self._lock:
            self.answers += 1
            self.empty += not answer.items
            self.tiers[tier_name(answer)] += 1
            self.reasons.update(reason_names(answer))
            self.elapsed_ms.append(elapsed_ms)
            for timing in answer.stage_timings:
                self.stage_ms[timing.stage].append(timing.elapsed.ToNanoseconds() / 1e6)

    def add_failure(self) -> None:
        with self._lock:
            self.answers += 1
            self.failed += 1


class Backend:
    """Calls the front door over gRPC, one call at a time per thread."""

    def __init__(self, address: str, tally: Tally | None = None) -> None:
        self.tally = tally or Tally()
        self._channel = grpc.insecure_channel(address)
        self._stub = RecommenderServiceStub(self._channel)

    def recommend(
        self,
        user_id: str,
        num_items: int = 20,
        *,
        explore: bool = False,
        dry_run: bool = False,
        deadline_seconds: float = 1.0,
    ) -> RecommendResponse | None:
        """One answer, counted; None when the call failed. `dry_run` logs no impressions."""
        request = RecommendRequest(
            user_id=user_id, num_items=num_items, disable_exploration=not explore, dry_run=dry_run
        )
        begin = time.perf_counter()
        try:
            answer: RecommendResponse = self._stub.Recommend(request, timeout=deadline_seconds)
        except grpc.RpcError:
            self.tally.add_failure()
            return None
        self.tally.add(answer, (time.perf_counter() - begin) * 1000)
        return answer

    def close(self) -> None:
        self._channel.close()


class EventSender:
    """Produces events to Kafka, as an event producer of the product would."""

    def __init__(self, settings: Settings) -> None:
        self._topics = Topics(settings.kafka.topic_prefix)
        self._producer = KafkaProducer(settings.kafka)

    def click(self, user_id: str, item_id: str, categories: Iterable[str] = ()) -> "Future[Written]":
        """A click, now."""
        return self.send(
            Event(
                event_id=uuid4().hex,
                user_id=user_id,
                item_id=item_id,
                kind="click",
                event_time=from_ms(time.time_ns() // 1_000_000),
                surface="home",
                categories=categories,
            )
        )

    def send(self, event: Event) -> "Future[Written]":
        return self._producer.send(self._topics.events, event.user_id.encode(), event.SerializeToString())

    def send_all(self, events: Iterable[Event]) -> dict[int, int]:
        """Sends events in order; returns, for each partition, the offset of its last one.

        Raises:
            StageError: Kafka did not take them all.
        """
        newest: dict[int, int] = {}
        waiting = [self.send(event) for event in events]
        self._producer.flush()
        for future in waiting:
            if not future.done():
                raise StageError("kafka", f"{len(waiting)} events could not all be delivered")
            written = future.result()
            newest[written.partition] = max(newest.get(written.partition, -1), written.offset)
        return newest

    def close(self) -> None:
        self._producer.close()
