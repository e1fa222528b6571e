"""Swaps under load: `python -m benchmarks.swap [--quick] [--json]`.

`python -m ranker` answers four callers while the registry's CURRENT moves 20 times in 60 s between sound bundles, and
then names 20 that are corrupt or do not fit. Figures: benchmarks/swap.md. Invariant: an answer counts as mixed when
its scores are not those of the bundle that it names.
"""

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from benchmarks.ranker_bench import Change, Shop, call_for, percentile, running_ranker
from core.bundle import (
    CALIBRATION,
    ITEM_STATS,
    ITEM_VECTORS,
    ITEMS,
    MANIFEST,
    RANKER,
    RANKER_CONFIG,
    open_bundle,
    promote_version,
)
from core.clock import SystemClock
from core.settings import Settings, load_settings
from headrace.v1.ranker_service_pb2 import RankCandidatesRequest, RankCandidatesResponse
from ranker.model import load_ranker, save_ranker
from ranker.release import load_release, score_jobs
from ranker.requests import jobs_of

_CALLERS = 4
_TOLERANCE = 1e-3
_POLL_SECONDS, _PATIENCE_SECONDS = 0.02, 30.0


@dataclass(frozen=True)
class Plan:
    """How often, over how long."""

    swaps: int
    bad_bundles: int
    seconds: float
    idle_seconds: float
    items: int


FULL = Plan(20, 20, 60, 20, 20_000)
QUICK = Plan(4, 7, 12, 4, 5_000)


@dataclass(frozen=True)
class Figures:
    """What came of it."""

    swaps: int
    answers: int
    failed: int
    mixed_versions: int
    bad_bundles: int
    bad_bundles_refused: int
    # Answers and failures while the bad bundles were CURRENT.
    bad_bundles_answers: int
    bad_bundles_failed: int
    # Without any swap, and of the calls that began while one was under way.
    p99_idle_ms: float
    p99_swap_ms: float
    p99_bad_bundles_ms: float
    swap_seconds_p50: float


def main() -> int:
    command = Command("swap", __doc__, "fewer swaps, smaller bundles")
    return command.run(_measure, print_result, asdict)


def _measure(given: argparse.Namespace, registry: Path) -> Figures:
    torch.set_num_threads(1)
    return asyncio.run(Swaps(registry, load_settings(), QUICK if given.quick else FULL).run())


def print_result(figures: Figures, console: Console) -> None:
    table = Table(title=f"{figures.swaps} swaps under load, {_CALLERS} callers")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in asdict(figures).items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)


