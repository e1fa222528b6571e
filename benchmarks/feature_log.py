"""What logging features costs an answer, and a replica: `python -m benchmarks.feature_log [--quick] [--json]`.

One answer of 500 candidates, each with statistics of four partitions and three topics, on one thread: what the ranker
notes, what serving cuts of it to 20 shown items and 10 others, how many bytes travel and are kept. And a catalogue
that keeps the revisions of its rows beside one that does not. Figures: benchmarks/feature_log.md. Invariant: what is
timed is what the processes call.
"""

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from core.settings import FeaturesSettings, load_settings
from features import feature_log, item_stats, windows
from features.catalog import Catalog
from features.item_stats import ItemPartial
from features.vectors import ranker_input
from features.windows import Position, UserEvent, UserState
from headrace.v1.events_pb2 import Item, ItemStats
from headrace.v1.feature_log_pb2 import LoggedFeatures
from serving.feature_log import cut

_NOW_MS = 1_780_000_000_000
_CANDIDATES, _SHOWN, _OTHERS, _PARTITIONS, _TOPICS = 500, 20, 10, 4, 3


@dataclass
class Costs:
    """Milliseconds are medians."""

    features_ms: float
    note_ms: float
    keep_ms: float
    encode_and_decode_ms: float
    cut_ms: float
    answer_bytes: int
    logged_bytes: int
    put_us: float
    put_with_revisions_us: float
    bytes_per_row: float


def measure(items: int, rounds: int) -> Costs:
    settings = load_settings().features
    rows = [
        _stats(f"item-{number}", partition, settings) for number in range(items) for partition in range(_PARTITIONS)
    ]
    plain, kept = (
        _filled(items, rows, settings, with_revisions=False),
        _filled(items, rows, settings, with_revisions=True),
    )
    catalog, state = kept[0], _state(settings)
    item_ids = [f"item-{number}" for number in range(_CANDIDATES)]
    at = catalog.rows(item_ids)
    scores, bits = np.linspace(1, 0, _CANDIDATES, dtype=np.float32), np.ones(_CANDIDATES, np.int32)
    made = ranker_input(state, catalog, at, scores, bits, _NOW_MS, settings)
    noted = feature_log.note(state, item_ids, made, catalog, _NOW_MS, "bundle").SerializeToString()
    order = np.random.default_rng(3).permutation(_CANDIDATES).tolist()
    shown = item_ids[: 2 * _SHOWN : 2]

    def answer() -> LoggedFeatures:
        return LoggedFeatures.FromString(noted)

    return Costs(
        _ms(lambda _: ranker_input(state, catalog, at, scores, bits, _NOW_MS, settings), rounds),
        _ms(lambda _: feature_log.note(state, item_ids, made, catalog, _NOW_MS, "bundle"), rounds),
        _ms(lambda features: feature_log.keep(features, order), rounds, answer),
        _ms(lambda features: LoggedFeatures.FromString(features.SerializeToString()), rounds, answer),
        _ms(lambda features: cut(features, "recommendation", shown, _OTHERS), rounds, answer),
        len(noted),
        len(cut(answer(), "recommendation", shown, _OTHERS)),
        plain[1],
        kept[1],
        (kept[2] - plain[2]) / len(rows),
    )


def _ms(
    work: Callable[[LoggedFeatures], object], rounds: int, prepare: Callable[[], LoggedFeatures] = LoggedFeatures
) -> float:
    times = []
    for _ in range(rounds):
        features = prepare()
        begin = time.perf_counter()
        work(features)
        times.append((time.perf_counter() - begin) * 1000)
    return median(times)


def _filled(
    items: int, rows: Sequence[ItemStats], settings: FeaturesSettings, *, with_revisions: bool
) -> tuple[Catalog, float, int]:
    """A catalogue, microseconds per row, and the bytes that it takes."""
    times = []
    for traced in (False, False, False, True):
        catalog = Catalog(settings, with_revisions=with_revisions)
        for number in range(items):
            catalog.upsert(Item(item_id=f"item-{number}", categories=["a", "b"], year=2000 + number % 20))
        gc.collect()
        if traced:
            tracemalloc.start()
        begin = time.perf_counter()
        for row in rows:
            catalog.put_stats(row)
        if not traced:
            times.append((time.perf_counter() - begin) / len(rows) * 1e6)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return catalog, min(times), size


def _stats(item_id: str, partition: int, settings: FeaturesSettings) -> ItemStats:
    partial = ItemPartial()
    for source in range(_TOPICS):
        position = Position((source + 1) << 60, partition, 100_000 + source)
        event = UserEvent("u", source, item_id, "click", _NOW_MS - 1000, position=position)
        item_stats.apply(partial, event, settings)
    return item_stats.as_message(item_id, partition, partial, settings)


def _state(settings: FeaturesSettings) -> UserState:
    state = UserState()
    for number in range(settings.history_length):
        position = Position(1 << 60, 0, number)
        event = UserEvent("u", number, f"item-{number}", "click", _NOW_MS - 9000 + number, 1.0, 1.0, ("a",), position)
        windows.apply_one(state, event, settings)
    return state


def show(costs: Costs, console: Console) -> None:
    table = Table("what", "cost")
    for name, value in asdict(costs).items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    command = Command("feature_log", __doc__, "fewer items and rounds")
    return command.run(
        lambda arguments, _: measure(*((1000, 50) if arguments.quick else (5000, 400))),
        show,
        asdict,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
