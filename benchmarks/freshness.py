"""How soon an event is seen: `python -m benchmarks.freshness [--quick] [--json]`. Needs KAFKA_HOME.

On real Kafka and Redis with the candidate service running: from `produce` until the user's state, and until the
user's new vector, can be read from Redis. Figures: benchmarks/streams.md. Invariant: the clock starts before the
event is handed to the producer and stops when a reader sees the row, polling included.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from benchmarks.ingest import WORKER, post, train_serving_bundle, wait_for_vectors
from benchmarks.plain_load import PlainConfig, paced, plain_events
from benchmarks.stream_cluster import Cluster, running_cluster
from core.kafka import KafkaProducer
from core.settings import load_settings
from features.definitions import USER_EMBEDDING, USER_STATE, View
from headrace.v1.events_pb2 import Event

_STATE_PER_SECOND, _EMBEDDING_PER_SECOND = 1000, 200
# One event in so many is of a user that nobody else is, and is looked for.
_STATE_PROBE_EVERY, _EMBEDDING_PROBE_EVERY = 20, 4
_POLL_SECONDS = 0.0005
_PATIENCE_SECONDS = 30.0
_USERS, _ZIPF = 50_000, 1.2


@dataclass(frozen=True)
class Plan:
    """How long each load runs; the first seconds warm up and do not count."""

    seconds: int
    warm_up_seconds: int


FULL = Plan(60, 5)
QUICK = Plan(8, 2)


class Probes:
    """Users to be seen in one view, looked for on a thread of its own."""

    def __init__(self, cluster: Cluster, view: View, column: str) -> None:
        self._store = cluster.store()
        self._view, self._column = view, column
        self._sent: dict[str, float] = {}
        self.waits_ms: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)
        self._thread.start()

    def expect(self, user_id: str) -> None:
        self._sent[user_id] = time.perf_counter()

    def finish(self) -> None:
        """Waits for what is still expected; what does not come counts as the whole patience."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while self._sent and time.monotonic() < end:
            time.sleep(0.01)
        self._stopping.set()
        self._thread.join()
        self.waits_ms.update(dict.fromkeys(self._sent, _PATIENCE_SECONDS * 1000))
        self._store.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            expected = list(self._sent)
            rows = self._store.read(self._view, [(user_id,) for user_id in expected], (self._column,))
            now = time.perf_counter()
            for user_id, row in zip(expected, rows, strict=True):
                if row.cells:
                    self.waits_ms[user_id] = (now - self._sent.pop(user_id)) * 1000
            time.sleep(_POLL_SECONDS)


def run(plan: Plan, home: Path) -> dict[str, Any]:
    say("training a small bundle")
    train_serving_bundle(home)
    with running_cluster(
        home, ("candidate", WORKER), event_log_interval_ms=load_settings().streams.event_log_interval_ms
    ) as cluster:
        for name in ("candidate", WORKER):
            cluster.wait_ready(name)
        say(f"{_STATE_PER_SECOND:,} events/s for {plan.seconds} s: states")
        states = _measure(cluster, plan, "state", _STATE_PER_SECOND, _STATE_PROBE_EVERY)
        say(f"{_EMBEDDING_PER_SECOND:,} events/s for {plan.seconds} s: vectors")
        vectors = _measure(cluster, plan, "vector", _EMBEDDING_PER_SECOND, _EMBEDDING_PROBE_EVERY)
    return {
        "state_visible_ms": states,
        "embedding_visible_ms": vectors,
        "state_events_per_second": _STATE_PER_SECOND,
        "embedding_events_per_second": _EMBEDDING_PER_SECOND,
        "seconds": plan.seconds,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _measure(cluster: Cluster, plan: Plan, name: str, per_second: int, probe_every: int) -> dict[str, float]:
    wait_for_vectors(cluster)
    view, column = (USER_STATE, "revision") if name == "state" else (USER_EMBEDDING, "embedding_revision")
    count = plan.seconds * per_second
    events = plain_events(
        PlainConfig(count, _USERS, _ZIPF, name=name), int(time.time() * 1000), step_ms=1000 / per_second
    )
    for number in range(0, count, probe_every):
        events[number].user_id = f"{name}-probe-{number}"
    probes, producer = Probes(cluster, view, column), KafkaProducer(cluster.settings.kafka)
    marked = f"{name}-probe-"

    def send(event: Event) -> None:
        if event.user_id.startswith(marked):
            probes.expect(event.user_id)
        post(producer, cluster.topics.events, event)

    paced(events, per_second, send)
    probes.finish()
    producer.close()
    warm = plan.warm_up_seconds * per_second
    waits = [ms for user_id, ms in probes.waits_ms.items() if int(user_id.rpartition("-")[2]) >= warm]
    return _quantiles(waits)


def _quantiles(waits_ms: Sequence[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(waits_ms, [50, 90, 99]).tolist()
    return {"p50": round(p50, 1), "p90": round(p90, 1), "p99": round(p99, 1), "count": len(waits_ms)}


def say(text: str) -> None:
    print(f"{'freshness':>10}  {text}", file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(title="From produced to visible", title_justify="left")
    for column in ("what", "events/s", "p50 ms", "p90 ms", "p99 ms", "probes"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what in ("state", "embedding"):
        row = result[f"{what}_visible_ms"]
        table.add_row(what, str(result[f"{what}_events_per_second"]), *map(str, row.values()))
    console.print(table)


def main() -> int:
    command = Command("freshness", __doc__, "a few seconds of each load")
    command.add_work()
    return command.run(lambda given, work: run(QUICK if given.quick else FULL, work), print_result)


if __name__ == "__main__":
    sys.exit(main())
