"""IngestService: events and feedback over gRPC, for producers without a Kafka client.

Invariant: an event is acknowledged when Kafka has it, and only then; each event of a call has its own result; a call
that Kafka took nothing of answers UNAVAILABLE and says when to come again.
"""

import asyncio
from collections.abc import Sequence
from typing import TypeVar

import grpc

from core.clock import Clock
from core.codec import check_event, check_size
from core.deadline import Deadline
from core.errors import InvalidRequestError, MalformedEventError, StageError, StageTimeoutError
from core.grpc_runtime import request_deadline
from core.kafka import KafkaProducer, Written, topic_sources
from core.settings import KafkaSettings
from core.topics import Topics
from headrace.v1.events_pb2 import Event, Feedback
from headrace.v1.ingest_service_pb2 import (
    IngestResult,
    SendEventsRequest,
    SendEventsResponse,
    SendFeedbackRequest,
    SendFeedbackResponse,
)
from headrace.v1.ingest_service_pb2_grpc import IngestServiceServicer
from headrace.v1.recommender_service_pb2 import ErrorDetail
from headrace.v1.types_pb2 import IngestToken
from serving import metrics
from serving.breaker import CircuitBreaker
from serving.clients import guarded
from serving.release import Releases
from serving.stages.hydrate import fill_categories
from serving.store_reader import UserStore

MAX_EVENTS = 1000
# A broker that was away is asked again about once a second.
RETRY_AFTER_MS = 1000
# After so long the producer gives an event back that Kafka did not take.
DELIVERY_TIMEOUT_MS = 2_000
LONGEST_WAIT_MS = 2 * DELIVERY_TIMEOUT_MS
# Of the caller's deadline, for the way back.
_MARGIN_MS = 10
_PROFILES_MS = 50

E = TypeVar("E", Event, Feedback)
Context = grpc.ServicerContext


class TopicIdentities:
    """Identities of the topics, for tokens; asked of the broker once it can be reached."""

    def __init__(self, settings: KafkaSettings, topics: Sequence[str]) -> None:
        self._settings = settings
        self._topics = topics
        self._sources: dict[str, int] = {}
        self._asking = asyncio.Lock()

    async def source(self, topic: str) -> int:
        """Raises StageError while the broker is away."""
        async with self._asking:
            if not self._sources:
                self._sources = await asyncio.to_thread(topic_sources, self._settings, self._topics, 2.0)
        return self._sources[topic]


class Profiles:
    """What ingestion takes from profiles: the segment of events whose producer gave none."""

    def __init__(self, store: UserStore, breaker: CircuitBreaker) -> None:
        self._store = store
        self._breaker = breaker

    async def fill_segments(self, events: Sequence[Event | Feedback], deadline: Deadline) -> None:
        """Where Redis does not answer at once, the events go without."""
        users = list(dict.fromkeys(event.user_id for event in events if not event.segment))
        if not users:
            return
        is_fair = deadline.remaining_ms() >= _PROFILES_MS
        try:
            with guarded(self._breaker, is_fair=is_fair):
                found = await self._store.read_segments(users, deadline.capped_ms(_PROFILES_MS))
                segments = dict(zip(users, found, strict=True))
        except StageError:
            return
        for event in events:
            event.segment = event.segment or segments[event.user_id]


class IngestService(IngestServiceServicer):
    """Checks events, completes them, and hands them to Kafka."""

    def __init__(
        self,
        producer: KafkaProducer,
        identities: TopicIdentities,
        topics: Topics,
        releases: Releases,
        breaker: CircuitBreaker,
        profiles: Profiles,
        clock: Clock,
    ) -> None:
        self._producer = producer
        self._identities = identities
        self._topics = topics
        self._releases = releases
        self._breaker = breaker
        self._profiles = profiles
        self._clock = clock

    async def SendEvents(self, request: SendEventsRequest, context: Context) -> SendEventsResponse:
        results = await self._take("events", request.events, self._topics.events, context)
        return SendEventsResponse(results=results)

    async def SendFeedback(self, request: SendFeedbackRequest, context: Context) -> SendFeedbackResponse:
        results = await self._take("feedback", request.feedback, self._topics.feedback, context)
        return SendFeedbackResponse(results=results)

    async def _take(self, field: str, events: Sequence[E], topic: str, context: Context) -> list[IngestResult]:
        if not 1 <= len(events) <= MAX_EVENTS:
            raise InvalidRequestError(field, f"1..{MAX_EVENTS} are needed")
        results = [self._checked(f"{field}[{index}]", event) for index, event in enumerate(events)]
        valid = [index for index, result in enumerate(results) if result is None]
        if valid:
            deadline = request_deadline(context, LONGEST_WAIT_MS).minus_ms(_MARGIN_MS)
            taken = [events[index] for index in valid]
            await self._profiles.fill_segments(taken, deadline)
            try:
                outcomes = await self._produce(taken, topic, deadline)
            except StageError as error:
                context.set_trailing_metadata((("retry-after-ms", str(RETRY_AFTER_MS)),))
                # Late or away: to the producer it is the same, and the same event_id again does no harm.
                raise StageError("kafka", f"{error}; send the same events again") from error
            for index, outcome in zip(valid, outcomes, strict=True):
                results[index] = outcome
        done = [result for result in results if result is not None]
        for result in done:
            metrics.ingested.labels("taken" if result.HasField("token") else "refused").inc()
        return done

    def _checked(self, field: str, event: Event | Feedback) -> IngestResult | None:
        """The error of an event that Kafka will never see; None where it is fine."""
        try:
            check_size(event.ByteSize())
            check_event(event, self._clock.now_ms())
        except MalformedEventError as error:
            where = f"{field}.{error.field}" if error.field else field
            return _refused(event, "INVALID_ARGUMENT", str(error), where)
        fill_categories(event, self._releases.current.catalog)
        return None

    async def _produce(self, events: Sequence[Event | Feedback], topic: str, deadline: Deadline) -> list[IngestResult]:
        """Sends valid events in order; raises StageError when Kafka took none of them, or not in time."""
        with guarded(self._breaker, is_fair=deadline.remaining_ms() > DELIVERY_TIMEOUT_MS):
            source = await self._identities.source(topic)
            sent = [
                asyncio.wrap_future(
                    self._producer.send(topic, event.user_id.encode(), event.SerializeToString(deterministic=True))
                )
                for event in events
            ]
            # Every message's fate is known within the producer's delivery timeout; a caller may have less time.
            _, pending = await asyncio.wait(sent, timeout=deadline.remaining_seconds())
            if pending:
                raise StageTimeoutError("kafka", "did not acknowledge within the call's deadline")
            written = [future.exception() or future.result() for future in sent]
            failures = [outcome for outcome in written if isinstance(outcome, BaseException)]
            if len(failures) == len(written):
                raise failures[0]
        return [_result(event, outcome, source) for event, outcome in zip(events, written, strict=True)]


def _result(event: Event | Feedback, outcome: Written | BaseException, source: int) -> IngestResult:
    if isinstance(outcome, BaseException):
        return _refused(event, "UNAVAILABLE", f"{outcome}; send it again", "")
    token = IngestToken(topic=outcome.topic, partition=outcome.partition, offset=outcome.offset, source=source)
    return IngestResult(event_id=event.event_id, token=token)


def _refused(event: Event | Feedback, code: str, message: str, field: str) -> IngestResult:
    return IngestResult(event_id=event.event_id, error=ErrorDetail(code=code, message=message, field=field))
