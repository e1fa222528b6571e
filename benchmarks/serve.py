"""Latency and load of the front door: `python -m benchmarks.serve [--quick] [--json]`.

The embedded stack with 100,000 items and 500 candidates, its load in a process of its own, all on this machine: one
caller with the time of each stage beside the bare parts, 32 callers, and twice the load that saturates it. Figures:
benchmarks/serve.md. Invariant: nothing is cached between requests that would not be in production, and the CPU of an
answer is that of all processes of the stack.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from benchmarks.serve_parts import run_parts
from benchmarks.serve_world import FULL, QUICK, Shop, make_shop
from core.errors import StageError
from core.grpc_runtime import blocking_channel
from devstack.child import tied
from devstack.stack import Stack
from headrace.v1.recommender_service_pb2 import ReplayRecommendationRequest
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub

_PROCESSES = ("redis", "kafka", "streams", "candidate", "ranker", "serving")
_DEADLINE_MS = 250.0


@dataclass(frozen=True)
class Plan:
    """How long each load runs."""

    warm_up_seconds: float
    alone_seconds: float
    busy_seconds: float
    overload_seconds: float


PLAN, QUICK_PLAN = Plan(5, 15, 15, 20), Plan(2, 4, 4, 5)


class Measured:
    """A running stack and what loads of it cost."""

    def __init__(self, stack: Stack, shop: Shop, folder: Path) -> None:
        self._stack = stack
        self._users = folder / "users.txt"
        self._users.write_text("\n".join(shop.users), "utf-8")
        self.replayed, self.matched = 0, 0
        self.differences: Counter[str] = Counter()

    def load(self, seconds: float, **options: float) -> dict[str, Any]:
        """One load, with the CPU that the stack took for an answer."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "benchmarks.serve_load", self._stack.address("serving"), str(self._users)]
        before = self._cpu()
        done = subprocess.run(
            tied([*command, f"--seconds={seconds}", f"--deadline-ms={_DEADLINE_MS}", *flags]),
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            check=False,
        )
        if done.returncode != 0:
            raise StageError("load", (done.stderr.splitlines() or ["no output"])[-1])
        spent = self._cpu()
        result: dict[str, Any] = json.loads(done.stdout)
        per_answer = 1000 / max(1, result["answered"])
        result["cpu_ms"] = {name: round((spent[name] - before[name]) * per_answer, 2) for name in spent}
        result["rps"] = result["answered"] / result["seconds"]
        self._replay(result.pop("recommendation_ids"))
        return result

    def _replay(self, recommendation_ids: Sequence[str]) -> None:
        """Makes some of the load's answers again, and counts those that are the same."""
        with blocking_channel(self._stack.address("serving")) as channel:
            stub = RecommenderServiceStub(channel)
            for recommendation_id in recommendation_ids:
                self.replayed += 1
                try:
                    again = stub.ReplayRecommendation(
                        ReplayRecommendationRequest(recommendation_id=recommendation_id), timeout=10
                    )
                except grpc.RpcError as error:
                    self.differences[str(error.code().name)] += 1
                    continue
                self.matched += again.matches
                if not again.matches:
                    self.differences[again.differences[-1]] += 1

    def _cpu(self) -> dict[str, float]:
        return {name: _cpu_seconds(self._stack.pid(name)) for name in _PROCESSES}


def run(plan: Plan, home: Path, *, quick: bool) -> dict[str, Any]:
    shop = make_shop(home, QUICK if quick else FULL, _say)
    # Without its stream the stack would not be whole; nothing is asked of the log here.
    with Stack(home, bundles=home / "bundles", fresh=True) as stack:
        shop.fill(stack.settings)
        measured = Measured(stack, shop, home)
        _say("warming up")
        measured.load(plan.warm_up_seconds, callers=2)
        time.sleep(1)
        _say("one caller")
        alone = measured.load(plan.alone_seconds, callers=1)
        _say("the bare parts")
        parts = run_parts(stack.settings, shop.bundle, shop.users[0])
        _say("32 callers")
        many = measured.load(plan.busy_seconds, callers=32)
        _say("saturation")
        full = max((measured.load(plan.busy_seconds / 2, callers=n) for n in (4, 8, 16)), key=_ranked_rps)
        saturation = _ranked_rps(full)
        _say(f"twice {saturation:.0f} requests/s")
        overload = measured.load(plan.overload_seconds, per_second=2 * saturation)
        result = _result(stack.settings.serving.num_candidates, shop, alone, parts, many, saturation, overload)
        replay = {"replayed": measured.replayed, "matched": measured.matched}
        return result | {"replay": replay | {"differences": dict(measured.differences.most_common(5))}}


def _result(
    candidates: int,
    shop: Shop,
    alone: Mapping[str, Any],
    parts: Mapping[str, float],
    many: Mapping[str, Any],
    saturation: float,
    overload: Mapping[str, Any],
) -> dict[str, Any]:
    whole = sum(parts.values())
    return {
        "items": shop.bundle.manifest.item_count,
        "candidates": candidates,
        "ranked_share": round(alone["tiers"].get("RANKED", 0) / alone["answered"], 4),
        "p50_ms": round(alone["p50_ms"], 2),
        "p99_ms": round(alone["p99_ms"], 2),
        "stage_ms": {name: round(value, 2) for name, value in alone["stage_ms"].items()},
        "cpu_ms_per_answer": round(sum(alone["cpu_ms"].values()), 2),
        "cpu_ms_by_process": alone["cpu_ms"],
        "parts_ms": dict(parts),
        "sum_of_parts_ms": round(whole, 2),
        "overhead": round(alone["p50_ms"] / whole, 2),
        "rps_32_callers": round(many["rps"], 1),
        "p99_32_callers_ms": round(many["p99_ms"], 1),
        "tiers_32_callers": many["tiers"],
        "cpu_ms_per_answer_32_callers": round(sum(many["cpu_ms"].values()), 2),
        "load_cpu_ms_32_callers": round(many["cpu_seconds"] * 1000 / many["answered"], 2),
        "saturation_rps": round(saturation, 1),
        "overload": {
            "offered_rps": round(overload["sent"] / overload["seconds"], 1),
            "answered_rps": round(overload["rps"], 1),
            "failed": overload["failed"],
            "late": overload["late"],
            "p99_ms": round(overload["p99_ms"], 1),
            "tiers": overload["tiers"],
            "errors": overload["errors"],
        },
        "load_average": round(os.getloadavg()[0], 1),
    }


def _ranked_rps(load: Mapping[str, Any]) -> float:
    """Whole answers a second."""
    return float(load["tiers"].get("RANKED", 0) / load["seconds"])


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children: the keeper's child is the process itself."""
    process = psutil.Process(pid)
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


def _say(text: str) -> None:
    print(f"{'serve':>10}  {text}", file=sys.stderr, flush=True)


def print_result(result: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{result['items']:,} items, {result['candidates']} candidates", title_justify="left")
    table.add_column("what")
    table.add_column("figure")
    for name, value in result.items():
        shown = json.dumps(value) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    console.print(table)


def main() -> int:
    command = Command("serve", __doc__, "5,000 items and a few seconds of each load")
    command.add_work()
    return command.run(
        lambda given, work: run(QUICK_PLAN if given.quick else PLAN, work, quick=given.quick), print_result
    )


if __name__ == "__main__":
    sys.exit(main())
