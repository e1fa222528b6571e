"""The crash test: `python -m benchmarks.crash [--events N] [--seed S] [--quick] [--json]`.

A load on real Kafka and Redis while workers, broker and Redis are killed; at the end everything is compared with one
undisturbed pass over what Kafka holds. Needs KAFKA_HOME. Figures: benchmarks/crash.md. Invariant: exit code 0 only
when nothing differs.
"""

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import stream_readings as readings
from benchmarks import stream_truth
from benchmarks.command import Command, plan_of
from benchmarks.crash_schedule import Blow, Blows, Striker, schedule
from benchmarks.stream_cluster import WORKERS, Cluster, MarkerWatch, running_cluster, train_bundle
from benchmarks.stream_load import LoadConfig, Sent, StreamLoad
from benchmarks.stream_readings import Differences
from benchmarks.stream_truth import SinglePass
from core.errors import StageTimeoutError
from core.kafka import KafkaProducer
from core.settings import load_settings
from core.telemetry import configure_logging

_EVENTS_PER_USER = 40
# The broker may be away for seconds; a message waits that out.
_DELIVERY_TIMEOUT_MS = 120_000
_PACE_SECONDS = 0.02
_SETTLE_SECONDS = 180.0
_SHOWN = 5
_BEGIN = time.monotonic()


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    events: int
    kills: int
    freezes: int
    pause_seconds: tuple[float, float]
    # Over how long the load is spread: most of the blows fall into it.
    load_seconds: float
    # What else is struck, and whether it is measured how long partitions stand still.
    also: tuple[Blow, ...]
    closely: bool


FULL = Plan(
    200_000,
    kills=10,
    freezes=2,
    pause_seconds=(0.5, 9.0),
    load_seconds=200,
    also=(Blow.BROKER, Blow.REDIS, Blow.REDIS_OLDER),
    closely=True,
)
QUICK = Plan(
    12_000,
    kills=1,
    freezes=1,
    pause_seconds=(0.3, 1.0),
    load_seconds=15,
    also=(Blow.BROKER, Blow.REDIS_OLDER),
    closely=False,
)


