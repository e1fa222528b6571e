"""One worker and two: `python -m benchmarks.scale [--events N] [--rounds N] [--quick] [--json]`. Needs KAFKA_HOME.

The workers own the six partitions and stand still (SIGSTOP) while a backlog is sent, then go on at one moment, each on
a core of its own. Where Kafka and Redis share these cores, wall time measures them, too; so the ratio is also taken of
CPU time: a backlog cannot be done before the worker with the most work has had the CPU for it. Figures:
benchmarks/scale.md. Invariant: one worker and two take backlogs of the same size and kind, in turns, rows in memory.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import stream_readings as readings
from benchmarks.ingest import post
from benchmarks.plain_load import PlainConfig, plain_events
from benchmarks.stream_cluster import PARTITIONS, WORKERS, Cluster, running_cluster
from core.errors import RecommenderError, StageTimeoutError
from core.kafka import KafkaProducer
from features.stores.online import OnlineStore

_USERS = 20_000
# Rows of all users come into memory before a backlog is measured.
_WARM_SHARE = 0.5
# A worker that stands still is no dead one.
_SESSION_MS = 120_000
_SETTLE_SECONDS = 600.0
_POLL_SECONDS = 0.01
_SERVERS = ("kafka", "redis")
_LOGGED = "headrace_streams_event_log_rows_total"
_BEGIN = time.monotonic()


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    events: int
    rounds: int


FULL, QUICK = Plan(150_000, rounds=3), Plan(20_000, rounds=1)


@dataclass(frozen=True)
class Run:
    """One backlog, taken by some workers."""

    events: int
    seconds: float
    # CPU seconds, by process; until the event log, too, has everything.
    cpu: dict[str, float]
    # Events in the partitions of each worker.
    shares: dict[str, int]

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds

    @property
    def events_per_cpu_second(self) -> float:
        """What the workers would do, each with a core to itself and Kafka and Redis elsewhere."""
        return self.events / max(self.cpu[worker] for worker in self.shares)


class Scale:
    """The cluster and the backlogs that were sent to it."""

    def __init__(self, cluster: Cluster, store: OnlineStore, plan: Plan) -> None:
        self._cluster, self._store, self._plan = cluster, store, plan
        self._sent = 0

    def measure(self, workers: Sequence[str]) -> Run:
        """Backlogs for exactly these workers: one that makes them warm, one that counts."""
        for worker in WORKERS:
            if worker not in workers:
                self._cluster.stop(worker)
        for worker in workers:
            self._cluster.start(worker)
            self._cluster.wait_ready(worker)
        self._wait_for_shares(workers)
        for worker, core in zip(workers, sorted(os.sched_getaffinity(0)), strict=False):
            _pin(self._cluster.pid(worker), core)
        self._backlog(workers, int(self._plan.events * _WARM_SHARE))
        run = self._backlog(workers, self._plan.events)
        say(
            f"{' and '.join(workers)}: {run.events_per_second:,.0f} events/s, "
            f"{run.events_per_cpu_second:,.0f} per CPU second of the busiest, shares {list(run.shares.values())}"
        )
        return run

    def _backlog(self, workers: Sequence[str], events: int) -> Run:
        """Sends so many events to workers that stand still, and lets them go."""
        processes = [psutil.Process(self._cluster.pid(worker)) for worker in workers]
        names = (*workers, *_SERVERS)
        logged = self._logged(workers) + events
        before = readings.ends(self._cluster)
        for process in processes:
            process.suspend()
        try:
            self._send(events)
            cpu, begin = self._cpu(names), time.perf_counter()
        finally:
            for process in processes:
                process.resume()
        if not readings.wait_for_markers(self._cluster, self._store, _SETTLE_SECONDS, _POLL_SECONDS):
            raise StageTimeoutError("streams", "the markers do not reach the end of the topics")
        seconds = time.perf_counter() - begin
        while self._logged(workers) < logged:
            time.sleep(_POLL_SECONDS)
        after = self._cpu(names)
        return Run(events, seconds, {name: after[name] - cpu[name] for name in names}, self._shares(workers, before))

    def _send(self, events: int) -> None:
        producer = KafkaProducer(
            self._cluster.quiet_kafka, linger_ms=5, queue_max=1_000_000, delivery_timeout_ms=60_000
        )
        config = PlainConfig(events, _USERS, zipf=0.0, seed=self._sent)
        for event in plain_events(config, int(time.time() * 1000), 0.1):
            post(producer, self._cluster.topics.events, event)
        producer.close(60)
        self._sent += events

    def _shares(self, workers: Sequence[str], before: dict[tuple[int, int], int]) -> dict[str, int]:
        new = {where[1]: end - before.get(where, -1) for where, end in readings.ends(self._cluster).items()}
        return {
            worker: sum(new.get(partition, 0) for partition in self._cluster.partitions_of(worker))
            for worker in workers
        }

    def _wait_for_shares(self, workers: Sequence[str]) -> None:
        limit = time.monotonic() + _SETTLE_SECONDS
        while any(len(self._cluster.partitions_of(worker)) != PARTITIONS // len(workers) for worker in workers):
            if time.monotonic() > limit:
                raise StageTimeoutError("kafka", f"{len(workers)} workers do not share the partitions evenly")
            time.sleep(_POLL_SECONDS)
        for worker in workers:
            while not self._cluster.is_ready(worker):
                time.sleep(_POLL_SECONDS)

    def _logged(self, workers: Sequence[str]) -> float:
        return sum(self._cluster.metrics(worker).get(_LOGGED, 0) for worker in workers)

    def _cpu(self, names: Sequence[str]) -> dict[str, float]:
        times = {name: psutil.Process(self._cluster.pid(name)).cpu_times() for name in names}
        return {name: float(one.user + one.system) for name, one in times.items()}


def run(plan: Plan, home: Path) -> dict[str, Any]:
    """One and two in turns: 1 2, 2 1, 1 2 ..."""
    ones: list[Run] = []
    twos: list[Run] = []
    with (
        running_cluster(home, WORKERS, session_timeout_ms=_SESSION_MS, marker_interval_ms=50) as cluster,
        closing(cluster.store()) as store,
    ):
        scale = Scale(cluster, store, plan)
        for number in range(plan.rounds):
            turns = [(WORKERS[:1], ones), (WORKERS, twos)]
            for workers, runs in turns if number % 2 == 0 else reversed(turns):
                runs.append(scale.measure(workers))
    return summary(ones, twos)


def summary(ones: Sequence[Run], twos: Sequence[Run]) -> dict[str, Any]:
    """Medians over the rounds."""
    one, two = (median(run.events_per_second for run in runs) for runs in (ones, twos))
    one_cpu, two_cpu = (median(run.events_per_cpu_second for run in runs) for runs in (ones, twos))
    share = median(max(run.shares.values()) / run.events for run in twos)
    return {
        "one_worker_events_per_second": round(one),
        "two_workers_events_per_second": round(two),
        "ratio": round(two / one, 2),
        "one_worker_events_per_cpu_second": round(one_cpu),
        "two_workers_events_per_cpu_second": round(two_cpu),
        "cpu_ratio": round(two_cpu / one_cpu, 2),
        "larger_share": round(share, 3),
        **{f"{name}_cpu_us_per_event_one": _us_per_event(ones, name) for name in _SERVERS},
        **{f"{name}_cpu_us_per_event_two": _us_per_event(twos, name) for name in _SERVERS},
        "worker_cpu_us_per_event_one": _us_per_event(ones, *WORKERS),
        "worker_cpu_us_per_event_two": _us_per_event(twos, *WORKERS),
        "events": ones[0].events,
        "rounds": len(ones),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _us_per_event(runs: Sequence[Run], *names: str) -> float:
    return round(median(sum(run.cpu.get(name, 0.0) for name in names) / run.events * 1e6 for run in runs), 1)


def _pin(pid: int, core: int) -> None:
    """All threads of a process to one core; those of later threads follow."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, {core})


def say(text: str) -> None:
    print(f"{'scale':>10}  {time.monotonic() - _BEGIN:5.1f} s  {text}", file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(title="One worker and two", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--events", type=int, help=f"events of a backlog; else {FULL.events:,}")
    parser.add_argument("--rounds", type=int, help=f"times that each is measured; else {FULL.rounds}")
    parser.add_argument("--work", type=Path, help="folder for data and logs, kept; else a scratch folder")
    parser.add_argument("--quick", action="store_true", help="a small backlog, once, within a minute")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    plan = Plan(arguments.events or plan.events, arguments.rounds or plan.rounds)
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-scale-") as scratch:
            result = run(plan, arguments.work or Path(scratch))
    except RecommenderError as error:
        print(f"benchmarks.scale: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result | {"quick": arguments.quick}))
    else:
        print_result(result, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
