"""One worker and two: `python -m benchmarks.scale [--events N] [--rounds N] [--quick] [--json]`. Needs KAFKA_HOME.

A group of one worker and a group of two, each with a project of its own, read the same six partitions. All stand still
(SIGSTOP) while a backlog is sent; then the one takes it, then the two, at once. Where the cores are shared, with Kafka,
Redis and each other, that measures the cores, too; so a second backlog is taken by the one, and by each of the two in
turn, all on one core and the others standing still: the slower of the two says how long both would take, each on a
core of its own. Figures: benchmarks/scale.md. Invariant: both groups take the same messages, with all rows in memory.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import stream_readings as readings
from benchmarks.command import Command, plan_of
from benchmarks.ingest import post
from benchmarks.plain_load import PlainConfig, plain_events
from benchmarks.stream_cluster import PARTITIONS, WORKERS, Cluster, running_cluster
from core.errors import StageTimeoutError
from core.kafka import KafkaProducer
from features.stores.online import OnlineStore

SOLO = "streams-solo"
_PROJECT = "solo"
_USERS = 20_000
# A worker that stands still is no dead one.
_SESSION_MS = 180_000
_MARKER_MS = 50
_SETTLE_SECONDS = 600.0
_POLL_SECONDS = 0.01
_SERVERS = ("kafka", "redis")
_BUFFERED = "headrace_streams_event_log_buffered"
_BEGIN = time.monotonic()


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    events: int
    rounds: int


FULL, QUICK = Plan(80_000, rounds=4), Plan(15_000, rounds=2)


@dataclass(frozen=True)
class Run:
    """One backlog, or one worker's part of it."""

    events: int
    seconds: float
    # CPU seconds by process, until the event log, too, has everything.
    cpu: dict[str, float]


@dataclass(frozen=True)
class Round:
    """What one round has measured: two backlogs."""

    one: Run
    both: Run
    one_again: Run
    in_turn: tuple[Run, Run]


