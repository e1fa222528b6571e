"""What an event costs: `python -m benchmarks.ingest [--events N] [--quick] [--json]`. Needs KAFKA_HOME.

One worker reads events from a real Kafka and writes a real Redis and the event log, all on this machine: CPU time per
event (which other load on shared cores inflates), beside bare consumers of the same topic; then, with the candidate
service, how long users wait for their vectors. Each load is sent several times, to a worker that has just started, and
medians are told. Figures: benchmarks/streams.md. Invariant: CPU is that of the whole process, from the first event
sent until markers and event log have the last one.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command, plan_of
from benchmarks.plain_load import PlainConfig, paced, plain_events
from benchmarks.stream_cluster import Cluster, running_cluster
from benchmarks.stream_readings import wait_for_markers
from core.errors import StageTimeoutError
from core.kafka import KafkaProducer
from core.settings import load_settings
from features.stores.online import OnlineStore
from headrace.v1.events_pb2 import Event
from offline.data.simulator import SimulatorConfig, simulate
from offline.train import train

WORKER = "streams-1"
_ZIPF = 1.2
_DIRTY_PER_SECOND = 1000
_SETTLE_SECONDS = 600.0
# A worker with nothing to do needs about 2% of a core.
_IDLE_SECONDS, _IDLE_SHARE = 1.0, 0.1
# While a sweep goes on, somebody is found within this time.
_SWEPT_SECONDS = 3.0
# The towers that serve: the default architecture; how well they are trained does not change what they cost.
_SIMULATED = SimulatorConfig(users=100, items=300, seed=7, end_time_ms=1_780_000_000_000)
_TRAINING = {"offline": {"max_epochs": 1, "ranker_epochs": 1, "ranker_max_rows": 1000, "batch_scores_per_user": 5}}


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    events: int
    users: int
    embedding_seconds: int
    # What is sampled within so many seconds is one figure.
    window_seconds: int
    # Before that the load runs for so long, until it is steady.
    warm_up_seconds: int
    # How often each load is measured.
    rounds: int


FULL = Plan(200_000, users=50_000, embedding_seconds=60, window_seconds=10, warm_up_seconds=10, rounds=3)
QUICK = Plan(15_000, users=4000, embedding_seconds=6, window_seconds=2, warm_up_seconds=1, rounds=1)


@dataclass(frozen=True)
class Cost:
    """Of one load, in microseconds of CPU per event."""

    worker_us: float
    redis_us: float
    kafka_us: float
    events_per_second: float

    @classmethod
    def median(cls, costs: "Sequence[Cost]") -> "Cost":
        """Of each figure by itself."""
        return cls(*(statistics.median(figures) for figures in zip(*map(astuple, costs), strict=True)))


@dataclass(frozen=True)
class Waits:
    """Samples of `oldest_dirty_ms` within one window: most fall between two batches, a few into a pause."""

    median_ms: float
    mean_ms: float
    longest_ms: float

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> "Waits":
        return cls(*(round(f(samples_ms), 1) for f in (statistics.median, statistics.fmean, max)))


def train_serving_bundle(home: Path) -> None:
    """A release with towers of the size that serves by default, in home/bundles."""
    simulate(_SIMULATED, home / "dataset")
    train(home / "dataset", home / "bundles", load_settings(overrides=_TRAINING), progress=False)


def run(plan: Plan, home: Path) -> dict[str, Any]:
    interval_ms = load_settings().streams.event_log_interval_ms
    with (
        running_cluster(home / "cost", (WORKER,), event_log_interval_ms=interval_ms) as cluster,
        closing(cluster.store()) as store,
    ):
        rounds = [
            [
                _cost(cluster, store, PlainConfig(plan.events, plan.users, zipf, name=f"{name}-{number}", seed=number))
                for name, zipf in (("zipf", _ZIPF), ("uniform", 0.0))
            ]
            for number in range(plan.rounds)
        ]
        zipf, uniform = (Cost.median(costs) for costs in zip(*rounds, strict=True))
        warm = _cost(cluster, store, PlainConfig(plan.events, plan.users, _ZIPF, name="warm"), fresh=False)
        cluster.stop(WORKER)
        bare = {which: _bare(cluster, which, plan.events) for which in ("faust", "batch")}
    say("training a small bundle")
    train_serving_bundle(home / "embeddings")
    # Of its own: the users of all loads before would wait for their vectors, too.
    with (
        running_cluster(home / "embeddings", ("candidate", WORKER), event_log_interval_ms=interval_ms) as cluster,
        closing(cluster.store()) as store,
    ):
        dirty = _dirty(cluster, store, plan)
    return {
        "cpu_us_per_event": round(zipf.worker_us, 1),
        "uniform_cpu_us_per_event": round(uniform.worker_us, 1),
        "redis_cpu_us_per_event": round(zipf.redis_us, 1),
        "events_per_second": round(zipf.events_per_second),
        "bare_faust_events_per_second": bare["faust"]["events_per_second"],
        "bare_consumer_events_per_second": bare["batch"]["events_per_second"],
        "oldest_dirty_ms_first": dirty[0].median_ms,
        "oldest_dirty_ms_last": dirty[-1].median_ms,
        "uniform_redis_cpu_us_per_event": round(uniform.redis_us, 1),
        "uniform_events_per_second": round(uniform.events_per_second),
        "kafka_cpu_us_per_event": round(zipf.kafka_us, 1),
        "bare_faust_cpu_us_per_event": bare["faust"]["cpu_us_per_event"],
        "bare_consumer_cpu_us_per_event": bare["batch"]["cpu_us_per_event"],
        "warm_cpu_us_per_event": round(warm.worker_us, 1),
        "cpu_us_per_event_rounds": [round(costs[0].worker_us, 1) for costs in rounds],
        "uniform_cpu_us_per_event_rounds": [round(costs[1].worker_us, 1) for costs in rounds],
        "oldest_dirty_ms_medians": [window.median_ms for window in dirty],
        "oldest_dirty_ms_means": [window.mean_ms for window in dirty],
        "oldest_dirty_ms_longest": [window.longest_ms for window in dirty],
        "events": plan.events,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _cost(cluster: Cluster, store: OnlineStore, config: PlainConfig, *, fresh: bool = True) -> Cost:
    """Sends a load as fast as Kafka takes it, and waits until the worker has done everything about it."""
    say(f"{config.events:,} events over {config.users:,} users, Zipf {config.zipf}")
    if fresh:
        cluster.stop(WORKER)
        cluster.start(WORKER)
    cluster.wait_ready(WORKER)
    _wait_idle(cluster.pid(WORKER))
    events = plain_events(config, int(time.time() * 1000), 0.1)
    logged = cluster.metrics(WORKER).get(_LOGGED, 0) + config.events
    names = (WORKER, "redis", "kafka")
    before, begin = {name: _cpu_seconds(cluster.pid(name)) for name in names}, time.perf_counter()
    producer = KafkaProducer(cluster.settings.kafka, linger_ms=5, queue_max=1_000_000, delivery_timeout_ms=60_000)
    for event in events:
        post(producer, cluster.topics.events, event)
    producer.close(60)
    if not wait_for_markers(cluster, store, _SETTLE_SECONDS):
        raise StageTimeoutError("streams", "the markers do not reach the end of the topics")
    seconds = time.perf_counter() - begin
    while cluster.metrics(WORKER).get(_LOGGED, 0) < logged:
        time.sleep(0.1)
    worker, redis, kafka = ((_cpu_seconds(cluster.pid(name)) - before[name]) / config.events * 1e6 for name in names)
    return Cost(worker, redis, kafka, config.events / seconds)


def wait_for_vectors(cluster: Cluster) -> None:
    """Returns when nobody waits for a vector and no sweep finds anybody, which it does a few users at a time."""
    seen = -1.0
    while True:
        metrics = cluster.metrics(WORKER)
        encoded = metrics.get(_ENCODED, 0.0)
        if encoded == seen and not metrics["headrace_streams_dirty_users"]:
            return
        seen = encoded
        time.sleep(_SWEPT_SECONDS)


_ENCODED = "headrace_streams_users_encoded_total"
_LOGGED, _OLDEST_DIRTY = "headrace_streams_event_log_rows_total", "headrace_streams_oldest_dirty_ms"


def _bare(cluster: Cluster, which: str, events: int) -> dict[str, float]:
    say(f"bare consumer: {which}")
    command = [sys.executable, "-m", "benchmarks.bare_consumers", which]
    arguments = [cluster.settings.kafka.bootstrap_servers, cluster.topics.events, str(events)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageTimeoutError(
            "kafka", f"the bare consumer {which} did not read {events} events: {done.stderr[-500:]}"
        )
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def _dirty(cluster: Cluster, store: OnlineStore, plan: Plan) -> list[Waits]:
    """How long the longest waiting user has waited, in each window of a steady load."""
    cluster.wait_ready("candidate")
    _cost(cluster, store, PlainConfig(plan.events, plan.users, _ZIPF), fresh=False)
    say("waiting for their vectors")
    wait_for_vectors(cluster)
    say(f"{_DIRTY_PER_SECOND:,} events/s for {plan.embedding_seconds} s, embeddings on")
    count = (plan.warm_up_seconds + plan.embedding_seconds) * _DIRTY_PER_SECOND
    # The same users: a history that is just filling costs more to encode from second to second.
    config = PlainConfig(count, plan.users, _ZIPF, seed=plan.rounds)
    events = plain_events(config, int(time.time() * 1000), 1000 / _DIRTY_PER_SECOND)
    producer = KafkaProducer(cluster.settings.kafka)
    sender = threading.Thread(
        target=paced, args=(events, _DIRTY_PER_SECOND, lambda event: post(producer, cluster.topics.events, event))
    )
    begin, samples = time.monotonic() + plan.warm_up_seconds, []
    sender.start()
    while sender.is_alive():
        samples.append((time.monotonic() - begin, cluster.metrics(WORKER)[_OLDEST_DIRTY]))
        time.sleep(0.1)
    producer.close()
    windows = range(plan.embedding_seconds // plan.window_seconds)
    return [Waits.of([ms for at, ms in samples if at // plan.window_seconds == window]) for window in windows]


def post(producer: KafkaProducer, topic: str, event: Event) -> None:
    while not producer.post(topic, event.user_id.encode(), event.SerializeToString()):
        time.sleep(0.01)


def _wait_idle(pid: int) -> None:
    """A new worker reads what the item-stats topic has kept first: no cost of the events to come."""
    before = _cpu_seconds(pid)
    while True:
        time.sleep(_IDLE_SECONDS)
        now = _cpu_seconds(pid)
        if now - before < _IDLE_SHARE * _IDLE_SECONDS:
            return
        before = now


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def say(text: str) -> None:
    print(f"{'ingest':>10}  {text}", file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(title="What an event costs", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), str(value) if isinstance(value, list) else f"{value:,}")
    console.print(table)


def main() -> int:
    command = Command("ingest", __doc__, "fewer events and users")
    command.add("--events", type=int, help=f"of each load; else {FULL.events:,}")
    command.add_work()
    return command.run(lambda given, work: run(plan_of(given, FULL, QUICK, "events"), work), print_result)


if __name__ == "__main__":
    sys.exit(main())
