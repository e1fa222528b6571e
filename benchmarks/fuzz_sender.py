"""Produces the fuzzing load and notes where each message came to lie; watches the process that has to read it.

Between the load and the fuzzing test. Invariant: a message is either at a known source position or counted as
refused, by the client or by the broker.
"""

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import psutil
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from benchmarks.fuzz_load import Fuzzed
from benchmarks.stream_cluster import Cluster
from benchmarks.stream_truth import Place
from core.errors import StageTimeoutError
from core.kafka import client_config
from core.topics import PARTITIONER

# Kafka takes 1 MB unless told otherwise; a topic for pictures would be told.
_MESSAGE_BYTES = 4_000_000
_FLUSH_SECONDS = 120
_QUEUE_WAIT_SECONDS = 0.1
_ADMIN_SECONDS = 20
_SAMPLE_SECONDS = 0.2
MEGABYTE = 1_000_000


def allow_megabytes(cluster: Cluster) -> None:
    """Lets the inbound topics take what brokers refuse by default; the dead letter topics stay as they are."""
    admin = AdminClient(client_config(cluster.quiet_kafka))
    entry = ConfigEntry("max.message.bytes", str(_MESSAGE_BYTES), incremental_operation=AlterConfigOpType.SET)
    resources = [
        ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry]) for name in cluster.topics.inbound
    ]
    for future in admin.incremental_alter_configs(resources, request_timeout=_ADMIN_SECONDS).values():
        future.result(_ADMIN_SECONDS)


class Sender:
    """A producer that remembers."""

    def __init__(self, cluster: Cluster) -> None:
        self.placed: dict[Place, Fuzzed] = {}
        # By reason.
        self.refused: Counter[str] = Counter()
        self._producer = Producer(
            {
                **client_config(cluster.quiet_kafka),
                "partitioner": PARTITIONER,
                "acks": "all",
                "linger.ms": 5,
                "message.max.bytes": _MESSAGE_BYTES,
            }
        )

    def send(self, messages: Iterable[Fuzzed]) -> list[Fuzzed]:
        """Sends all and returns, when Kafka has decided on each, what was sent."""
        sent = []
        for message in messages:
            self._send(message)
            # The bytes are Kafka's now; megabytes need not be here, too.
            sent.append(message._replace(value=None, headers=()))
        if self._producer.flush(_FLUSH_SECONDS):
            raise StageTimeoutError("kafka", f"messages were not taken within {_FLUSH_SECONDS} s")
        return sent

    def _send(self, message: Fuzzed) -> None:
        slim = message._replace(value=None, headers=())

        def delivered(error: Any, written: Any) -> None:
            if error is not None:
                self.refused[error.str()] += 1
            else:
                self.placed[Place(written.topic(), written.partition(), written.offset())] = slim

        while True:
            try:
                self._producer.produce(
                    message.topic, message.value, message.key, headers=list(message.headers), on_delivery=delivered
                )
                self._producer.poll(0)
                return
            except BufferError:
                self._producer.poll(_QUEUE_WAIT_SECONDS)
            except KafkaException as error:
                self.refused[error.args[0].str()] += 1
                return


class ProcessWatch:
    """Samples a process's memory, and whether it still is the one that it was."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._name = cluster, name
        self._pids = {cluster.pid(name)}
        self._peak = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process-watch", daemon=True)
        self._thread.start()

    @property
    def restarts(self) -> int:
        return len(self._pids | {self._cluster.pid(self._name)}) - 1

    @property
    def peak_mb(self) -> float:
        return self._peak / MEGABYTE

    def rss_mb(self) -> float:
        rss: int = psutil.Process(self._cluster.pid(self._name)).memory_info().rss
        return rss / MEGABYTE

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_SAMPLE_SECONDS):
            pid = self._cluster.pid(self._name)
            try:
                self._peak = max(self._peak, psutil.Process(pid).memory_info().rss)
                self._pids.add(pid)
            except psutil.NoSuchProcess:
                continue