class Scale:
    """The cluster, and the backlogs that are sent to it."""

    def __init__(self, cluster: Cluster, store: OnlineStore, solo_store: OnlineStore) -> None:
        self._cluster, self._store, self._solo_store = cluster, store, solo_store
        self._processes = {name: psutil.Process(cluster.pid(name)) for name in (SOLO, *WORKERS, *_SERVERS)}
        self._partitions = self._wait_for_shares()
        self._sent = 0
        for name in (SOLO, *WORKERS):
            # By the cluster first: what watches over processes would take them for dead.
            cluster.freeze(name)

    def round(self, events: int, *, one_first: bool) -> Round:
        """Two backlogs of so many events."""
        self._backlog(events)
        if one_first:
            one, both = self._let(SOLO), self._let(*WORKERS)
        else:
            both, one = self._let(*WORKERS), self._let(SOLO)
        self._backlog(events)
        if one_first:
            one_again, in_turn = self._let(SOLO), self._in_turn()
        else:
            in_turn, one_again = self._in_turn(), self._let(SOLO)
        return Round(one, both, one_again, in_turn)

    def _in_turn(self) -> tuple[Run, Run]:
        return self._let(WORKERS[0]), self._let(WORKERS[1])

    def release(self) -> None:
        """All go on, and are watched over again."""
        for name in (SOLO, *WORKERS):
            self._cluster.thaw(name)

    def _backlog(self, events: int) -> None:
        """Sends events to workers that stand still."""
        producer = KafkaProducer(
            self._cluster.quiet_kafka, linger_ms=5, queue_max=1_000_000, delivery_timeout_ms=60_000
        )
        config = PlainConfig(events, _USERS, zipf=0.0, seed=self._sent)
        for event in plain_events(config, int(time.time() * 1000), 0.1):
            post(producer, self._cluster.topics.events, event)
        producer.close(60)
        self._sent += events

    def _let(self, *workers: str) -> Run:
        """Lets these workers take what there is in their partitions; all others stand still."""
        store = self._solo_store if workers == (SOLO,) else self._store
        partitions = set.union(*(self._partitions[worker] for worker in workers))
        ends = {where: end for where, end in readings.ends(self._cluster).items() if where[1] in partitions}
        events = _missing(store, ends)
        names = (*workers, *_SERVERS)
        cpu, begin = self._cpu(names), time.perf_counter()
        # Who is alone is on the first core, whichever worker it is: cores differ in what else they do.
        for worker, core in zip(workers, sorted(os.sched_getaffinity(0)), strict=False):
            _pin(self._cluster.pid(worker), core)
            self._processes[worker].resume()
        while _missing(store, ends):
            if time.perf_counter() > begin + _SETTLE_SECONDS:
                raise StageTimeoutError("streams", f"{' and '.join(workers)} do not come to the end of the topics")
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - begin
        while any(self._cluster.metrics(worker)[_BUFFERED] for worker in workers):
            time.sleep(_POLL_SECONDS)
        after = self._cpu(names)
        for worker in workers:
            self._processes[worker].suspend()
        run = Run(events, seconds, {name: after[name] - cpu[name] for name in names})
        say(f"{' and '.join(workers)}: {events:,} events in {seconds:.2f} s, CPU seconds {_rounded(run.cpu)}")
        return run

    def _wait_for_shares(self) -> dict[str, set[int]]:
        """The partitions of each worker, as soon as the two have three each."""
        limit = time.monotonic() + _SETTLE_SECONDS
        while True:
            shares = {worker: self._cluster.partitions_of(worker) for worker in WORKERS}
            if all(len(share) == PARTITIONS // 2 for share in shares.values()):
                break
            if time.monotonic() > limit:
                raise StageTimeoutError("kafka", "the two workers do not share the partitions evenly")
            time.sleep(_POLL_SECONDS)
        for worker in (SOLO, *WORKERS):
            self._cluster.wait_ready(worker)
        return {SOLO: set(range(PARTITIONS)), **shares}

    def _cpu(self, names: Sequence[str]) -> dict[str, float]:
        times = {name: self._processes[name].cpu_times() for name in names}
        return {name: float(one.user + one.system) for name, one in times.items()}


def _missing(store: OnlineStore, ends: Mapping[tuple[int, int], int]) -> int:
    """How many messages the markers are behind the ends."""
    markers = store.read_markers(range(PARTITIONS))
    return sum(end - markers[where[1]].get(where, -1) for where, end in ends.items())


def run(plan: Plan, home: Path) -> dict[str, Any]:
    """The rounds, after one that brings all rows into memory."""
    solo = {
        "HEADRACE_STREAMS__GROUP_ID": "solo",
        "HEADRACE_FEATURES__PROJECT": _PROJECT,
        "HEADRACE_STREAMS__EVENT_LOG_PATH": str(home / "event_log_solo"),
    }
    names = (SOLO, *WORKERS)
    with (
        running_cluster(
            home, names, own={SOLO: solo}, session_timeout_ms=_SESSION_MS, marker_interval_ms=_MARKER_MS
        ) as cluster,
        closing(cluster.store()) as store,
        closing(OnlineStore(cluster.settings.redis, _PROJECT)) as solo_store,
    ):
        scale = Scale(cluster, store, solo_store)
        try:
            say("the first round is not counted")
            scale.round(plan.events, one_first=True)
            rounds = [scale.round(plan.events, one_first=number % 2 == 0) for number in range(plan.rounds)]
        finally:
            scale.release()
    return summary(rounds)


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds. Microseconds are CPU time per event of the backlog."""
    one = median(of.one.events / of.one.seconds for of in rounds)
    both = median(of.both.events / of.both.seconds for of in rounds)
    alone = median(of.one_again.events / of.one_again.cpu[SOLO] for of in rounds)
    slower = median(of.one_again.events / _slower(of) for of in rounds)
    turns = median(of.one_again.seconds / max(half.seconds for half in of.in_turn) for of in rounds)
    return {
        "one_worker_events_per_second": round(one),
        "two_workers_events_per_second": round(both),
        "ratio": round(median(of.one.seconds / of.both.seconds for of in rounds), 2),
        "one_worker_events_per_cpu_second": round(alone),
        "two_workers_events_per_cpu_second": round(slower),
        "cpu_ratio": round(median(of.one_again.cpu[SOLO] / _slower(of) for of in rounds), 2),
        "in_turn_ratio": round(turns, 2),
        "larger_share": round(max(half.events / of.one_again.events for of in rounds for half in of.in_turn), 3),
        "one_worker_cpu_us": _cpu_us([of.one for of in rounds], SOLO),
        "two_workers_cpu_us": _cpu_us([of.both for of in rounds], *WORKERS),
        "redis_cpu_us": _cpu_us([of.both for of in rounds], "redis"),
        "kafka_cpu_us": _cpu_us([of.both for of in rounds], "kafka"),
        "events": rounds[0].one.events,
        "rounds": len(rounds),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _slower(of: Round) -> float:
    """CPU seconds of the worker that needed more of them for its part."""
    return max(half.cpu[worker] for half, worker in zip(of.in_turn, WORKERS, strict=True))


def _cpu_us(runs: Sequence[Run], *names: str) -> float:
    return round(median(sum(run.cpu[name] for name in names) / run.events * 1e6 for run in runs), 1)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items()}


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
    command = Command("scale", __doc__, "small backlogs, twice")
    command.add("--events", type=int, help=f"events of a backlog; else {FULL.events:,}")
    command.add("--rounds", type=int, help=f"times that each is measured; else {FULL.rounds}")
    command.add_work()
    return command.run(lambda given, work: run(plan_of(given, FULL, QUICK, "events", "rounds"), work), print_result)


if __name__ == "__main__":
    sys.exit(main())
