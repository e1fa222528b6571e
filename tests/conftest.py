"""What several folders of tests need: a real Redis that may be killed, a broker, a reader on both.

The broker of the stream's tests is the best at hand: KAFKA_BOOTSTRAP_SERVERS, an Apache Kafka from KAFKA_HOME, one in
a container where Docker answers, else the embedded one; the head of pytest's report says which.
"""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import hypothesis
import pytest
from confluent_kafka.admin import AdminClient

from core.kafka import KafkaProducer, Written, client_config
from core.settings import Settings, load_settings
from core.topics import Topics
from devstack.child import tied
from devstack.kafka_broker import FETCH_WAIT_MAX_MS
from devstack.kafka_local import kafka_home, local_kafka_problem, local_kafka_spec
from devstack.ports import Ports
from devstack.topics import ensure_topics
from features.stores.definition import check_definition
from features.stores.erasures import Erasures, erase_again
from features.stores.online import OnlineStore
from streams.broadcast import StatsBroadcast
from streams.dead_letters import DeadLetters
from streams.doubts import ItemDoubts
from streams.reader import BatchReader
from streams.rows import Rows
from streams.sink import EventLogSink
from tests.redis_servers import Cluster, RedisServer, redis_cluster, single_redis, wait_until

# Properties are about what comes out; how long an example takes is a matter of what else the machine does.
hypothesis.settings.register_profile("headrace", deadline=None)
hypothesis.settings.load_profile("headrace")

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that do not kill it; each takes a project of its own."""
    with single_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that this test may kill, cut and flush."""
    with single_redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As shared_redis."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """As own_redis."""
    with redis_cluster(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture(params=["redis", "cluster"])
def each_shared_redis(request: pytest.FixtureRequest) -> RedisServer | Cluster:
    """For what must hold of a single Redis and of a cluster."""
    return request.getfixturevalue(f"shared_{request.param}")  # type: ignore[no-any-return]


@pytest.fixture(params=["redis", "cluster"])
def each_own_redis(request: pytest.FixtureRequest) -> RedisServer | Cluster:
    return request.getfixturevalue(f"own_{request.param}")  # type: ignore[no-any-return]


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
        try:
            wait_until(lambda: spec.ready_problem() is None, spec.start_timeout_seconds, "kafka")
            yield {"bootstrap_servers": f"127.0.0.1:{port}"}
        finally:
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

    def make(redis_server: RedisServer | Cluster, **streams: object) -> Settings:
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
        self._settings = settings
        topics = Topics(settings.kafka.topic_prefix)
        self.store = OnlineStore(settings.redis, settings.features.project)
        self.sink = EventLogSink(settings.streams, topics) if settings.streams.event_log_path else None
        self.records = Erasures(settings.streams.event_log_path)
        self.doubts = ItemDoubts(self.store)
        self.dirty: set[str] = set()
        self.reader = BatchReader(
            settings,
            Rows(self.store, settings.features, settings.streams.state_cache_users),
            DeadLetters(producer),
            self.sink,
            StatsBroadcast(
                producer,
                topics.item_stats,
                settings.streams.stats_broadcast_interval_ms,
                settings.streams.shown_broadcast_interval_ms,
            ),
            self.dirty.update,
            before_reading=self._before_reading,
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

    def _before_reading(self, partitions: Sequence[int]) -> None:
        check_definition(self.store, self._settings.features)
        self.doubts.look(partitions)
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
