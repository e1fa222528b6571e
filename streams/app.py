"""The Faust app: owns the worker's services, and reads the quiet topics (items, users) with agents.

Started inside the process's own event loop by bootstrap.py. Faust acknowledges a message whose agent raised, which
loses it. Invariant: nothing raises out of an agent; a message is acknowledged when its row is written, its dead
letter delivered and the event log has it.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiokafka
import faust
from mode import Service

from core.errors import StageError
from core.kafka import SaidOnce
from core.settings import Settings
from core.telemetry import get_logger
from streams import header_names, metrics
from streams.dead_letters import DeadLetters
from streams.processor import RawMessage
from streams.profiles import ProfileProcessor, Profiles
from streams.sink import EventLogSink

_log = get_logger("streams.app")

# What Faust asks brokers for, with no setting for it.
_FAUST_FETCH_WAIT_MS = 1500
# What users and items are like changes seldom, and may take so long to be heard of; a fetch each few milliseconds costs
# a tenth of a core.
_QUIET_FETCH_WAIT_MS = 100
_TAKE, _TAKE_SECONDS = 500, 0.1
_ATTEMPTS = 3
_BACKOFF_SECONDS = 0.5
_ACK_SECONDS = 0.5


class Threads(Service):
    """Things with a thread of their own, started and stopped with the app: the last started stops first."""

    def __init__(self, parts: Sequence[Any], **options: Any) -> None:
        super().__init__(**options)
        self._parts = list(parts)

    async def on_start(self) -> None:
        for part in self._parts:
            await asyncio.to_thread(part.start)

    async def on_stop(self) -> None:
        for part in reversed(self._parts):
            await asyncio.to_thread(part.stop)


class App(faust.App):
    """Faust without a folder: its tables would be kept there, and there are none."""

    async def on_first_start(self) -> None:
        """Makes no directories: those of a worker that is killed would stay for ever."""


class QuietTopic:
    """One quiet topic: what its agent does, and what waits to be acknowledged."""

    def __init__(
        self,
        processor: ProfileProcessor,
        dead_letters: DeadLetters,
        sink: EventLogSink | None,
        source: int,
        stopping: threading.Event,
        on_acknowledged: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        self._on_acknowledged = on_acknowledged
        self._processor = processor
        self._dead_letters = dead_letters
        self._sink = sink
        self._source = source
        self._stopping = stopping
        # (stream, event), oldest first.
        self._unacknowledged: deque[tuple[Any, Any]] = deque()

    async def run(self, stream: Any) -> None:
        """The agent's body."""
        batches: AsyncIterator[Sequence[Any]] = stream.noack_take(_TAKE, within=_TAKE_SECONDS)
        async for events in batches:
            messages = [_raw(event.message) for event in events]
            if await asyncio.to_thread(self._handle, messages):
                self._unacknowledged.extend((stream, event) for event in events)
                await self.acknowledge()

    async def acknowledge(self) -> None:
        """Acknowledges, in order, what has come to rest everywhere."""
        while self._unacknowledged:
            stream, event = self._unacknowledged[0]
            message = event.message
            if self._sink is not None and self._sink.written(message.topic, message.partition) < message.offset:
                return
            self._unacknowledged.popleft()
            await stream.ack(event)
            self._on_acknowledged(message.topic, message.partition, message.offset)

    def _handle(self, messages: Sequence[RawMessage]) -> bool:
        """Rows, letters, event log. Waits out a store that is away; False when the worker stops before the end."""
        profiles = self._processor.sort_out(messages)
        attempts = 0
        while not self._stopping.is_set():
            try:
                self._processor.write(profiles)
                break
            except StageError as error:
                _log.warning("profiles wait", problem=str(error), messages=len(messages))
            except Exception as error:  # noqa: BLE001 - nothing raises out of an agent
                attempts += 1
                _log.error("unexpected error in an agent", error=repr(error), attempt=attempts)
                if attempts == _ATTEMPTS:
                    reason = f"unexpected {type(error).__name__} while writing: {error}"[:500]
                    profiles = Profiles(letters=[(raw, reason) for raw in messages])
            self._stopping.wait(_BACKOFF_SECONDS)
        return (
            not self._stopping.is_set()
            and self._dead_letters.deliver(profiles.letters, self._stopping)
            and self._log_rows(messages, profiles)
        )

    def _log_rows(self, messages: Sequence[RawMessage], profiles: Profiles) -> bool:
        for raw in messages:
            metrics.EVENTS.labels(raw.topic, "read").inc()
        if self._sink is None:
            return True
        last = {(raw.topic, raw.partition): raw.offset for raw in messages}
        for (topic, partition), offset in last.items():
            rows = [row for row in profiles.rows if row[1].partition == partition]
            while not self._stopping.is_set():
                try:
                    self._sink.open(topic, self._source, partition)
                    if self._sink.add(topic, partition, offset, rows, self._stopping):
                        break
                except StageError as error:
                    _log.warning("event log is away", problem=str(error))
                    self._stopping.wait(_BACKOFF_SECONDS)
        return not self._stopping.is_set()


