"""The demo's data: simulated, or one's own MovieLens or Trivago copy, moved in time so that its log ends now.

First step of the demo. Invariant: the split is by event time; what is streamed later is newer than all that trained.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError
from features.stores import event_rows
from features.stores.event_log import EventLog
from headrace.v1.events_pb2 import Event
from offline.data import movielens, trivago
from offline.data.dataset import DatasetSummary, times_of
from offline.data.simulator import SimulatorConfig, simulate

# The newest events are streamed, not trained on: a share of the log, and no more than this many.
LIVE_SHARE = 0.08
LIVE_EVENTS_MAX = 4000


@dataclass(frozen=True)
class DemoData:
    """A log that ends now, and where its live part begins."""

    root: Path
    summary: DatasetSummary
    split_ms: int

    @property
    def log(self) -> EventLog:
        return EventLog(self.root)

    def live_events(self) -> Iterator[Event]:
        """Events to stream, in event-time order."""
        return event_rows.from_table(event_rows.EVENTS, self.log.events(self.split_ms))


def prepare(kind: str, path: Path | None, root: Path, *, users: int, items: int, seed: int) -> DemoData:
    """Writes the data set anew into `root`.

    Args:
        kind: simulated, movielens or trivago.
        path: folder of one's own copy, for the latter two.
        root: the log's folder; what is in it is replaced.
        users: how many to simulate.
        items: how many to simulate.
        seed: of the simulation.
    """
    shutil.rmtree(root, ignore_errors=True)
    if kind == "simulated":
        summary = simulate(SimulatorConfig(users=users, items=items, seed=seed), root)
    elif kind not in ("movielens", "trivago"):
        raise ConfigError(f"--data {kind}: give simulated, movielens or trivago")
    elif path is None:
        raise ConfigError(f"--data {kind} needs --path DIR, the folder of your own copy")
    else:
        summary = (movielens if kind == "movielens" else trivago).load(path, root)
    _move_to_now(EventLog(root), summary)
    times = times_of(EventLog(root).events(columns=["event_time"]))
    live = min(int(len(times) * LIVE_SHARE), LIVE_EVENTS_MAX)
    return DemoData(root, summary, int(times[len(times) - max(1, live)]))


def _move_to_now(log: EventLog, summary: DatasetSummary) -> None:
    """Adds one duration to every time of the log, so that its newest event is a minute old.

    Years-old ratings would otherwise all be stale, and the demo's own clicks in another age.
    """
    if summary.end_ms is None:
        raise ConfigError(f"{summary.path} has no events; is it the right folder?")
    shift = pa.scalar(time.time_ns() // 1_000_000 - 60_000 - summary.end_ms, pa.duration("ms"))
    for table in event_rows.LOG_TABLES:
        if not log.files(table):
            continue
        rows = log.rows(table) if table.by_date else log.states(table)
        for index, field in enumerate(rows.schema):
            if pa.types.is_timestamp(field.type):
                rows = rows.set_column(index, field, pc.add(rows.column(index), shift))
        log.replace(table, [rows.cast(table.schema)], summary.name)


def active_users(log: EventLog, before_ms: int, count: int, seed: int) -> list[str]:
    """Users with enough of a past to be recommended to, drawn at random (seeded). Shape [<= count]."""
    rows = log.events(end_ms=before_ms, columns=["user_id"])
    counted = pc.value_counts(rows["user_id"].combine_chunks().cast(pa.string()))
    known = sorted(entry["values"] for entry in counted.to_pylist() if entry["counts"] >= 5)
    order = np.random.default_rng(seed).permutation(len(known))
    return [known[index] for index in order[:count]]
