"""Wires the stream worker and runs it until it is told to stop.

The only place that builds its parts. Invariant: SIGTERM finishes the batch under way, writes the markers, empties the
event log's buffers and leaves the group, in this order.
"""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from core.errors import StageError
from core.kafka import KafkaProducer, topic_sources, wait_for_kafka
from core.process import Process, collect_when_idle, freeze_heap, freeze_survivors
from core.settings import Settings
from core.telemetry import get_logger
from core.topics import Topics
from features.definitions import ITEM_PROFILE, USER_PROFILE
from features.stores.definition import check_definition
from features.stores.erasures import Erasures, erase_again
from features.stores.online import OnlineStore
from streams.app import QuietTopic, make_app
from streams.broadcast import StatsBroadcast
from streams.dead_letters import DeadLetters
from streams.doubts import ItemDoubts
from streams.popularity import PopularityWriter
from streams.profiles import Erasing, ProfileProcessor, Removing
from streams.reader import BatchReader
from streams.refill import ProfileRefill
from streams.rows import Rows
from streams.sink import EventLogSink
from streams.topic_ends import TopicEnds
from streams.updater import EmbeddingUpdater
from streams.watchdog import Watchdog

_log = get_logger("streams")

_KAFKA_SECONDS = 1.0
_PAUSE_SECONDS = 0.2
# A batch makes tens of thousands of objects, none of them in cycles: with the collector's default of 700 new ones it
# takes a quarter of the reader's time. So many take it some milliseconds, in which everything stands still.
_YOUNG_OBJECTS = 10_000


async def serve(settings: Settings, process: Process) -> None:
    """Runs the worker. Kafka, Redis and the candidate service may be away at any time, at the start too."""
    stopping = threading.Event()
    state = {"problem": "waiting for kafka"}
    process.readiness.add("start", lambda: state["problem"] or None)
    process.open_admin(settings.streams.host, settings.streams.admin_port)
    await asyncio.to_thread(_check_definition, settings)
    sources = await _wait_for_sources(settings, process)
    if sources is None:
        return
    producer = KafkaProducer(settings.kafka)
    worker = Worker(settings, producer, sources, stopping)
    process.readiness.add("reader", worker.reader.problem)
    process.readiness.add("partitions", worker.watchdog.problem)
    collecting: asyncio.Task[None] | None = None
    app = worker.app = make_app(settings, worker.quiet_topics, worker.parts)
    try:
        await app.start()
        state["problem"] = ""
        freeze_heap()
        freeze_survivors(_YOUNG_OBJECTS)
        collecting = asyncio.create_task(collect_when_idle(worker.is_idle))
        await _until_stopped(process, app)
    finally:
        if collecting is not None:
            collecting.cancel()
        stopping.set()
        await app.stop()
        await asyncio.to_thread(producer.close)


