"""The fault matrix: `python -m benchmarks.faults [--case NAME] [--quick] [--json]`. Needs KAFKA_HOME.

Every dependency is killed, frozen, slowed down, made flaky and restarted under load, then all at once; each answer is
judged. Figures: benchmarks/faults.md. Invariant: exit code 0 only when no answer failed, was empty, late or wrong, and
every recovery was in time.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from benchmarks.fault_load import Load, Verdict, World
from benchmarks.fault_stack import FaultStack, fault_stack
from benchmarks.fault_table import CASES, Case
from benchmarks.fault_world import make_world
from core.process import freeze_heap
from devstack.backend import EventSender, percentiles

_PER_SECOND = 20.0
# Of each case: undisturbed, then the fault, until the end of `seconds`.
_CALM_SECONDS = 1.0
# A signal or a mode holds at once; requests under way then still got their answers.
_SURE_SECONDS = 0.3
_RECOVERY_SECONDS = 5.0
# What has not recovered by then is not waited for.
_PATIENCE_SECONDS = 30.0
QUICK = ("candidate-slow", "ranker-hanging", "redis-down")
_QUICK_SECONDS = 4.0


@dataclass(frozen=True)
class CaseResult:
    """One line of the matrix."""

    case: str
    answers: int
    failed: int
    empty: int
    late: int
    wrong: int
    # None: not within the patience.
    recovered_seconds: float | None
    tiers: dict[str, int]
    reasons: dict[str, int]
    problems: dict[str, int]
    p50_ms: float | None
    p99_ms: float | None

    @property
    def is_good(self) -> bool:
        recovered = self.recovered_seconds is not None and self.recovered_seconds <= _RECOVERY_SECONDS
        return recovered and not (self.failed or self.empty or self.late or self.wrong)


class Matrix:
    """Runs cases one after the other on one stack."""

    def __init__(self, stack: FaultStack, world: World, probe_users: Sequence[str], seconds: float) -> None:
        self._stack, self._world, self._seconds = stack, world, seconds
        self._probe_users = list(probe_users)

    async def run(self, case: Case) -> CaseResult:
        load = Load(self._stack.serving_address, self._world, case, _PER_SECOND)
        if case.cold_start:
            await self._strike(case)
            await self._stack.restart_serving()
            await load.start()
            load.fault_is_on()
            await asyncio.sleep(self._seconds)
        else:
            await load.start()
            await self._undisturbed(load)
            begin = time.monotonic()
            await asyncio.sleep(_CALM_SECONDS)
            await self._strike(case)
            await asyncio.sleep(_SURE_SECONDS)
            load.fault_is_on()
            await asyncio.sleep(max(0.0, begin + self._seconds - time.monotonic()))
        load.fault_is_over()
        for name, fault in case.faults:
            await self._stack.heal(name, fault)
        back = await self._stack.answering(case.dependencies)
        recovered = await self._recovered(case, load, back)
        return _result(case, await load.stop(), recovered)

    async def _undisturbed(self, load: Load) -> None:
        """The case before may still be felt by a process or two; a fault is made on a good day."""
        if await load.ranked_again(time.monotonic(), _PATIENCE_SECONDS) is None:
            _say("not RANKED before the fault")
        load.verdict = Verdict()

    async def _strike(self, case: Case) -> None:
        await asyncio.gather(*(self._stack.strike(name, fault) for name, fault in case.faults))

    async def _recovered(self, case: Case, load: Load, back: float) -> float | None:
        """Seconds from the dependency's own first answer to whole answers."""
        ranked: float | None = 0.0
        fresh: float | None = 0.0
        if case.recovery in ("fresh", "both"):
            fresh = await self._fresh(load, back)
        if case.recovery in ("ranked", "both"):
            ranked = await load.ranked_again(back, _PATIENCE_SECONDS)
        return None if ranked is None or fresh is None else max(ranked, fresh)

    async def _fresh(self, load: Load, back: float) -> float | None:
        """A click of a user of its own, until an answer knows of it."""
        user_id = self._probe_users.pop()
        before = None
        while before is None or before.state_revision == 0:
            if time.monotonic() - back > _PATIENCE_SECONDS:
                return None
            before = await load.ask(user_id)
            await asyncio.sleep(0.01)
        # A client of its own: one that lived through the fault may wait before it tries again.
        sender = await asyncio.to_thread(EventSender, self._stack.settings)
        sent = sender.click(user_id, before.items[0].item_id)
        fresh = await load.fresh_again(user_id, before.state_revision, back, _PATIENCE_SECONDS)
        await asyncio.to_thread(sender.close)
        if fresh is None:
            _say(f"the click of {user_id} was not seen: {(sent.exception() or sent.result()) if sent.done() else sent}")
        return fresh


