"""What ranking costs: `python -m benchmarks.rank [--quick] [--json]`.

500 candidates, a history of 50, 20,000 items, one intra-op thread, on a CPU: the model alone, then `python -m ranker`
over gRPC with one caller, with eight, and with many, batching on and off. Figures: benchmarks/rank.md. Invariant: the
bare model and the service score the same requests with the same bundle.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.command import Command
from benchmarks.ranker_bench import CANDIDATES, HISTORY, ITEMS, T0_MS, Shop, call_for, percentile, running_ranker
from core.bundle import open_current
from core.clock import ManualClock
from core.settings import Settings, load_settings
from features.vectors import RankerInput, ranker_input
from headrace.v1.ranker_service_pb2 import RankCandidatesRequest
from ranker.release import Release, UserJob, load_release, score_jobs
from ranker.requests import jobs_of

_CALLERS, _MANY_CALLERS = 8, 16
_WARM_UP = 50


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    model_calls: int
    seconds: float


@dataclass(frozen=True)
class Figures:
    """Times in milliseconds."""

    candidates: int
    history: int
    items: int
    # One user: the network and its calibration on ready inputs.
    model_p50_ms: float
    model_p99_ms: float
    # One user: looking up the items and making the features.
    features_p50_ms: float
    # Eight users at once, per user: the network alone, and with the features as the service makes them.
    model_8_users_p50_ms: float
    bare_8_users_p50_ms: float
    service_p50_ms: float
    service_p99_ms: float
    service_8_callers_p50_ms: float
    service_8_callers_p99_ms: float
    service_8_callers_ms_per_request: float
    # Time per request at 8 callers over the bare model (network and calibration in batches of 8, its inputs for free);
    # and over the same work without a service (features, too).
    overhead_ratio_8_callers: float
    overhead_ratio_8_callers_with_features: float
    form: str
    max_wait_ms: float
    rps_batched: float
    rps_unbatched: float
    failed: int


def main() -> int:
    command = Command("rank", __doc__, "fewer calls")
    command.add("--max-wait-ms", type=float, help="ranker.max_wait_ms; else that of the settings")
    return command.run(_measure, lambda figures, console: console.print(_table(figures)), asdict)


def _measure(given: argparse.Namespace, registry: Path) -> Figures:
    torch.set_num_threads(1)
    wait = {} if given.max_wait_ms is None else {"ranker": {"max_wait_ms": given.max_wait_ms}}
    settings = load_settings(overrides=wait)
    shop = Shop(settings)
    shop.publish(registry, "v1")
    return measure(registry, shop.requests(), settings, Plan(200, 4) if given.quick else Plan(1000, 15))


def measure(registry: Path, requests: list[bytes], settings: Settings, plan: Plan) -> Figures:
    release = load_release(open_current(registry), settings, ManualClock(T0_MS))
    jobs = [jobs_of(RankCandidatesRequest.FromString(raw), release, T0_MS)[0] for raw in requests]
    inputs = [_input(job, release, settings) for job in jobs]
    vectors = [job.user_vector for job in jobs]
    count = len(jobs)

    def model(users: int) -> Callable[[int], object]:
        def call(number: int) -> object:
            start = number % (count - users + 1)
            return release.scorer.score(inputs[start : start + users], vectors[start : start + users])

        return call

    def whole(number: int) -> object:
        start = number % (count - _CALLERS + 1)
        return score_jobs(jobs[start : start + _CALLERS], settings)

    alone = _times(model(1), plan.model_calls)
    features = _times(lambda number: _input(jobs[number % count], release, settings), plan.model_calls)
    eight = percentile(_times(model(_CALLERS), plan.model_calls // 4), 50) / _CALLERS
    bare = percentile(_times(whole, plan.model_calls // 4), 50) / _CALLERS
    wait = {"HEADRACE_RANKER__MAX_WAIT_MS": str(settings.ranker.max_wait_ms)}
    with running_ranker(registry, **wait) as (target, _):
        _load(target, requests, 1, 1.0)
        one = _load(target, requests, 1, plan.seconds)
        many = _load(target, requests, _CALLERS, plan.seconds)
        batched = _load(target, requests, _MANY_CALLERS, plan.seconds)
    with running_ranker(registry, HEADRACE_RANKER__MAX_BATCH_SIZE="1", **wait) as (target, _):
        _load(target, requests, 1, 1.0)
        unbatched = _load(target, requests, _MANY_CALLERS, plan.seconds)
    per_request = 1000 / many.rps
    return Figures(
        candidates=CANDIDATES,
        history=HISTORY,
        items=ITEMS,
        model_p50_ms=percentile(alone, 50),
        model_p99_ms=percentile(alone, 99),
        features_p50_ms=percentile(features, 50),
        model_8_users_p50_ms=eight,
        bare_8_users_p50_ms=bare,
        service_p50_ms=percentile(one.times_ms, 50),
        service_p99_ms=percentile(one.times_ms, 99),
        service_8_callers_p50_ms=percentile(many.times_ms, 50),
        service_8_callers_p99_ms=percentile(many.times_ms, 99),
        service_8_callers_ms_per_request=per_request,
        overhead_ratio_8_callers=per_request / eight,
        overhead_ratio_8_callers_with_features=per_request / bare,
        form=release.scorer.network.form,
        max_wait_ms=settings.ranker.max_wait_ms,
        rps_batched=batched.rps,
        rps_unbatched=unbatched.rps,
        failed=one.failed + many.failed + batched.failed + unbatched.failed,
    )


@dataclass(frozen=True)
class _Load:
    times_ms: list[float]
    rps: float
    failed: int


def _load(target: str, requests: list[bytes], callers: int, seconds: float) -> _Load:
    times_ms: list[float] = []
    began = time.monotonic()
    failed = asyncio.run(
        call_for(target, requests, callers, seconds, lambda _answer, _began, took_ms: times_ms.append(took_ms))
    )
    return _Load(times_ms, len(times_ms) / (time.monotonic() - began), failed)


def _times(call: Callable[[int], object], count: int) -> list[float]:
    """Milliseconds of each call, after some that do not count."""
    times_ms = []
    for number in range(-_WARM_UP, count):
        began = time.perf_counter()
        call(number)
        if number >= 0:
            times_ms.append((time.perf_counter() - began) * 1000)
    return times_ms


def _input(job: UserJob, release: Release, settings: Settings) -> RankerInput:
    rows = release.catalog.rows(job.item_ids)
    return ranker_input(
        job.state, release.catalog, rows, job.retrieval_scores, job.source_bits, job.now_ms, settings.features
    )


def _table(figures: Figures) -> Table:
    table = Table(title=f"{CANDIDATES} candidates, history of {HISTORY}, {ITEMS:,} items; times in ms")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in asdict(figures).items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    return table


if __name__ == "__main__":
    sys.exit(main())
