"""What fresh signals are worth over batch scores: `python -m benchmarks.hybrid --dataset ml-100k|trivago|DIR`.

A public log replayed in event time: the first 70% of the events train, on the next 10% the blend's weights are fitted,
the last 20% is predicted, with batch scores made again at each simulated midnight and fresh signals that are as late as
told. NDCG@10 and MRR of popular items, of batch scores alone, and of two rungs of the ladder: batch scores with fresh
signals (RERANKED_BATCH), and everything online (RANKED).
Figures: benchmarks/hybrid.md. Invariant: weights come from earlier time than what is predicted; the margin's interval
is a bootstrap over users.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command, data_folder
from benchmarks.evaluate import event_log
from core.bundle import CURRENT, open_current
from core.settings import Settings, load_settings
from devstack.blend_fit import Choice, fit_weights
from devstack.blend_replay import PARTS, BlendReplay, Moment, Plan
from features.catalog import Catalog, Rows
from features.stores.event_log import EventLog
from offline.data.dataset import times_of
from offline.models import Models
from offline.ndcg import ndcg_of_ranks
from offline.train import train
from serving.rerank.blend import blend

_TRAIN_SHARE, _TUNE_SHARE = 0.7, 0.1
DELAYS_MS = {"0 s": 0, "10 s": 10_000, "1 min": 60_000, "5 min": 300_000, "30 min": 1_800_000}
# Without the ranker: the rung RERANKED_BATCH.
_HYBRID = tuple(part for part in PARTS if part != "ranker")
_BOOTSTRAPS = 1000
WAYS = ("popular", "batch", "batch and fresh", "online")
_QUICK_TRAINING = {"offline": {"max_epochs": 5, "ranker_epochs": 1, "ranker_max_rows": 20_000}}


@dataclass
class Scores:
    """Gains of one way to recommend, by user: (NDCG@10, reciprocal rank, warm)."""

    gains: dict[str, list[tuple[float, float, bool]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, moment: Moment, rows: Rows) -> None:
        """Judges an order, best first; what of the chosen is not in it is a miss."""
        for target in moment.targets.tolist():
            found = np.flatnonzero(rows == target)
            rank = int(found[0]) if len(found) else None
            ndcg = 0.0 if rank is None else float(ndcg_of_ranks(np.array(rank)))
            self.gains[moment.user_id].append((ndcg, 0.0 if rank is None else 1 / (rank + 1), moment.warm))

    def table(self, *, warm: bool) -> np.ndarray:
        """Per user: sum of NDCG, sum of reciprocal ranks, count. Shape [users, 3]."""
        rows = []
        for user in sorted(self.gains):
            some = [(ndcg, mrr) for ndcg, mrr, is_warm in self.gains[user] if is_warm or not warm]
            rows.append((sum(n for n, _ in some), sum(m for _, m in some), len(some)))
        return np.array(rows, np.float64).reshape(-1, 3)


def quality(scores: Scores, *, warm: bool) -> dict[str, float]:
    table = scores.table(warm=warm)
    count = max(1.0, table[:, 2].sum())
    return {"ndcg_at_10": round(table[:, 0].sum() / count, 4), "mrr": round(table[:, 1].sum() / count, 4)}


def margin(better: Scores, base: Scores, *, warm: bool) -> dict[str, float]:
    """How much higher the NDCG@10 is, with a 95% interval over resampled users."""
    left, right = better.table(warm=warm), base.table(warm=warm)
    draw = np.random.default_rng(7)
    users = len(left)
    samples = []
    for _ in range(_BOOTSTRAPS):
        chosen = draw.integers(0, users, users)
        count = max(1.0, left[chosen, 2].sum())
        samples.append((left[chosen, 0].sum() - right[chosen, 0].sum()) / count)
    low, high = np.percentile(samples, [2.5, 97.5]).tolist()
    count = max(1.0, left[:, 2].sum())
    return {
        "margin": round((left[:, 0].sum() - right[:, 0].sum()) / count, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def batch_alone(moment: Moment) -> Rows:
    """What the last batch run left in the store: the user's scores, then what was popular at that time."""
    own: Rows = np.flatnonzero(moment.from_batch).astype(np.int32)
    own = moment.rows[own[np.argsort(-moment.parts["batch"][own], kind="stable")]]
    return np.concatenate((own, moment.popular[~np.isin(moment.popular, own)]))


def blended(moment: Moment, weights: Mapping[str, float]) -> Rows:
    """The rung's order; of a user of whom nothing is known, the ladder's last one."""
    if not moment.known:
        return moment.popular_now
    parts = {name: values for name, values in moment.parts.items() if name in weights}
    ordered: Rows = moment.rows[np.argsort(-blend(parts, weights).scores, kind="stable")]
    return ordered