class Feeder:
    """Sends a load at a steady pace, on a thread of its own."""

    def __init__(self, cluster: Cluster, load: StreamLoad, seconds: float) -> None:
        self._producer = KafkaProducer(
            cluster.quiet_kafka, linger_ms=2, delivery_timeout_ms=_DELIVERY_TIMEOUT_MS, queue_max=1_000_000
        )
        self._load, self._rate = load, load.config.messages / seconds
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Returns when Kafka has everything."""
        self._thread.join()
        undelivered = self._producer.flush(_DELIVERY_TIMEOUT_MS / 1000)
        self._producer.close()
        if undelivered:
            raise StageTimeoutError("kafka", f"{undelivered} messages were not taken")

    def _run(self) -> None:
        begin = time.monotonic()
        for sent, message in enumerate(self._load, start=1):
            self._send(message)
            while sent > (time.monotonic() - begin) * self._rate:
                time.sleep(_PACE_SECONDS)

    def _send(self, message: Sent) -> None:
        while not self._producer.post(message.topic, message.key, message.value, message.headers):
            time.sleep(_PACE_SECONDS)


@dataclass
class Result:
    """What was done and what came of it."""

    events: int
    blows: Blows
    differences: Differences
    settle_seconds: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        still = self.blows.stand_still
        return {
            "events": self.events,
            "kills": self.blows.worker_kills,
            **asdict(self.differences),
            "freezes": self.blows.count(Blow.FREEZE),
            "broker_kills": self.blows.count(Blow.BROKER),
            "redis_kills": self.blows.count(Blow.REDIS, Blow.REDIS_OLDER),
            **_spread("dead_partitions_still_seconds", still.dead),
            **_spread("other_partitions_still_seconds", still.others),
            "settle_seconds": round(self.settle_seconds, 1),
            "seconds": round(self.seconds, 1),
        }


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_p50": round(median(values), 2), f"{name}_max": round(max(values), 2)} if values else {}


def run(plan: Plan, seed: int, home: Path) -> Result:
    """The whole test below `home`."""
    begin = time.monotonic()
    say("training a small bundle")
    bundle = train_bundle(home)
    with running_cluster(home) as cluster:
        config = LoadConfig(plan.events, users=max(10, plan.events // _EVENTS_PER_USER), seed=seed)
        load = StreamLoad(config, cluster.topics, list(bundle.items()))
        with _watching(cluster) as watch:
            say(f"sending {plan.events:,} messages over {plan.load_seconds:.0f} s")
            feeder = Feeder(cluster, load, plan.load_seconds)
            striker = Striker(cluster, watch, seed, say, closely=plan.closely)
            blows = striker.run(schedule(plan.kills, plan.freezes, seed, plan.also), plan.pause_seconds)
            feeder.finish()
        truth = _single_pass(cluster, load)
        settled = time.monotonic()
        _settle(cluster, truth)
        settle_seconds = time.monotonic() - settled
        differences = _compare(cluster, truth)
        events = len(truth.valid) + len(truth.malformed)
        if events != plan.events:
            say(f"Kafka holds {events:,} messages, {plan.events:,} were sent")
        return Result(events, blows, differences, settle_seconds, time.monotonic() - begin)


def _single_pass(cluster: Cluster, load: StreamLoad) -> SinglePass:
    truth = SinglePass(
        cluster.settings.features,
        cluster.topics,
        cluster.sources,
        lambda logged: (logged.place.topic, logged.key, logged.value) in load.malformed,
    )
    for topic in cluster.topics.user_keyed:
        for logged in readings.read_topic(cluster, topic):
            truth.add(logged)
    say(f"one pass: {len(truth.states):,} users, {len(truth.valid):,} valid, {len(truth.malformed):,} malformed")
    return truth


def _settle(cluster: Cluster, truth: SinglePass) -> None:
    """Waits until the workers are done, as far as can be seen from outside, and stops them."""
    store = cluster.store()
    try:
        for worker in WORKERS:
            cluster.wait_ready(worker)
        if not readings.wait_for_markers(cluster, store, _SETTLE_SECONDS):
            say("the markers do not reach the end of the topics")
        say("the markers are at the end of the topics, waiting for the vectors")
        limit = time.monotonic() + _SETTLE_SECONDS
        while stale := readings.stale_vectors(cluster, store, truth, encode=False):
            if time.monotonic() > limit:
                say(f"{len(stale):,} vectors stay old")
                break
            time.sleep(1)
        for worker in WORKERS:
            cluster.stop(worker)
    finally:
        store.close()


def _compare(cluster: Cluster, truth: SinglePass) -> Differences:
    store = cluster.store()
    try:
        users = readings.user_mismatches(store, truth)
        items = readings.item_mismatches(store, truth)
        stale = readings.stale_vectors(cluster, store, truth, encode=True)
    finally:
        store.close()
    for what, wrong in (("user", users), ("item", items)):
        for key, differences in sorted(wrong.items())[:_SHOWN]:
            say(f"{what} {key}: {'; '.join(differences)}")
    missing, doubled, foreign = stream_truth.log_differences(readings.logged_places(cluster), truth.valid)
    letters = stream_truth.letter_differences(readings.dead_letters(cluster), truth.malformed)
    return Differences(len(users), len(items), len(stale), letters, missing, doubled, foreign)


@contextmanager
def _watching(cluster: Cluster) -> Iterator[MarkerWatch]:
    watch = MarkerWatch(cluster)
    try:
        yield watch
    finally:
        watch.stop()


def say(text: str) -> None:
    print(f"{'crash':>10}  {time.monotonic() - _BEGIN:5.1f} s  {text}", file=sys.stderr, flush=True)


def print_result(result: Result, console: Console) -> None:
    table = Table(title="Crash test", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.as_dict().items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)


def main() -> int:
    command = Command("crash", __doc__, "fewer events and kills")
    command.add("--events", type=int, help=f"messages to send; else {FULL.events:,}")
    command.add("--seed", type=int, default=7, help="of the load and of the blows")
    command.add_work()
    return command.run(_measure, print_result, Result.as_dict, lambda result: result.differences.total == 0)


def _measure(given: argparse.Namespace, work: Path) -> Result:
    configure_logging(load_settings().telemetry, "benchmarks")
    return run(plan_of(given, FULL, QUICK, "events"), given.seed, work)


if __name__ == "__main__":
    sys.exit(main())