def make_app(settings: Settings, topics: dict[str, QuietTopic], parts: Sequence[Any]) -> App:
    """The app, with one agent per quiet topic.

    Args:
        settings: of the process.
        topics: by name.
        parts: what has threads of its own (`start`, `stop`), in the order to start it.
    """
    _shorten_fetch_wait(max(settings.kafka.fetch_wait_max_ms, _QUIET_FETCH_WAIT_MS))
    header_names.install()
    # Crashes and rebalances go to our log; the rest of its lines would be news to nobody.
    logging.getLogger("faust").setLevel(logging.ERROR)
    logging.getLogger("mode").setLevel(logging.ERROR)
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    # While the broker is away each of them says so ten times a second.
    for name in ("", ".cluster", ".conn", ".consumer.fetcher", ".consumer.group_coordinator"):
        logging.getLogger(f"aiokafka{name}").addFilter(SaidOnce())
    session_seconds = settings.streams.session_timeout_ms / 1000
    app = App(
        # Of the project, too: another one (`headrace rebuild --project`) needs its own profiles.
        f"{settings.streams.group_id}-{settings.features.project}-profiles",
        broker=[f"kafka://{address}" for address in settings.kafka.bootstrap_servers.split(",")],
        autodiscover=False,
        store="memory://",
        web_enabled=False,
        # `headrace topics` makes topics, with the right partitions; Faust's leader topic has no use here.
        topic_allow_declare=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        broker_session_timeout=session_seconds,
        broker_heartbeat_interval=session_seconds / 3,
        broker_request_timeout=max(90.0, 2 * session_seconds),
        broker_commit_interval=1.0,
        broker_max_poll_records=_TAKE,
        stream_wait_empty=False,
    )
    for name, quiet in topics.items():
        app.agent(_topic(app, name), name=f"profiles.{name}", concurrency=1)(_agent(quiet))
    app.timer(_ACK_SECONDS, name="acknowledge")(_acknowledge(list(topics.values())))
    app.add_dependency(Threads(parts))
    return app


def _topic(app: faust.App, name: str) -> Any:
    return app.topic(
        name, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", allow_empty=True
    )


def _agent(quiet: QuietTopic) -> Callable[[Any], Any]:
    async def agent(stream: Any) -> None:
        await quiet.run(stream)

    return agent


def _acknowledge(topics: Sequence[QuietTopic]) -> Callable[[], Any]:
    async def acknowledge() -> None:
        for quiet in topics:
            await quiet.acknowledge()

    return acknowledge


def _raw(message: Any) -> RawMessage:
    headers = message.headers or ()
    pairs = headers.items() if isinstance(headers, dict) else headers
    return RawMessage(
        message.topic,
        message.partition,
        message.offset,
        message.key,
        message.value,
        list(pairs),
        max(0, int((message.timestamp or 0) * 1000)),
    )


def _shorten_fetch_wait(fetch_wait_max_ms: int) -> None:
    """The embedded broker lets a fetch wait its time out, and Faust has no setting for that time."""
    if fetch_wait_max_ms >= _FAUST_FETCH_WAIT_MS:
        return

    class QuickConsumer(aiokafka.AIOKafkaConsumer):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "fetch_max_wait_ms": fetch_wait_max_ms})

    # The driver looks it up there.
    aiokafka.AIOKafkaConsumer = QuickConsumer
