"""What several folders of tests need: a real Redis that may be killed, a broker, a reader on both.

The broker of the stream's tests is the best at hand: KAFKA_BOOTSTRAP_SERVERS, an Apache Kafka from KAFKA_HOME, one in
a container where Docker answers, else the embedded one; the head of pytest's report says which.
"""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from confluent_kafka.admin import AdminClient

from core.kafka import KafkaProducer, Written, client_config
from core.settings import Settings, load_settings
from core.topics import Topics
from devstack.child import tied
from devstack.kafka_broker import FETCH_WAIT_MAX_MS
from devstack.kafka_local import kafka_home, local_kafka_problem, local_kafka_spec
from devstack.ports import Ports
from devstack.redis_server import redis_spec, redis_url
from devstack.topics import ensure_topics
from features.stores.erasures import Erasures, erase_again
from features.stores.online import OnlineStore
from streams.broadcast import StatsBroadcast
from streams.dead_letters import DeadLetters
from streams.reader import BatchReader
from streams.rows import Rows
from streams.sink import EventLogSink

_NUMBERS = itertools.count()


def wait_until(condition: Callable[[], object], timeout_seconds: float = 20, what: str = "") -> object:
    """Asks again and again; returns the first true answer."""
    end = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"{what or condition} did not come true in {timeout_seconds} s"
        time.sleep(0.005)
    return result


class RedisServer:
    """A redis-server with its append-only file on, as the stack runs it."""

    cluster = False

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.folder, self.port, self.url = folder, port, redis_url(port)
        self._spec = redis_spec(folder, port)
        self._command = (*self._spec.command, *options)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(tied(self._command), stdout=subprocess.DEVNULL)
        wait_until(lambda: self._spec.ready_problem() is None, what="redis")

    def kill(self) -> None:
        """kill -9: what was written is in the append-only file."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def keep_aof(self) -> Path:
        """A copy of the append-only file as it is now."""
        copy = self.folder / "kept.aof"
        shutil.copy(self.folder / "appendonly.aof", copy)
        return copy

    def restore_aof(self, copy: Path) -> None:
        """The server (stopped) will come up as it was when the copy was made."""
        shutil.copy(copy, self.folder / "appendonly.aof")

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)

    def stop(self) -> None:
        if self._process is not None:
            self.kill()


@contextmanager
def _redis(folder: Path) -> Iterator[RedisServer]:
    ports = Ports()
    server = RedisServer(folder, ports.take("redis"))
    server.start()
    try:
        yield server
    finally:
        server.stop()
        ports.close()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that do not kill it; each takes a project of its own."""
    with _redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that this test may kill, cut and flush."""
    with _redis(tmp_path / "redis") as server:
        yield server


def pytest_report_header() -> str:
    return f"kafka: {_which_broker()}"


def _which_broker() -> str:
    if servers := os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        return servers
    if (problem := local_kafka_problem(kafka_home())) is None:
        return "local"
    return "container" if _docker_answers() else f"embedded (not a real one: {problem})"


def _docker_answers() -> bool:
    if importlib.util.find_spec("testcontainers") is None or shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False).returncode == 0


@contextmanager
def _local_broker(folder: Path) -> Iterator[dict[str, object]]:
    ports = Ports()
    port = ports.take("kafka")
    spec = local_kafka_spec(kafka_home(), folder, port, ports.take("kafka-controller"))
    with subprocess.Popen(tied(spec.command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: spec.ready_problem() is None, spec.start_timeout_seconds, "kafka")
        yield {"bootstrap_servers": f"127.0.0.1:{port}"}
        process.kill()
    ports.close()


@contextmanager
def _container_broker() -> Iterator[dict[str, object]]:
    from testcontainers.community.kafka import KafkaContainer

    with KafkaContainer().with_kraft() as container:
        yield {"bootstrap_servers": container.get_bootstrap_server()}


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Settings of section `kafka` for the best broker at hand."""
    which = _which_broker()
    if which == "local":
        with _local_broker(tmp_path_factory.mktemp("kafka")) as settings:
            yield settings
    elif which == "container":
        with _container_broker() as settings:
            yield settings
    elif which.startswith("embedded"):
        with _embedded_broker() as settings:
            yield settings
    else:
        yield {"bootstrap_servers": which}