class Swaps:
    """The bundles, the callers, and who moves CURRENT."""

    def __init__(self, registry: Path, settings: Settings, plan: Plan) -> None:
        self._registry, self._settings, self._plan = registry, settings, plan
        self._shop = Shop(settings, plan.items)
        self._requests = self._shop.requests(16)
        # When a swap was asked for and when it was there.
        self._windows: list[tuple[float, float]] = []

    async def run(self) -> Figures:
        plan = self._plan
        for number in range(2):
            self._shop.publish(self._registry, f"good-{number}", seed=number, promote=number == 0)
        expected = self._expected()
        bad = [self._bad(number) for number in range(plan.bad_bundles)]
        with running_ranker(self._registry, HEADRACE_REGISTRY__WATCH_INTERVAL_MS="100") as (target, page):
            await self._traffic(target, 1.0, expected)
            idle = await self._traffic(target, plan.idle_seconds, expected)
            swapping = asyncio.create_task(self._swap_all(page))
            busy = await self._traffic(target, plan.seconds, expected, swapping)
            await swapping
            before = _refused(page("/metrics"))
            refusing = asyncio.create_task(self._name_bad(bad, page))
            troubled = await self._traffic(target, plan.seconds / 2, expected, refusing)
            await refusing
            refused = round(_refused(page("/metrics")) - before)
        during = [ms for began, ms in busy.calls if self._is_during_swap(began, began + ms / 1000)]
        return Figures(
            swaps=len(self._windows),
            answers=len(busy.calls),
            failed=busy.failed,
            mixed_versions=idle.mixed + busy.mixed + troubled.mixed,
            bad_bundles=len(bad),
            bad_bundles_refused=refused,
            bad_bundles_answers=len(troubled.calls),
            bad_bundles_failed=troubled.failed,
            p99_idle_ms=percentile([ms for _, ms in idle.calls], 99),
            p99_swap_ms=percentile(during, 99),
            p99_bad_bundles_ms=percentile([ms for _, ms in troubled.calls], 99),
            swap_seconds_p50=percentile([end - start for start, end in self._windows], 50),
        )

    def _is_during_swap(self, began: float, ended: float) -> bool:
        return any(began <= end and ended >= start for start, end in self._windows)

    def _expected(self) -> dict[str, list[np.ndarray]]:
        """Scores of each request by each good bundle, computed here."""
        scores: dict[str, list[np.ndarray]] = {}
        for number in range(2):
            version = f"good-{number}"
            release = load_release(open_bundle(self._registry / version), self._settings, SystemClock())
            jobs = [jobs_of(RankCandidatesRequest.FromString(raw), release, 0)[0] for raw in self._requests]
            scores[version] = [one.score for one in score_jobs(jobs, self._settings)]
        return scores

    async def _traffic(
        self,
        target: str,
        seconds: float,
        expected: dict[str, list[np.ndarray]],
        beside: "asyncio.Task[None] | None" = None,
    ) -> "_Traffic":
        """For so long, and as long as what runs beside it."""
        traffic = _Traffic(expected)
        traffic.failed = await call_for(target, self._requests, _CALLERS, seconds, traffic.take)
        while beside is not None and not beside.done():
            traffic.failed += await call_for(target, self._requests, _CALLERS, 1.0, traffic.take)
        return traffic

    async def _swap_all(self, page: Callable[[str], str]) -> None:
        """Moves CURRENT to and fro between two contents."""
        every = self._plan.seconds / (self._plan.swaps + 1)
        start = time.monotonic()
        for number in range(self._plan.swaps):
            await asyncio.sleep(max(0.0, start + every * (number + 0.5) - time.monotonic()))
            version = f"swap-{number}"
            # A version of its own each time: one that is loaded already would be no swap.
            await asyncio.to_thread(self._alias, f"good-{(number + 1) % 2}", version)
            before = _loads(page("/metrics"))
            began = time.monotonic()
            promote_version(self._registry, version)
            await asyncio.to_thread(_wait_for, lambda: _loads(page("/metrics")) > before, _PATIENCE_SECONDS)  # noqa: B023
            self._windows.append((began, time.monotonic()))

    def _alias(self, source: str, version: str) -> None:
        """The same content under another name."""
        folder = self._registry / version
        shutil.copytree(self._registry / source, folder)
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        (folder / MANIFEST).write_text(json.dumps(manifest | {"bundle_version": version}), "utf-8")

    async def _name_bad(self, bad: list[str], page: Callable[[str], str]) -> None:
        every = self._plan.seconds / 2 / (len(bad) + 1)
        start = time.monotonic()
        for number, version in enumerate(bad):
            await asyncio.sleep(max(0.0, start + every * number - time.monotonic()))
            before = _refused(page("/metrics"))
            promote_version(self._registry, version)
            await asyncio.to_thread(_wait_for, lambda: _refused(page("/metrics")) > before, _PATIENCE_SECONDS)  # noqa: B023

    def _bad(self, number: int) -> str:
        """A bundle that must not serve."""
        faults: list[tuple[str, Change | None, Callable[[Path], None] | None]] = [
            ("flipped-ranker", None, _flip(RANKER)),
            ("flipped-items", None, _flip(ITEMS)),
            ("cut-vectors", None, _cut(ITEM_VECTORS)),
            ("missing-statistics", None, lambda folder: (folder / ITEM_STATS).unlink()),
            ("other-signature", _other_signature, None),
            ("not-finite", _not_finite, None),
            ("broken-manifest", None, _write(MANIFEST, "{")),
            ("no-calibration", _write(CALIBRATION, "[]"), None),
        ]
        name, change, after = faults[number % len(faults)]
        version = f"bad-{number:02}-{name}"
        bundle = self._shop.publish(self._registry, version, seed=0, promote=False, change=change)
        if after is not None:
            after(bundle.path)
        return version


class _Traffic:
    """Answers, and which of them were not what they said they were."""

    def __init__(self, expected: dict[str, list[np.ndarray]]) -> None:
        self._expected = expected
        self.calls: list[tuple[float, float]] = []
        self.mixed = self.failed = 0

    def take(self, answer: RankCandidatesResponse, began: float, took_ms: float) -> None:
        self.calls.append((began, took_ms))
        scores = np.fromiter(answer.users[0].scores, np.float32)
        number = answer.bundle_version.removeprefix("good-")
        if answer.bundle_version.startswith("swap-"):
            number = str((int(answer.bundle_version.removeprefix("swap-")) + 1) % 2)
        expected = self._expected.get(f"good-{number}", [])
        # Which of the requests it was is not said: the scores of all of them differ.
        self.mixed += not any(np.abs(scores - one).max() < _TOLERANCE for one in expected)


def _flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / name).write_bytes(raw)

    return change


def _cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-100])

    return change


def _write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text, "utf-8")

    return change


def _other_signature(folder: Path) -> None:
    config = json.loads((folder / RANKER_CONFIG).read_text("utf-8"))
    (folder / RANKER_CONFIG).write_text(json.dumps(config | {"feature_signature": "0" * 16}), "utf-8")


def _not_finite(folder: Path) -> None:
    model = load_ranker(folder)
    with torch.no_grad():
        model.heads.weight.fill_(float("nan"))
    save_ranker(model, folder)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Until it holds, on a thread of its own."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _loads(metrics: str) -> float:
    return _sample(metrics, 'headrace_ranker_bundle_loads_total{outcome="loaded"}')


def _refused(metrics: str) -> float:
    return _sample(metrics, 'headrace_ranker_bundle_loads_total{outcome="refused"}')


def _sample(metrics: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
