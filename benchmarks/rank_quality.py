"""The order that the ranker makes: `python -m benchmarks.rank_quality --dataset ml-latest-small|ml-100k|trivago`.

MovieLens: NDCG@10 of retrieve and rank against retrieval alone, by event-time replay. Trivago: MRR of the clicked hotel
by one ranker that is given the signals as of each delay, beside LightGBM, a one-line rule and the order shown.
Figures and protocols: benchmarks/rank_quality.md. Invariant: nothing of the test part is read in training.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.trivago_ranker import TrivagoRanker
from core.bundle import open_bundle
from core.errors import ConfigError, RecommenderError
from core.settings import Settings, load_settings
from core.telemetry import configure_logging
from features.stores.event_log import EventLog
from offline.data import public
from offline.evaluate import RANKING, RETRIEVAL, Evaluation, evaluate

_SEEDS = (7, 8, 9)
_QUICK = {"max_epochs": 4, "ranker_epochs": 2, "ranker_max_rows": 40_000, "batch_scores_per_user": 10}
_QUICK_MOMENTS = 800
_FOLDERS = (Path("data"), Path("../shared/data"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, help="ml-latest-small, ml-100k, trivago, or a folder of such files")
    parser.add_argument("--data", type=Path, help="where the data sets' folders are; else ./data or ../shared/data")
    parser.add_argument("--work", type=Path, help="keep log and bundles here for the next time; else a scratch folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(_SEEDS))
    parser.add_argument("--quick", action="store_true", help="one seed, short training; rough")
    parser.add_argument("--json", action="store_true", help="print one line of JSON at the end")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds = arguments.seeds[:1]
    torch.set_num_threads(1)
    try:
        settings = load_settings()
        configure_logging(settings.telemetry, "benchmarks")
        folder = folder_of(arguments.dataset, arguments.data)
        with tempfile.TemporaryDirectory() as scratch:
            work = arguments.work or Path(scratch)
            log = work / folder.name
            kind = public.recognise(folder)
            if kind is None:
                raise ConfigError(f"--dataset {folder}: neither MovieLens nor Trivago files are there")
            if not EventLog(log).exists():
                public.load(kind, folder, log)
            figures = trivago(log, arguments) if kind == "trivago" else movielens(log, work, arguments)
    except RecommenderError as error:
        print(f"benchmarks.rank_quality: {error}", file=sys.stderr)
        return 1
    Console().print(_table(figures))
    if arguments.json:
        print(json.dumps(figures | {"dataset": folder.name, "seeds": arguments.seeds, "quick": arguments.quick}))
    return 0


def movielens(log: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Means over the seeds."""
    runs = [_one_seed(log, work, seed, quick=arguments.quick) for seed in arguments.seeds]
    figures: dict[str, Any] = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    figures["ratio"] = figures["ranked_ndcg_at_10"] / figures["retrieval_ndcg_at_10"]
    figures["warm_ratio"] = figures["ranked_warm_ndcg_at_10"] / figures["retrieval_warm_ndcg_at_10"]
    figures["runs"] = runs
    return figures


def _one_seed(log: Path, work: Path, seed: int, *, quick: bool) -> dict[str, float]:
    settings = load_settings(overrides={"offline": {"seed": seed, **(_QUICK if quick else {})}})
    made = evaluate(log, work / "bundles", settings, device="cpu", limit=_QUICK_MOMENTS if quick else None)
    retrieval, ranking = (_row(made, name) for name in (RETRIEVAL, RANKING))
    bundle = open_bundle(work / "bundles" / ".evaluation" / made.bundle_version)
    return {
        "retrieval_ndcg_at_10": retrieval.ndcg_at_10,
        "ranked_ndcg_at_10": ranking.ndcg_at_10,
        "retrieval_warm_ndcg_at_10": retrieval.warm_ndcg_at_10,
        "ranked_warm_ndcg_at_10": ranking.warm_ndcg_at_10,
        "ece": bundle.manifest.metrics["ranker_ece"],
        "seconds": made.seconds,
    }


def trivago(log: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    settings: Settings = load_settings(overrides={"offline": {"ranker_epochs": 2 if arguments.quick else 6}})
    return TrivagoRanker(EventLog(log), settings, quick=arguments.quick).run(arguments.seeds)


def _row(made: Evaluation, name: str) -> Any:
    return next(row for row in made.rows if row.name == name)


def folder_of(dataset: str, data: Path | None) -> Path:
    tried = [Path(dataset), *(folder / dataset for folder in ((data,) if data else _FOLDERS))]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise ConfigError(f"--dataset {dataset}: no such folder; tried {', '.join(map(str, tried))}; say where with --data")


def _table(figures: dict[str, Any]) -> Table:
    table = Table()
    if "delays" in figures:
        for name in figures["delays"][0]:
            table.add_column(name, justify="right")
        for row in figures["delays"]:
            table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
        return table
    table.add_column("mean of the seeds")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