@pytest.fixture(scope="session")
def embedded_kafka() -> Iterator[dict[str, object]]:
    """Settings of section `kafka` for an embedded broker in a child process, whatever else is at hand."""
    with _embedded_broker() as settings:
        yield settings


@contextmanager
def _embedded_broker() -> Iterator[dict[str, object]]:
    command = tied([sys.executable, "-m", "devstack.kafka_broker"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        announced = json.loads(process.stdout.readline())
        yield {
            "bootstrap_servers": announced["bootstrap_servers"],
            "log_id": announced["log_id"],
            "fetch_wait_max_ms": FETCH_WAIT_MAX_MS,
        }
        process.terminate()


@pytest.fixture
def stream_settings(kafka: dict[str, object], tmp_path: Path) -> Iterator[Callable[..., Settings]]:
    """Makes settings with topics, a group and a project of their own on the shared broker."""
    made: list[Settings] = []

    def make(redis_server: RedisServer, **streams: object) -> Settings:
        name = f"t{uuid4().hex[:8]}x{next(_NUMBERS)}"
        overrides = {
            "kafka": {**kafka, "topic_prefix": name},
            "redis": {"url": redis_server.url, "cluster": redis_server.cluster},
            "features": {"project": name},
            "registry": {"path": str(tmp_path / "bundles")},
            "streams": {
                "group_id": name,
                "event_log_path": str(tmp_path / "log"),
                "marker_interval_ms": 20,
                # The embedded broker lets a returning member wait for this, less a second. Brokers that are not ours
                # take 6 s at least.
                "session_timeout_ms": 6000 if os.environ.get("KAFKA_BOOTSTRAP_SERVERS") else 2000,
                **streams,
            },
        }
        settings = load_settings(overrides=overrides)
        ensure_topics(settings.kafka)
        made.append(settings)
        return settings

    yield make
    for settings in made:
        if not settings.kafka.log_id:
            AdminClient(client_config(settings.kafka)).delete_topics(list(Topics(settings.kafka.topic_prefix).all))


class ReaderPart:
    """The reader of one worker with its rows, sink and broadcast; no embeddings, no Faust."""

    def __init__(self, settings: Settings, producer: KafkaProducer) -> None:
        topics = Topics(settings.kafka.topic_prefix)
        self.store = OnlineStore(settings.redis, settings.features.project)
        self.sink = EventLogSink(settings.streams, topics) if settings.streams.event_log_path else None
        self.records = Erasures(settings.streams.event_log_path)
        self.dirty: set[str] = set()
        self.reader = BatchReader(
            settings,
            Rows(self.store, settings.features, settings.streams.state_cache_users),
            DeadLetters(producer),
            self.sink,
            StatsBroadcast(producer, topics.item_stats, settings.streams.stats_broadcast_interval_ms),
            self.dirty.update,
            erase_again=self._erase_again,
        )

    def start(self) -> "ReaderPart":
        if self.sink is not None:
            self.sink.start()
        self.reader.start()
        return self

    def stop(self) -> None:
        self.reader.stop()
        if self.sink is not None:
            self.sink.stop()

    def _erase_again(self) -> None:
        if self.sink is not None:
            erase_again(self.store, self.records)

    def wait_for(self, written: list[Written], timeout_seconds: float = 30) -> None:
        """Returns when all of these messages are processed."""
        last: dict[tuple[str, int], int] = {}
        for one in written:
            last[one.topic, one.partition] = max(one.offset, last.get((one.topic, one.partition), -1))

        def processed() -> bool:
            now = self.reader.processed()
            return all(now.get(where, -1) >= offset for where, offset in last.items())

        wait_until(processed, timeout_seconds, "processed")


@pytest.fixture
def kafka_producer(kafka: dict[str, object]) -> Iterator[KafkaProducer]:
    producer = KafkaProducer(load_settings(overrides={"kafka": kafka}).kafka)
    yield producer
    producer.close()


@pytest.fixture
def start_reader(kafka_producer: KafkaProducer) -> Iterator[Callable[[Settings], ReaderPart]]:
    """Starts readers; what still runs at the end of the test is stopped."""
    parts: list[ReaderPart] = []

    def start(settings: Settings) -> ReaderPart:
        parts.append(ReaderPart(settings, kafka_producer).start())
        return parts[-1]

    yield start
    for part in parts:
        part.stop()
