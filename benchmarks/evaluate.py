"""Recommendation quality by event-time replay: `python -m benchmarks.evaluate --dataset DIR`.

DIR holds MovieLens or Trivago files, or an event log; without it a simulated shop is made. Figures and protocol:
benchmarks/evaluate.md. Invariant: the figures are those of `headrace evaluate` with the default settings.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.command import Command
from core.errors import ConfigError
from core.settings import Settings, load_settings
from core.telemetry import configure_logging
from features.stores.event_log import EventLog
from offline.data import public
from offline.data.simulator import SimulatorConfig, simulate
from offline.evaluate import Evaluation, evaluate
from offline.tables import print_evaluation

# Small enough for a minute or two; the figures are then rougher.
_QUICK = {"offline": {"max_epochs": 6, "ranker_max_rows": 40_000, "ranker_epochs": 2, "batch_scores_per_user": 20}}
_QUICK_MOMENTS = 1000
_SIMULATED = SimulatorConfig(users=1000, items=1000, seed=7, end_time_ms=1_780_000_000_000)


def main() -> int:
    command = Command("evaluate", __doc__, f"short training, {_QUICK_MOMENTS} moments")
    command.add("--dataset", type=Path, help="folder of a public data set, or an event log; else simulated")
    command.add("--seed", type=int, help="of training; else that of the settings")
    command.add("--limit", type=int, help="predict about this many moments; else all")
    command.add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    command.add_work()
    return command.run(_measure, print_evaluation, Evaluation.as_dict)


def _measure(given: argparse.Namespace, work: Path) -> Evaluation:
    if given.seed is None:
        given.seed = load_settings().offline.seed
    own = _QUICK["offline"] if given.quick else {}
    settings = load_settings(overrides={"offline": {**own, "seed": given.seed}})
    configure_logging(settings.telemetry, "benchmarks")
    return run(given, settings, work)


def run(arguments: argparse.Namespace, settings: Settings, work: Path) -> Evaluation:
    limit = arguments.limit or (_QUICK_MOMENTS if arguments.quick else None)
    log = event_log(arguments.dataset, work)
    return evaluate(log, work / "bundles", settings, device=arguments.device, limit=limit)


def event_log(dataset: Path | None, work: Path) -> Path:
    """The event log of a data set, made in `work` where it is none yet."""
    if dataset is None:
        log = work / "simulated"
        if not EventLog(log).exists():
            simulate(_SIMULATED, log)
        return log
    if EventLog(dataset).exists():
        return dataset
    kind = public.recognise(dataset)
    if kind is None:
        raise ConfigError(f"--dataset {dataset}: neither MovieLens nor Trivago files nor an event log are there")
    log = work / dataset.resolve().name
    if not EventLog(log).exists():
        public.load(kind, dataset, log)
    return log


if __name__ == "__main__":
    sys.exit(main())
