"""A stack for hurting the stream: real Kafka, Redis, the candidate service and two workers, each to be killed by name.

Between devstack, which keeps processes running, and the crash test. Invariant: nothing here is part of what is
tested; a worker is `python -m streams` as anywhere, and all processes end with the `with` block.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from core.bundle import ReleaseBundle
from core.errors import StageError, StageTimeoutError
from core.kafka import client_config, topic_sources
from core.settings import Settings, load_settings
from core.topics import Topics
from devstack.ports import LOOPBACK, Ports
from devstack.processes import ProcessSpec, http_problem, python_module
from devstack.stack import LOCAL, Stack
from features.stores.online import OnlineStore
from offline.data.simulator import SimulatorConfig, simulate
from offline.train import train

PARTITIONS = 6
WORKERS = ("streams-1", "streams-2")
# The least for which the setting's promise holds with brokers as they come, who take no session below 6 s.
SESSION_TIMEOUT_MS = 7500
_TRAINING = {
    "offline": {
        "dimension": 32,
        "max_epochs": 1,
        "ranker_epochs": 1,
        "ranker_max_rows": 1000,
        "batch_scores_per_user": 5,
    }
}
_SIMULATED = SimulatorConfig(users=100, items=300, seed=7, end_time_ms=1_780_000_000_000)
# Any restart has to wait for what else is broken at that moment.
_START_SECONDS = 300
_BUSY_SECONDS = 60.0
_ADMIN_SECONDS = 5.0


def train_bundle(home: Path) -> ReleaseBundle:
    """A small, but trained, release: its towers encode the users."""
    simulate(_SIMULATED, home / "dataset")
    return train(home / "dataset", home / "bundles", load_settings(overrides=_TRAINING), progress=False)


class Cluster:
    """Kafka, Redis, candidate and the workers, by name."""

    def __init__(self, stack: Stack, admin_ports: dict[str, int]) -> None:
        self._stack = stack
        self._admin_ports = admin_ports
        self.settings: Settings = stack.settings
        self.topics = Topics(self.settings.kafka.topic_prefix)
        self.sources = topic_sources(self.settings.kafka, self.topics.inbound)
        self._redis_file = stack.folder / "redis" / "appendonly.aof"
        # That the broker goes away is the point here, and no news.
        self.quiet_kafka = self.settings.kafka.model_copy(update={"client": {"log_level": 2}})

    @property
    def logs(self) -> Path:
        return self._stack.logs

    @property
    def partitions(self) -> int:
        """Of each user-keyed topic."""
        return self.settings.kafka.partitions

    def pid(self, name: str) -> int:
        return self._stack.pid(name)

    def metrics(self, name: str) -> dict[str, float]:
        """What a process says of itself now: the sum over all labels of each of its own metrics."""
        connection = HTTPConnection(LOOPBACK, self._admin_ports[name], timeout=_ADMIN_SECONDS)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        sums: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("headrace_"):
                labelled, _, value = line.rpartition(" ")
                metric = labelled.partition("{")[0]
                sums[metric] = sums.get(metric, 0.0) + float(value)
        return sums

    def store(self) -> OnlineStore:
        return OnlineStore(self.settings.redis, self.settings.features.project)

    def kill(self, name: str) -> None:
        """SIGKILL; it stays dead until `start`."""
        self._stack.kill(name, restart=False)

    def start(self, name: str) -> None:
        self._stack.start(name)

    def freeze(self, name: str) -> None:
        """SIGSTOP, as a machine that swaps or a paused container: it will not know that time has passed."""
        self._stack.kill(name, signal.SIGSTOP, restart=False)

    def thaw(self, name: str) -> None:
        self._stack.kill(name, signal.SIGCONT, restart=False)
        self._stack.start(name)

    def is_ready(self, name: str) -> bool:
        return http_problem(self._admin_ports[name], "/ready") is None

    def wait_ready(self, name: str) -> None:
        self._stack.wait_ready(name, _START_SECONDS)

    def stop(self, name: str) -> None:
        self._stack.stop(name)

    def kill_redis_losing(self, seconds: float) -> int:
        """Kills Redis and cuts from its append-only file what the last seconds have written; returns the bytes."""
        file, limit = self._redis_file, time.monotonic() + _BUSY_SECONDS
        while True:
            before = file.stat()
            time.sleep(seconds)
            after = file.stat()
            # Written anew meanwhile: its end is not where it was. Nothing written: there is nothing to lose.
            if after.st_ino == before.st_ino and after.st_size > before.st_size:
                break
            if time.monotonic() > limit:
                raise StageTimeoutError("redis", f"nothing was written to it for {_BUSY_SECONDS:.0f} s")
        self.kill("redis")
        lost = file.stat().st_size - before.st_size
        # One byte more: the last command that is left is a torn one.
        os.truncate(file, max(0, before.st_size - 1))
        return lost

    def partitions_of(self, worker: str) -> set[int]:
        """What the group has given to a worker, nothing while it does not tell. Workers bear their names in it."""
        # A new client each time: one that saw the broker die may wait for long.
        admin = AdminClient(client_config(self.quiet_kafka))
        future = admin.describe_consumer_groups([self.settings.streams.group_id], request_timeout=_ADMIN_SECONDS)
        try:
            group: Any = future[self.settings.streams.group_id].result(_ADMIN_SECONDS + 1)
        except (KafkaException, TimeoutError):
            return set()
        members = [member for member in group.members if member.client_id == worker]
        return {tp.partition for member in members for tp in member.assignment.topic_partitions}


@contextmanager
def running_cluster(
    home: Path,
    names: Sequence[str] = ("candidate", *WORKERS),
    kafka: str = LOCAL,
    own: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    **streams: int | str,
) -> Iterator[Cluster]:
    """Starts Redis, Kafka and the named processes, with settings of section `streams` beside this test's defaults.

    `own` holds environment variables that only one of the processes has, by its name.
    """
    values: dict[str, int | str] = {
        "session_timeout_ms": SESSION_TIMEOUT_MS,
        "event_log_interval_ms": 1000,
        # The stack's own worker keeps its place in the group while it starts again; these are two, and must lose it.
        "instance_id": "",
        **streams,
    }
    ports = Ports()
    admin_ports = {name: ports.take(name) for name in names}
    specs = [
        ProcessSpec(
            name,
            python_module(name.partition("-")[0]),
            env={
                f"HEADRACE_{name.partition('-')[0].upper()}__ADMIN_PORT": str(admin_ports[name]),
                "HEADRACE_KAFKA__CLIENT": json.dumps({"client.id": name}),
                **own.get(name, {}),
            },
            admin_port=admin_ports[name],
            depends_on=("redis", "kafka"),
            wave=1,
            start_timeout_seconds=_START_SECONDS,
            stop_timeout_seconds=30,
        )
        for name in names
    ]
    environment = {f"HEADRACE_STREAMS__{key.upper()}": str(value) for key, value in values.items()}
    if kafka == LOCAL:
        environment["HEADRACE_KAFKA__PARTITIONS"] = str(PARTITIONS)
    try:
        with Stack(home, kafka=kafka, bundles=home / "bundles", processes=specs, extra_env=environment) as stack:
            yield Cluster(stack, admin_ports)
    finally:
        ports.close()


class MarkerWatch:
    """Notes when the marker of each partition moves, on a thread of its own; blind while Redis is away."""

    def __init__(self, cluster: Cluster) -> None:
        self._store = cluster.store()
        self._moved: list[list[float]] = [[] for _ in range(PARTITIONS)]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="marker-watch", daemon=True)
        self._thread.start()

    def longest_gap(self, partition: int, begin: float, end: float) -> float:
        """The longest time (monotonic seconds) without a move between begin and end."""
        moves = [begin, *(at for at in self._moved[partition] if begin < at < end), end]
        return max(later - earlier for earlier, later in pairwise(moves))

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._store.close()

    def _run(self) -> None:
        before: list[dict[tuple[int, int], int]] = [{} for _ in range(PARTITIONS)]
        while not self._stopping.wait(0.02):
            try:
                now = self._store.read_markers(range(PARTITIONS))
            except StageError:
                continue
            for partition, marker in enumerate(now):
                if marker != before[partition]:
                    self._moved[partition].append(time.monotonic())
            before = now