def choices_of(moments: Iterable[Moment]) -> list[Choice]:
    return [Choice(moment.parts, at) for moment in moments if moment.known for at in moment.places]


def run(log: EventLog, registry: Path, settings: Settings, limit: int) -> dict[str, Any]:
    started = time.monotonic()
    times = np.sort(times_of(log.events(columns=["event_time"])))
    tune_ms = int(times[int(len(times) * _TRAIN_SHARE)])
    test_ms = int(times[int(len(times) * (_TRAIN_SHARE + _TUNE_SHARE))])
    if not (registry / CURRENT).exists():
        say("training on the oldest 70%")
        train(log.root, registry, settings, before_ms=tune_ms, progress=False)
    bundle = open_current(registry)
    items = list(bundle.items())
    catalog = Catalog.of_items(items, settings.features)
    models = Models.load(bundle.path, catalog, settings, "cpu")
    replay = BlendReplay(log, items, models, settings)
    every = max(1, int((times >= test_ms).sum()) // limit)
    say("fitting weights on the next 10%")
    choices = choices_of(replay.moments(Plan(tune_ms, test_ms, every=max(1, every // 2))))
    hybrid, online = fit_weights(choices, _HYBRID), fit_weights(choices, PARTS)
    say(f"batch and fresh: {hybrid}; online: {online}")
    say("predicting the newest 20%")
    by_delay = {delay_ms: Predictions() for delay_ms in DELAYS_MS.values()}
    for moment in replay.moments(Plan(test_ms, None, tuple(by_delay), every)):
        by_delay[moment.delay_ms].add(moment, hybrid, online)
    return {
        "weights": {"batch_and_fresh": hybrid, "online": online},
        "delays": {name: by_delay[delay_ms].summary() for name, delay_ms in DELAYS_MS.items()},
        "seconds": round(time.monotonic() - started),
        "load_average": round(os.getloadavg()[0], 1),
    }


class Predictions:
    """All ways to recommend, at one delay of the signals."""

    def __init__(self) -> None:
        self._ways = {name: Scores() for name in WAYS}
        self._count = self._warm = 0

    def add(self, moment: Moment, hybrid: Mapping[str, float], online: Mapping[str, float]) -> None:
        self._count += len(moment.targets)
        self._warm += moment.warm * len(moment.targets)
        made = (moment.popular, batch_alone(moment), blended(moment, hybrid), blended(moment, online))
        for scores, rows in zip(self._ways.values(), made, strict=True):
            scores.add(moment, rows)

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"predicted": self._count, "warm": self._warm}
        for group, only_warm in (("all", False), ("warm_users", True)):
            found[group] = {name: quality(scores, warm=only_warm) for name, scores in self._ways.items()}
            for name, way in (("fresh_over_batch", "batch and fresh"), ("online_over_batch", "online")):
                found[group][name] = margin(self._ways[way], self._ways["batch"], warm=only_warm)
        return found


def say(text: str) -> None:
    print(f"{'hybrid':>10}  {text}", file=sys.stderr, flush=True)


def print_result(result: Mapping[str, Any], console: Console) -> None:
    for group in ("all", "warm_users"):
        table = Table(title=f"NDCG@10 (MRR), {group.replace('_', ' ')}", title_justify="left")
        for column in ("signals", *WAYS, "fresh over batch", "online over batch"):
            table.add_column(column)
        for delay, found in result["delays"].items():
            cells = [f"{found[group][way]['ndcg_at_10']:.4f} ({found[group][way]['mrr']:.4f})" for way in WAYS]
            margins = (found[group]["fresh_over_batch"], found[group]["online_over_batch"])
            cells += [f"{one['margin']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]" for one in margins]
            table.add_row(f"{delay} late", *cells)
        console.print(table)


def main() -> int:
    command = Command("hybrid", __doc__, "short training, 200 moments")
    command.add("--dataset", required=True, help="ml-100k, trivago, or the folder of a public data set or an event log")
    command.add("--limit", type=int, default=10_000, help="about so many events are predicted at each delay")
    command.add_data()
    command.add_work()
    return command.run(_measure, print_result)


def _measure(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    settings = load_settings(overrides=_QUICK_TRAINING if given.quick else {})
    log = EventLog(event_log(data_folder(given.dataset, given.data), work))
    return {"dataset": given.dataset} | run(log, work / "bundles", settings, 200 if given.quick else given.limit)


if __name__ == "__main__":
    sys.exit(main())
