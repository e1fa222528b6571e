"""The index beside bare FAISS: `python -m benchmarks.index [--quick] [--json] [--kinds]`.

At 10,000, 100,000 and 1,000,000 items, d = 64, k = 500, one caller on one thread: recall against exact search, time
and memory of the index as the service has it; and of the same kind of FAISS index, trained alike, called directly and
tuned to the same recall with the very queries that are asked. Each query is asked of both in turn, so that whatever
else the machine does meets both. Then filters, and what a rebuild takes. Figures: benchmarks/index.md. Invariant:
vectors and users are made by benchmarks/item_vectors.py; the index is tuned as a bundle's is, without users.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command, plan_of
from benchmarks.item_vectors import vector_world
from candidate.index import ItemIndex, load_index, save_index
from candidate.index.exact import on_one_core, search_all
from candidate.index.lists import share_found
from candidate.index.reach import RECALL_QUERIES
from core.settings import load_settings

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Search = Callable[[Floats], Rows]

D, K = 64, 500
_WARM_UP = 50
_FILTER_SHARES = (0.5, 0.1, 0.01)
_EXCLUDED = 5000
# For the JSON alone: a page is not that wide.
_IN_JSON = {"bare_p99_ms", "probes", "bare_probes", "build_seconds"}
# A graph of a million takes longer to build than all the rest.
_HNSW_MAX_ITEMS = 100_000
_CODES = ("SQfp16", "SQ8", "Flat")


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    sizes: tuple[int, ...]
    queries: int
    rounds: int


FULL, QUICK = Plan((10_000, 100_000, 1_000_000), queries=500, rounds=4), Plan((10_000, 100_000), queries=200, rounds=2)


def measure(items: int, plan: Plan, folder: Path) -> dict[str, Any]:
    """All figures of one size. Runs in a process of its own."""
    on_one_core()
    say(f"{items:,} items: vectors")
    world = vector_world(items, RECALL_QUERIES + plan.queries, D)
    held_out, users = world.users[:RECALL_QUERIES], np.ascontiguousarray(world.users[RECALL_QUERIES:])
    say(f"{items:,} items: building")
    started = time.perf_counter()
    index = ItemIndex.build(world.items, np.arange(items), load_settings().candidate.exact_max_items, "benchmark")
    build_seconds = time.perf_counter() - started
    wanted = exact_rows(users, world.items)

    def ours(query: Floats) -> Rows:
        return index.search(query, K)[0]

    our_recall = share_found(np.concatenate([ours(user[None]) for user in users]), wanted)
    bare = bare_index(index.info.kind, world.items)
    directly, bare_recall, probes = tuned(bare, users, wanted, our_recall)
    say(f"{items:,} items: {plan.rounds} rounds of {plan.queries} users, each asked of both")
    our_ms, bare_ms = side_by_side(ours, directly, users, plan.rounds)
    return {
        "items": items,
        "kind": index.info.kind,
        "recall_at_500": round(our_recall, 4),
        "p50_ms": quantile(our_ms, 50),
        "p99_ms": quantile(our_ms, 99),
        "bare_recall_at_500": round(bare_recall, 4),
        "bare_p50_ms": quantile(bare_ms, 50),
        "bare_p99_ms": quantile(bare_ms, 99),
        "search_ratio": round(float(np.median(our_ms) / np.median(bare_ms)), 3),
        "probes": index.info.probes,
        "bare_probes": probes,
        **memory(index, bare, world.items, folder),
        "build_seconds": round(build_seconds, 1),
        "filtered": filtered(index, users, world.items),
        "retuned": retuned(index, held_out, users, wanted),
        "rebuild": rebuilds(index, users),
    }


def bare_index(kind: str, vectors: Floats) -> Any:
    """The same kind of FAISS index, by its own means: all vectors added at once, trained on as many per list."""
    bare: Any = faiss.index_factory(D, kind, faiss.METRIC_INNER_PRODUCT)
    if not bare.is_trained:
        sample = np.random.default_rng(1).choice(len(vectors), min(len(vectors), 64 * bare.nlist), replace=False)
        bare.train(vectors[sample])
    bare.add(vectors)
    return bare


def tuned(bare: Any, users: Floats, wanted: Rows, recall: float) -> tuple[Search, float, int]:
    """The index called directly with the fewest probes that find as much: the search, its recall, the probes."""
    if not hasattr(bare, "nprobe"):
        return lambda query: bare.search(query, K)[1], 1.0, 0

    def found(probes: int) -> float:
        bare.nprobe = probes
        return share_found(bare.search(users, K)[1], wanted)

    least, most = 0, int(bare.nlist)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if found(middle) >= recall else (middle, most)
    return lambda query: bare.search(query, K)[1], found(most), most


def side_by_side(first: Search, second: Search, users: Floats, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each search of both; they take turns in going first."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(-1, rounds):
        for number, user in enumerate(users[:_WARM_UP] if turn < 0 else users):
            query = user[None]
            for which in (0, 1) if (turn + number) % 2 else (1, 0):
                started = time.perf_counter()
                (first, second)[which](query)
                if turn >= 0:
                    times[which].append((time.perf_counter() - started) * 1000)
    return times


def filtered(index: ItemIndex, users: Floats, vectors: Floats) -> list[dict[str, Any]]:
    """Recall and time where few items pass at random, and where the best 5,000 are excluded."""
    rng, some = np.random.default_rng(2), users[:100]
    masks = {f"{share:.0%} pass": [rng.random(len(vectors)) < share] * len(some) for share in _FILTER_SHARES}
    best = search_all(some, vectors, min(_EXCLUDED, len(vectors) // 2))[0]
    masks[f"best {best.shape[1]:,} excluded"] = [_without(len(vectors), rows) for rows in best]
    lines = []
    for name, of_user in masks.items():
        times, found, wanted = [], [], []
        for user, mask in zip(some, of_user, strict=True):
            started = time.perf_counter()
            rows, _ = index.search(user[None], K, mask)
            times.append((time.perf_counter() - started) * 1000)
            found.append(rows[0])
            wanted.append(index.search_exact(user[None], K, mask)[0])
        least = min(int((rows >= 0).sum()) for rows in found)
        recall = share_found(np.stack(found), np.stack(wanted))
        lines.append({"filter": name, "recall": round(recall, 4), "p50_ms": quantile(times, 50), "fewest_found": least})
    return lines


def retuned(index: ItemIndex, held_out: Floats, users: Floats, wanted: Rows) -> dict[str, float]:
    """The same lists when users have asked for a while: tuned by 256 of them, not by points between items."""
    if not index.info.probes:
        return {}
    index.ask_for_recall(held_out, is_low=True)
    index.rebuild()

    def search(query: Floats) -> Rows:
        return index.search(query, K)[0]

    recall = share_found(np.concatenate([search(user[None]) for user in users]), wanted)
    times, _ = side_by_side(search, search, users, 1)
    return {"recall_at_500": round(recall, 4), "p50_ms": quantile(times, 50), "probes": index.info.probes}


def rebuilds(index: ItemIndex, users: Floats) -> dict[str, float]:
    """Seconds that merging 2,000 changes takes, and search time before and after (delta and removals are there)."""
    if not index.info.probes:
        return {}
    vectors = users[np.arange(1000) % len(users)]
    index.upsert_many(range(1000), vectors)
    index.remove_many(range(1000, 2000))
    times = []
    for user in users[:100]:
        started = time.perf_counter()
        index.search(user[None], K)
        times.append((time.perf_counter() - started) * 1000)
    started = time.perf_counter()
    index.rebuild()
    return {"seconds": round(time.perf_counter() - started, 3), "p50_ms_before": quantile(times, 50)}


def memory(index: ItemIndex, bare: Any, vectors: Floats, folder: Path) -> dict[str, float]:
    """Resident MB of each, loaded from files into processes of their own; the vectors by row are told apart."""
    save_index(index, folder / "ours")
    faiss.write_index(bare, str(folder / "bare"))
    np.save(folder / "vectors.npy", vectors)
    grown = [_in_process(_resident_mb, what, folder) for what in ("ours", "bare")]
    table = index.vectors[: len(vectors)].nbytes / 1e6
    return {
        "memory_mb": round(max(0.0, grown[0] - table), 1),
        "bare_memory_mb": round(grown[1], 1),
        "vectors_mb": round(table, 1),
    }


def _resident_mb(what: str, folder: Path) -> float:
    process, vectors = psutil.Process(), np.load(folder / "vectors.npy")
    faiss.IndexFlatIP(D).add(np.zeros((1, D), np.float32))  # the library is there before the first reading
    before = process.memory_info().rss
    held = load_index(folder / what, vectors) if what == "ours" else faiss.read_index(str(folder / what))
    grown = process.memory_info().rss - before
    del held
    return float(grown / 1e6)


def kinds(items: int, plan: Plan) -> list[dict[str, Any]]:
    """Other kinds of FAISS index at the same recall, called directly: why it is this one."""
    on_one_core()
    world = vector_world(items, plan.queries, D)
    wanted = exact_rows(world.users, world.items)
    lists = 2 ** round(np.log2(4 * np.sqrt(items)))
    lines = [_kind("Flat", world.items, world.users, wanted)]
    lines += [_kind(f"IVF{lists},{codes}", world.items, world.users, wanted) for codes in _CODES]
    if items <= _HNSW_MAX_ITEMS:
        lines.append(_kind("HNSW32", world.items, world.users, wanted))
    return [{"items": items, **line} for line in lines]


def _kind(kind: str, vectors: Floats, users: Floats, wanted: Rows) -> dict[str, Any]:
    say(f"{len(vectors):,} items: {kind}")
    started = time.perf_counter()
    bare = bare_index(kind, vectors)
    seconds = time.perf_counter() - started
    if kind.startswith("HNSW"):
        recall, effort = 0.0, K
        while recall < 0.98 and effort < 4000:
            bare.hnsw.efSearch = effort
            recall, effort = share_found(bare.search(users, K)[1], wanted), effort + 100
        search: Search = lambda query: bare.search(query, K)[1]  # noqa: E731
        effort -= 100
    else:
        search, recall, effort = tuned(bare, users, wanted, 0.98)
    times, _ = side_by_side(search, search, users, 1)
    size = len(faiss.serialize_index(bare)) / 1e6
    return {
        "kind": kind,
        "probes_or_ef": effort,
        "recall_at_500": round(recall, 4),
        "p50_ms": quantile(times, 50),
        "memory_mb": round(size, 1),
        "build_seconds": round(seconds, 1),
    }


def exact_rows(users: Floats, vectors: Floats) -> Rows:
    return search_all(users, vectors, K)[0]


def _without(count: int, rows: Rows) -> npt.NDArray[np.bool_]:
    mask = np.ones(count, np.bool_)
    mask[rows] = False
    return mask


def quantile(values: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3)


def _in_process(what: Callable[..., Any], *arguments: Any) -> Any:
    """Runs something in a fresh process: its memory and its caches are its own."""
    # Whatever computes there keeps to one core, as in the service.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(what, *arguments).result()


def run(plan: Plan, *, with_kinds: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"sizes": []}
    for items in plan.sizes:
        with tempfile.TemporaryDirectory(prefix="headrace-index-") as folder:
            result["sizes"].append(_in_process(measure, items, plan, Path(folder)))
    if with_kinds:
        result["kinds"] = [line for items in plan.sizes[1:] for line in _in_process(kinds, items, plan)]
    return result | {"dimension": D, "k": K, "queries": plan.queries, "load_average": round(os.getloadavg()[0], 1)}


def say(text: str) -> None:
    print(f"{'index':>10}  {text}", file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], console: Console) -> None:
    _print_lines("The index beside bare FAISS", result["sizes"], console)
    for size in result["sizes"]:
        _print_lines(f"Filters, {size['items']:,} items", size["filtered"], console)
    if "kinds" in result:
        _print_lines("Kinds of FAISS index", result["kinds"], console)


def _print_lines(title: str, lines: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    names = [name for name, value in lines[0].items() if not isinstance(value, list | dict) and name not in _IN_JSON]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for line in lines:
        table.add_row(*(f"{line[name]:,}" if isinstance(line[name], int) else str(line[name]) for name in names))
    console.print(table)


def main() -> int:
    command = Command("index", __doc__, "without the largest size, fewer users")
    command.add("--kinds", action="store_true", help="other kinds of FAISS index, too (minutes)")
    command.add("--sizes", type=int, nargs="+", help=f"items; else {' '.join(map(str, FULL.sizes))}")
    return command.run(lambda given, _: run(plan_of(given, FULL, QUICK, "sizes"), with_kinds=given.kinds), print_result)


if __name__ == "__main__":
    sys.exit(main())
