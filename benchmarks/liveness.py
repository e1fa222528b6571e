"""Items that come and go while users ask: `python -m benchmarks.liveness [--items N] [--quick] [--json]`.

The candidate service as it runs (`python -m candidate`), fed by the items topic on Kafka (KAFKA_HOME; the embedded
broker where there is none), asked over gRPC. First queries alone (idle), then for a minute 200 upserts and deletes a
second beside the same queries. The index merges what has changed whenever 500 items have (`index_delta_max_items`;
2,000 by default), so many rebuilds and swaps fall into that minute. Figures: benchmarks/liveness.md. Invariant: a
change's clock starts before it is handed to the producer and stops when an answer shows it, polling included; a
change is looked for by the item's own vector, among all items, through the index alone; what this process itself has
to compute is done before its clocks run.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command, plan_of
from benchmarks.liveness_load import CHANGES_PER_SECOND, QUERIES_PER_SECOND, Changes, Service, Watch, ask
from benchmarks.retrieve_world import publish_world
from benchmarks.stream_cluster import running_cluster
from candidate.snapshot import read_item_vectors
from candidate.towers import Towers, load_towers
from core.process import freeze_heap
from core.settings import load_settings
from devstack.kafka_local import kafka_home
from devstack.stack import EMBEDDED, LOCAL

Floats = npt.NDArray[np.float32]

# Small, so that many rebuilds fall into the load.
_DELTA_MAX_ITEMS = 500
_USERS = 400


@dataclass(frozen=True)
class Plan:
    """How large, how long."""

    items: int
    idle_seconds: float
    load_seconds: float


FULL, QUICK = Plan(100_000, 20, 60), Plan(40_000, 5, 10)


def run(plan: Plan, home: Path) -> dict[str, Any]:
    say(f"a bundle of {plan.items:,} items")
    settings = load_settings()
    bundle = publish_world(home / "bundles", plan.items, settings)
    towers, vectors = load_towers(bundle.path), read_item_vectors(bundle)
    kafka = LOCAL if kafka_home() is not None else EMBEDDED
    own = {"candidate": {"HEADRACE_CANDIDATE__INDEX_DELTA_MAX_ITEMS": str(_DELTA_MAX_ITEMS)}}
    with running_cluster(home, ("candidate",), kafka, own) as cluster:
        cluster.wait_ready("candidate")
        return measure(plan, Service(cluster, bundle), towers, vectors) | {"kafka": kafka}


def measure(plan: Plan, service: Service, towers: Towers, vectors: Floats) -> dict[str, Any]:
    users = _users(vectors)
    asyncio.run(ask(service, users, 2))
    # From now on, so that what watches is beside both.
    watch = Watch(service)
    say(f"{QUERIES_PER_SECOND} queries/s alone for {plan.idle_seconds:.0f} s")
    idle = asyncio.run(ask(service, users, plan.idle_seconds))
    say(f"beside {CHANGES_PER_SECOND} upserts and deletes a second for {plan.load_seconds:.0f} s")
    changes = Changes(service, towers, vectors, plan.load_seconds)
    thread = threading.Thread(target=changes.run, name="changes")
    freeze_heap()
    thread.start()
    loaded = asyncio.run(ask(service, users, plan.load_seconds))
    thread.join()
    windows, rebuild_ms = watch.stop()
    seen = changes.seen
    return {
        "items": plan.items,
        "index_kind": watch.last.index_kind,
        "upserts": changes.upserts,
        "deletes": changes.deletes,
        "queries": len(idle.due) + len(loaded.due),
        "failed": idle.failed + loaded.failed + seen.failed,
        "upsert_visible_p50_ms": _quantile(seen.upsert_ms, 50),
        "upsert_visible_p99_ms": _quantile(seen.upsert_ms, 99),
        "delete_gone_p50_ms": _quantile(seen.delete_ms, 50),
        "delete_gone_p99_ms": _quantile(seen.delete_ms, 99),
        "probes": len(seen.upsert_ms) + len(seen.delete_ms),
        "never_seen": changes.never_seen,
        "p99_idle_ms": idle.p99(),
        "p99_load_ms": loaded.p99(),
        "p99_rebuild_ms": loaded.p99(windows),
        "swaps": len(watch.swaps),
        "rebuild_mean_ms": round(rebuild_ms, 1),
        "recall_measured": round(service.metric("index_recall"), 4),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _users(vectors: Floats) -> Floats:
    """Each between two items."""
    pairs = np.random.default_rng(4).choice(len(vectors), (_USERS, 2))
    between = vectors[pairs].sum(axis=1)
    return np.asarray(between / np.linalg.norm(between, axis=1, keepdims=True), np.float32)


def _quantile(values: Sequence[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 1) if values else None


def say(text: str) -> None:
    print(f"{'liveness':>10}  {text}", file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(title="Items that come and go while users ask", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)


def main() -> int:
    command = Command("liveness", __doc__, "fewer items, ten seconds of load")
    command.add("--items", type=int, help=f"items of the bundle; else {FULL.items:,}")
    command.add_work()
    return command.run(lambda given, work: run(plan_of(given, FULL, QUICK, "items"), work), print_result)


if __name__ == "__main__":
    sys.exit(main())