def _result(case: Case, verdict: Verdict, recovered: float | None) -> CaseResult:
    spread = percentiles(verdict.elapsed_ms)
    return CaseResult(
        case.name,
        verdict.answers,
        verdict.failed,
        verdict.empty,
        verdict.late,
        verdict.wrong,
        None if recovered is None else round(recovered, 2),
        dict(verdict.tiers.most_common()),
        dict(verdict.reasons.most_common()),
        dict(verdict.problems.most_common(10)),
        spread["p50"],
        spread["p99"],
    )


async def run(cases: Sequence[Case], home: Path, seconds: float, on_result: Any) -> list[CaseResult]:
    results: list[CaseResult] = []
    made = await asyncio.to_thread(make_world, home, _say)
    async with fault_stack(home) as stack:
        world = await asyncio.to_thread(made.fill, stack.settings)
        # The collector would walk all that was made, and load and proxies with it stand still for tenths of a second.
        freeze_heap()
        matrix = Matrix(stack, world, made.probe_users, seconds)
        for case in cases:
            result = await matrix.run(case)
            on_result(result)
            results.append(result)
    return results


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of these names, all of them where none is given; ConfigError names one that does not exist."""
    known = {case.name: case for case in CASES}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"benchmarks.faults: no case {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] or list(CASES)


def _say(text: str) -> None:
    print(f"{'faults':>10}  {text}", file=sys.stderr, flush=True)


def _tell(result: CaseResult) -> None:
    _say(f"{'good' if result.is_good else 'BAD '} {json.dumps(asdict(result))}")


def print_results(results: Sequence[CaseResult], console: Console) -> None:
    table = Table(title="Faults", title_justify="left")
    for column in ("case", "answers", "failed", "empty", "late", "wrong", "back after s", "p50 ms", "p99 ms", "tiers"):
        table.add_column(column, justify="left" if column in ("case", "tiers") else "right")
    for result in results:
        counts = (result.answers, result.failed, result.empty, result.late, result.wrong)
        tiers = ", ".join(f"{tier} {count}" for tier, count in result.tiers.items())
        spread = (result.recovered_seconds, result.p50_ms, result.p99_ms)
        table.add_row(result.case, *map(str, counts), *map(str, spread), tiers)
    console.print(table)


def main() -> int:
    command = Command("faults", __doc__, f"{', '.join(QUICK)}, {_QUICK_SECONDS:.0f} s each")
    command.add("--case", action="append", default=[], help="run this case only (more than one may be given)")
    command.add("--seconds", type=float, default=15.0, help="length of each case")
    command.add_work()
    return command.run(_measure, _show, _figures, lambda found: all(result.is_good for result in found.results))


class _Found(NamedTuple):
    results: list[CaseResult]
    seconds: float


def _measure(given: argparse.Namespace, work: Path) -> _Found:
    cases = chosen(QUICK if given.quick and not given.case else given.case)
    seconds = _QUICK_SECONDS if given.quick else given.seconds
    return _Found(uvloop.run(run(cases, work, seconds, _tell)), seconds)


def _show(found: _Found, console: Console) -> None:
    print_results(found.results, console)


def _figures(found: _Found) -> dict[str, Any]:
    cases = [asdict(result) for result in found.results]
    return {"cases": cases, "seconds": found.seconds, "load_average": round(os.getloadavg()[0], 1)}


if __name__ == "__main__":
    sys.exit(main())
