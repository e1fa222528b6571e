"""Items that training never met: `python -m benchmarks.cold_items --dataset DIR [--json] [--quick]`.

A tenth of the items of a public data set is hidden from the training, which then knows them by their content alone
(categories, words of the title, numbers). In the newest fifth of the events each choice of such an item is predicted
from what its user did before, among all items. Figures: benchmarks/retrieval_quality.md. Invariant: no event on a
hidden item is trained on, and no event at or after the split.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from benchmarks.evaluate import event_log
from candidate.encoder import UserEncoder
from core.settings import load_settings
from core.telemetry import configure_logging
from features.stores.event_log import EventLog
from features.stores.event_rows import LogTable
from features.transforms import stable_hash
from offline.data.dataset import split_by_time, times_of
from offline.evaluate import RECALL_CUTOFF, TRAIN_SHARE
from offline.training.interactions import Held, load_steps, new_to_their_users, owners
from offline.training.towers import train_towers
from offline.training.validation import target_ranks

_HIDDEN_SHARE = 10
_QUICK = {"offline": {"max_epochs": 3, "refit_epochs": 1}}


def main() -> int:
    command = Command("cold_items", __doc__, "short training")
    command.add("--dataset", type=Path, help="folder of a public data set, or an event log; else simulated")
    command.add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    command.add_work()
    return command.run(run, print_result)


def print_result(result: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"recall@{RECALL_CUTOFF} among {result['items']:,} items")
    for column in ("", "predicted", "recall", "times random"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in (("hidden", "items hidden from training"), ("trained", "all other items")):
        figures = result[name]
        recall = figures["recall_at_100"]
        table.add_row(label, f"{figures['predicted']:,}", f"{recall:.4f}", f"{figures['times_random']:.1f}")
    console.print(table)


class _Shown(EventLog):
    """An event log without the events on some items."""

    def __init__(self, root: str | Path, hidden: Sequence[str]) -> None:
        super().__init__(root)
        self._hidden = pa.array(hidden)

    def rows(
        self,
        table: LogTable,
        start_ms: int | None = None,
        end_ms: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        rows = super().rows(table, start_ms, end_ms, columns)
        return rows.filter(pc.invert(pc.is_in(rows["item_id"].cast(pa.string()), self._hidden)))


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    settings = load_settings(overrides=_QUICK if arguments.quick else None)
    configure_logging(settings.telemetry, "benchmarks")
    whole = EventLog(event_log(arguments.dataset, work))
    items = list(whole.items())
    hidden = np.array([stable_hash(item.item_id) % _HIDDEN_SHARE == 0 for item in items])
    _, newer = split_by_time(whole.events(columns=["event_time"]), TRAIN_SHARE)
    split_ms = int(times_of(newer)[0])
    shown = _Shown(whole.root, [item.item_id for item, is_hidden in zip(items, hidden, strict=True) if is_hidden])
    towers = train_towers(shown, items, settings, work / "towers", device=arguments.device, before_ms=split_ms)
    steps = load_steps(whole, items, settings.features, None)
    begin = steps.starts[owners(steps)]
    at = np.flatnonzero((steps.times_ms >= split_ms) & new_to_their_users(steps) & (np.arange(len(begin)) > begin))
    held = Held(begin[at], at, at)
    ranks = target_ranks(UserEncoder(towers.towers, settings.features), towers.item_vectors, steps, held)
    random = RECALL_CUTOFF / len(items)
    result: dict[str, Any] = {"items": len(items), "hidden_items": int(hidden.sum()), "quick": arguments.quick}
    for name, chosen in (("hidden", hidden[steps.rows[at]]), ("trained", ~hidden[steps.rows[at]])):
        recall = float((ranks[chosen] < RECALL_CUTOFF).mean())
        result[name] = {
            "predicted": int(chosen.sum()),
            "recall_at_100": round(recall, 4),
            "times_random": round(recall / random, 1),
        }
    return result


if __name__ == "__main__":
    sys.exit(main())
