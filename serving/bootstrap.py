"""Wires the front door: the only place where its parts are made and joined.

Invariant: everything is closed in the reverse order of its making, and nothing here waits for another process.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from core.clock import Clock, SystemClock
from core.codec import from_ms
from core.grpc_runtime import GrpcServer
from core.kafka import GATHER_MS, KafkaProducer, Record, TopicFollower
from core.process import Process, freeze_heap
from core.settings import ServingSettings, Settings
from core.telemetry import get_logger
from core.topics import Topics
from headrace.v1.events_pb2 import Event
from headrace.v1.ingest_service_pb2_grpc import add_IngestServiceServicer_to_server
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.recommender_service_pb2_grpc import add_RecommenderServiceServicer_to_server
from serving import metrics
from serving.answer_log import AnswerLog
from serving.breaker import CLOSED, CircuitBreaker
from serving.candidate_cache import CachingRetriever
from serving.clients import CandidateClient, RankerClient
from serving.ingest import DELIVERY_TIMEOUT_MS, IngestService, Profiles, TopicIdentities
from serving.ladder import Ladder, LastGood
from serving.pipeline import Pipeline, Stages
from serving.recommender import Recommender
from serving.release import Release, Releases
from serving.replay import Replayer
from serving.service import RecommenderService
from serving.shown import Shown
from serving.stages.filter import EligibilityFilter
from serving.stages.hydrate import StoreHydrator
from serving.stages.log import KafkaImpressionLog
from serving.stages.rank import ServiceRanker
from serving.stages.rerank import BlendingReRanker
from serving.stages.retrieve import MergingRetriever
from serving.stages.select import TopSelector
from serving.store_reader import UserStore

_log = get_logger("serving")


class Memory(Protocol):
    """What keeps something of users for a while."""

    def forget(self, user_ids: Iterable[str]) -> None: ...


SERVICES = ("headrace.v1.RecommenderService", "headrace.v1.IngestService")
DEPENDENCIES = ("redis", "candidate", "ranker", "kafka")
# Impressions wait for company: their statistics are counted together. An ingested event does not.
_IMPRESSION_LINGER_MS = 200
_WARM_UPS = 3


async def serve(settings: Settings, process: Process) -> None:
    """Runs until the process is to stop."""
    async with front_door(settings, process) as server:
        process.open_admin(settings.serving.host, settings.serving.admin_port)
        _log.info("ready", port=server.port)
        await process.stopping.wait()


@asynccontextmanager
async def front_door(settings: Settings, process: Process, clock: Clock | None = None) -> AsyncIterator[GrpcServer]:
    """A running server with all that is behind it.

    Raises:
        ArtifactError: no release bundle, or one that does not load.
        OSError: the port is taken.
    """
    clock = clock or SystemClock()
    serving, topics = settings.serving, Topics(settings.kafka.topic_prefix)
    releases = await asyncio.to_thread(Releases, settings, lambda topic: metrics.malformed.labels(topic).inc(), clock)
    process.readiness.add("catalogue", lambda: _problem(releases.current, clock))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, releases.close)
        breakers = {name: _breaker(name, serving, clock) for name in DEPENDENCIES}
        store = UserStore(settings.redis, settings.features.project)
        stack.push_async_callback(store.close)
        candidate = CandidateClient(serving.candidate_target, breakers["candidate"])
        ranker = RankerClient(serving.ranker_target, breakers["ranker"])
        for client in (candidate, ranker):
            client.connect()
            stack.push_async_callback(client.close)
        for_impressions = KafkaProducer(settings.kafka, linger_ms=_IMPRESSION_LINGER_MS)
        for_events = KafkaProducer(settings.kafka, delivery_timeout_ms=DELIVERY_TIMEOUT_MS)
        for producer in (for_impressions, for_events):
            stack.push_async_callback(asyncio.to_thread, producer.close, 2)
        impressions = KafkaImpressionLog(
            for_impressions, topics.impressions, serving.impression_queue_max, serving.feature_log_others
        )
        shown = Shown(serving.last_good_users, serving.fatigue_half_life_seconds)
        answers = AnswerLog(Path(serving.state_path) if serving.state_path else None, serving.replay_log_mb)
        stack.push_async_callback(asyncio.to_thread, answers.close)
        reranker, selector = BlendingReRanker(serving, settings.features, shown), TopSelector(settings.features)
        seconds = serving.retrieval_cache_seconds
        retriever = CachingRetriever(MergingRetriever(candidate), seconds, serving.last_good_users, clock)
        filters = EligibilityFilter()
        stages = Stages(
            StoreHydrator(store, breakers["redis"], settings.features),
            retriever,
            filters,
            ServiceRanker(ranker, serving.feature_log_share),
            reranker,
            selector,
            impressions,
        )
        last_good = LastGood(serving.last_good_users, serving.last_good_max_age_seconds, clock)
        tombstones = _follow_tombstones(settings, topics, (last_good, shown, answers, retriever))
        stack.push_async_callback(asyncio.to_thread, tombstones.stop)
        ladder = Ladder(serving, filters, last_good)
        pipeline = Pipeline(stages, ladder, last_good, shown, answers, serving.ladder, clock)
        recommender = Recommender(pipeline, releases, serving, clock)

        server = GrpcServer(serving.host, serving.port, SERVICES)
        replayer = Replayer(answers, releases, reranker, selector, settings, clock)
        answering = RecommenderService(recommender, replayer, breakers, serving, clock, process.stopping)
        add_RecommenderServiceServicer_to_server(answering, server.grpc)
        identities = TopicIdentities(settings.kafka, (topics.events, topics.feedback))
        profiles = Profiles(store, breakers["redis"])
        taking_in = IngestService(for_events, identities, topics, releases, breakers["kafka"], profiles, clock)
        add_IngestServiceServicer_to_server(taking_in, server.grpc)

        def run_beside(work: Coroutine[Any, Any, None]) -> None:
            task = asyncio.create_task(work)
            task.add_done_callback(lambda done: _stop_if_broken(done, process))
            stack.push_async_callback(_cancel, task)

        for background in (releases.keep_fresh(), impressions.run(), recommender.watch_loop()):
            run_beside(background)
        await _warm_up(recommender, releases.current, clock)
        server.start()
        stack.push_async_callback(server.stop)
        server.set_serving(True)
        yield server


def _follow_tombstones(settings: Settings, topics: Topics, memories: Sequence[Memory]) -> TopicFollower:
    """Erased users are forgotten here, too. From the end of the topic: this process has kept nothing before."""
    loop = asyncio.get_running_loop()

    def forget(records: list[Record]) -> None:
        erased = [record.key.decode("utf-8", "replace") for record in records if record.value is None]
        if erased:
            # They belong to the loop's thread.
            for memory in memories:
                loop.call_soon_threadsafe(memory.forget, erased)

    follower = TopicFollower(settings.kafka, (topics.users,), forget, from_end=True, gather_ms=GATHER_MS)
    follower.start()
    return follower


def _breaker(name: str, settings: ServingSettings, clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(name, settings.breaker_failures, settings.breaker_open_ms, clock, _tell)


def _tell(dependency: str, state: str, why: str) -> None:
    metrics.breaker_open.labels(dependency).set(state != CLOSED)
    say = _log.info if state == CLOSED else _log.warning
    say(f"breaker {state}", dependency=dependency, why=why)


def _problem(release: Release, clock: Clock) -> str | None:
    if release.catalog.servable(clock.now_ms()).any():
        return None
    return f"no item of bundle {release.version} may be recommended now; are all expired or unavailable?"


async def _warm_up(recommender: Recommender, release: Release, clock: Clock) -> None:
    """Runs all stages a few times, then takes what has been built out of the collector's sight."""
    item_id = release.catalog.item_ids[int(release.popular.everybody().rows[0])]
    click = Event(event_id="warm-up", user_id="warm-up", item_id=item_id, kind="click")
    click.event_time.CopyFrom(from_ms(clock.now_ms()))
    for _ in range(_WARM_UPS):
        await recommender.warm_up(RecommendRequest(user_id="warm-up", session_events=[click], dry_run=True))
    freeze_heap()


def _stop_if_broken(task: asyncio.Task[None], process: Process) -> None:
    """A background task that ends by itself is a bug; better restarted than half alive."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a background task failed, stopping", error=repr(error))
        process.stopping.set()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
