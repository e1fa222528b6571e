"""The order that the ranker makes: `python -m benchmarks.rank_quality --dataset ml-latest-small|ml-100k|trivago`.

MovieLens: NDCG@10 of retrieve and rank against retrieval alone, by event-time replay. Trivago: MRR of the clicked hotel
by one ranker that is given the signals as of each delay, beside LightGBM, a one-line rule and the order shown.
Figures and protocols: benchmarks/rank_quality.md. Invariant: nothing of the test part is read in training.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.command import Command, data_folder
from benchmarks.evaluate import event_log
from benchmarks.trivago_ranker import TrivagoRanker
from core.bundle import open_bundle
from core.settings import Settings, load_settings
from core.telemetry import configure_logging
from features.stores.event_log import EventLog
from offline.data import public
from offline.evaluate import RANKING, RETRIEVAL, Evaluation, evaluate

_SEEDS = (7, 8, 9)
_QUICK = {"max_epochs": 4, "ranker_epochs": 2, "ranker_max_rows": 40_000, "batch_scores_per_user": 10}
_QUICK_MOMENTS = 800


def main() -> int:
    command = Command("rank_quality", __doc__, "one seed, short training")
    command.add("--dataset", required=True, help="ml-latest-small, ml-100k, trivago, or a folder of such files")
    command.add("--seeds", type=int, nargs="+", default=list(_SEEDS))
    command.add("--moments", type=int, help="MovieLens: test moments, evenly spread over the test part; else all")
    command.add_data()
    command.add_work()
    return command.run(_measure, lambda figures, console: console.print(_table(figures)))


def _measure(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    if given.quick:
        given.seeds = given.seeds[:1]
    torch.set_num_threads(1)
    configure_logging(load_settings().telemetry, "benchmarks")
    folder = data_folder(given.dataset, given.data)
    log = event_log(folder, work)
    figures = trivago(log, given) if public.recognise(folder) == "trivago" else movielens(log, work, given)
    return figures | {"dataset": folder.name, "seeds": given.seeds}


def movielens(log: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Means over the seeds."""
    runs = [_one_seed(log, work, seed, arguments) for seed in arguments.seeds]
    figures: dict[str, Any] = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    figures["ratio"] = figures["ranked_ndcg_at_10"] / figures["retrieval_ndcg_at_10"]
    figures["warm_ratio"] = figures["ranked_warm_ndcg_at_10"] / figures["retrieval_warm_ndcg_at_10"]
    figures["runs"] = runs
    return figures


def _one_seed(log: Path, work: Path, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    settings = load_settings(overrides={"offline": {"seed": seed, **(_QUICK if arguments.quick else {})}})
    moments = arguments.moments or (_QUICK_MOMENTS if arguments.quick else None)
    made = evaluate(log, work / "bundles", settings, device="cpu", limit=moments)
    retrieval, ranking = (_row(made, name) for name in (RETRIEVAL, RANKING))
    bundle = open_bundle(work / "bundles" / ".evaluation" / made.bundle_version)
    figures = {
        "retrieval_ndcg_at_10": retrieval.ndcg_at_10,
        "ranked_ndcg_at_10": ranking.ndcg_at_10,
        "retrieval_warm_ndcg_at_10": retrieval.warm_ndcg_at_10,
        "ranked_warm_ndcg_at_10": ranking.warm_ndcg_at_10,
        "ece": bundle.manifest.metrics["ranker_ece"],
        "seconds": made.seconds,
    }
    print(f"seed {seed}: {figures}", file=sys.stderr, flush=True)
    return figures


def trivago(log: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    # Six lists of each moment, which differ by what is known: one epoch, in small steps.
    settings: Settings = load_settings(overrides={"offline": {"ranker_epochs": 1, "ranker_learning_rate": 1e-3}})
    return TrivagoRanker(EventLog(log), settings, quick=arguments.quick).run(arguments.seeds)


def _row(made: Evaluation, name: str) -> Any:
    return next(row for row in made.rows if row.name == name)


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