class Worker:
    """The parts of one worker."""

    def __init__(
        self, settings: Settings, producer: KafkaProducer, sources: dict[str, int], stopping: threading.Event
    ) -> None:
        streams, topics = settings.streams, Topics(settings.kafka.topic_prefix)
        # A store is for one thread.
        stores = [OnlineStore(settings.redis, settings.features.project) for _ in range(6)]
        letters = DeadLetters(producer)
        self.sink = EventLogSink(streams, topics) if streams.event_log_path else None
        records = Erasures(streams.event_log_path) if streams.event_log_path else None
        self.updater = EmbeddingUpdater(settings, stores[0], lambda partition: self.reader.owns(partition))
        self.reader = BatchReader(
            settings,
            Rows(stores[1], settings.features, streams.state_cache_users),
            letters,
            self.sink,
            StatsBroadcast(
                producer, topics.item_stats, streams.stats_broadcast_interval_ms, streams.shown_broadcast_interval_ms
            ),
            self.updater.mark,
            self.updater.sweep_soon,
            before_reading=partial(_before_reading, stores[1], settings, records, ItemDoubts(stores[1])),
        )
        self.watchdog = Watchdog(settings, self.processed, self.reader.skip_expired)
        # One of the group is enough: every worker would write the same.
        self.popularity = PopularityWriter(settings, stores[2], lambda: self.reader.owns(0))
        self.parts: list[Any] = [self.watchdog, self.popularity, self.updater, self.reader]
        if self.sink is not None:
            self.parts.insert(0, self.sink)
        ends = TopicEnds(settings.kafka, sources)
        erasing = Erasing(ends, records, self.updater.forget)
        removing = Removing(streams.removed_item_keep_seconds, ends.stats_partitions)

        def processors(for_items: OnlineStore, for_users: OnlineStore) -> dict[str, ProfileProcessor]:
            return {
                topics.items: ProfileProcessor(ITEM_PROFILE, for_items, sources, removing),
                topics.users: ProfileProcessor(USER_PROFILE, for_users, sources, erasing),
            }

        # All on the thread of the refill.
        self.refill = ProfileRefill(settings, stores[5], processors(stores[5], stores[5]), sources)
        self.parts.append(self.refill)
        self.quiet_topics = {
            topic: QuietTopic(processor, letters, self.sink, sources[topic], stopping, self.refill.acknowledged)
            for topic, processor in processors(stores[3], stores[4]).items()
        }
        self.app: Any = None
        self._seen: dict[tuple[str, int], int] = {}

    def is_idle(self) -> bool:
        """Whether nothing has come since this was asked last."""
        seen, self._seen = self._seen, self.reader.processed()
        return seen == self._seen

    def processed(self) -> dict[tuple[str, int], int]:
        """Newest offset of each topic-partition of this worker that has come to rest, -1 for none yet."""
        # Before the group has met there is no consumer to ask.
        consumer = getattr(self.app, "consumer", None)
        quiet = [(tp.topic, tp.partition) for tp in consumer.assignment()] if consumer is not None else []
        return self.reader.processed() | {where: self.refill.position(*where) for where in quiet}


def _check_definition(settings: Settings) -> None:
    """Ends a worker whose settings do not fit the rows, if Redis is there to tell; else the reader finds out."""
    store = OnlineStore(settings.redis, settings.features.project)
    try:
        check_definition(store, settings.features)
    except StageError as error:
        _log.debug("the rows' feature definition is not known yet", problem=str(error))
    finally:
        store.close()


def _before_reading(
    store: OnlineStore, settings: Settings, records: Erasures | None, doubts: ItemDoubts, partitions: Sequence[int]
) -> None:
    """What a store must stand before its markers are believed, whenever reading starts."""
    check_definition(store, settings.features)
    doubts.look(partitions)
    if records is not None:
        erase_again(store, records)


async def _wait_for_sources(settings: Settings, process: Process) -> dict[str, int] | None:
    """Identities of the topics, as soon as Kafka tells them; None when the process is stopped before."""
    topics = Topics(settings.kafka.topic_prefix)
    said = ""
    while not process.stopping.is_set():
        try:
            await asyncio.to_thread(wait_for_kafka, settings.kafka, _KAFKA_SECONDS)
            return await asyncio.to_thread(topic_sources, settings.kafka, topics.inbound)
        except StageError as error:
            if str(error) != said:
                said = str(error)
                _log.warning("waiting for kafka", problem=said)
            # A Kafka without the topics says so at once.
            with suppress(TimeoutError):
                await asyncio.wait_for(process.stopping.wait(), _PAUSE_SECONDS)
    return None


async def _until_stopped(process: Process, app: Any) -> None:
    """Returns when the process is told to stop. Raises StageError when the app has crashed."""
    await app.wait_for_stopped(process.stopping.wait())
    if not process.stopping.is_set():
        raise StageError("kafka", f"the Faust app ended ({app.crash_reason!r}); the worker starts again")
