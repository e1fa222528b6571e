"""One ranker for all delays on the Trivago lists; beside it LightGBM (one for each delay), the rule, the order shown.

Called by benchmarks/rank_quality.py. Invariant: all of them see the same lists with the same signals.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.trivago_lists import (
    DELAYS_SECONDS,
    ClickedList,
    Lists,
    Signals,
    hand_made_features,
    reciprocal_ranks,
    rule_scores,
)
from core.errors import ConfigError
from core.settings import Settings
from features.catalog import Floats
from features.stores.event_log import EventLog
from offline.reporting import Reporter
from offline.training.ranker_fit import Split, Trainer
from offline.training.ranker_quality import calibrate
from offline.training.ranker_rows import Row
from ranker.model import CLICK, HEADS, VALUE
from ranker.scorer import Scorer

_DIMENSION = 8
# Of the training lists the newest: to stop by, and to calibrate on.
_HELD_OUT_SHARE = 0.05
_BOOTSTRAPS = 1000
_QUICK_LISTS = 1200


class TrivagoRanker:
    """Trains and measures."""

    def __init__(self, log: EventLog, settings: Settings, *, quick: bool) -> None:
        self._lists, self._settings = Lists(log, settings), settings
        self._train, self._test = self._lists.train, self._lists.test
        if quick:
            self._train, self._test = self._train[-_QUICK_LISTS:], self._test[:_QUICK_LISTS]

    def run(self, seeds: Sequence[int]) -> dict[str, Any]:
        train = {delay: self._lists.signals(self._train, delay) for delay in DELAYS_SECONDS}
        test = {delay: self._lists.signals(self._test, delay) for delay in DELAYS_SECONDS}
        ranked = {delay: np.zeros(len(self._test), np.float64) for delay in DELAYS_SECONDS}
        eces = []
        for seed in seeds:
            scorer, ece = self._fit(train, seed)
            eces.append(ece)
            for delay in DELAYS_SECONDS:
                made = scorer.score([one.features for one in test[delay]], [None] * len(self._test))
                ranked[delay] += reciprocal_ranks(self._test, [one.click for one in made]) / len(seeds)
        delays = [self._figures(delay, ranked[delay], train[delay], test[delay]) for delay in DELAYS_SECONDS]
        return {
            "delays": delays,
            "lists": len(self._test),
            "train_lists": len(self._train),
            "ece": float(np.mean(eces)),
        }

    def _figures(
        self, delay: float, ranked: npt.NDArray[Any], train: Sequence[Signals], test: Sequence[Signals]
    ) -> dict[str, Any]:
        rule = reciprocal_ranks(
            self._test, [rule_scores(one, known.touched) for one, known in zip(self._test, test, strict=True)]
        )
        shown = reciprocal_ranks(self._test, [rule_scores(one, ()) for one in self._test])
        boosted = reciprocal_ranks(self._test, self._lightgbm(train, test))
        low, high = _interval(ranked - rule)
        against_low, against_high = _interval(ranked - boosted)
        return {
            "delay_seconds": delay if np.isfinite(delay) else None,
            "mrr": float(ranked.mean()),
            "lightgbm_mrr": float(boosted.mean()),
            "rule_mrr": float(rule.mean()),
            "shown_mrr": float(shown.mean()),
            "above_rule_low": low,
            "above_rule_high": high,
            "above_lightgbm_low": against_low,
            "above_lightgbm_high": against_high,
        }

    def _fit(self, train: dict[float, list[Signals]], seed: int) -> tuple[Scorer, float]:
        settings = self._settings.model_copy(
            update={"offline": self._settings.offline.model_copy(update={"seed": seed})}
        )
        held = round(len(self._train) * (1 - _HELD_OUT_SHARE))
        rows = {
            delay: [_row(one, known) for one, known in zip(self._train, signals, strict=True)]
            for delay, signals in train.items()
        }
        split = Split(
            [row for signals in rows.values() for row in signals[:held]],
            [row for signals in rows.values() for row in signals[held:]],
            [],
        )
        torch.manual_seed(seed)
        catalog = self._lists.catalog()
        # Hotels are many and seen a few times each: no vectors, so that the network reads features alone.
        vectors = np.zeros((len(catalog), _DIMENSION), np.float32)
        # A hotel's one category is its city, and so that of its list: there is only the list to learn by heart.
        categories = np.zeros_like(catalog.column("categories"))
        trainer = Trainer(split, vectors, categories, settings, torch.device("cpu"))
        trainer.run(Reporter(shown=False))
        calibration, metrics = calibrate(trainer, split.held_out)
        return Scorer(trainer.model, vectors, categories, calibration), metrics["ece"]

    def _lightgbm(self, train: Sequence[Signals], test: Sequence[Signals]) -> list[Floats]:
        try:
            import lightgbm as lgb
        except ImportError as error:
            raise ConfigError("LightGBM is not installed: pip install 'headrace[benchmark]'") from error
        inputs = [hand_made_features(one, known) for one, known in zip(self._train, train, strict=True)]
        labels = np.concatenate([np.arange(len(one.item_ids)) == one.clicked for one in self._train])
        data = lgb.Dataset(np.concatenate(inputs), labels, group=[len(one.item_ids) for one in self._train])
        parameters = {"objective": "lambdarank", "verbose": -1, "num_threads": 1, "seed": 7, "deterministic": True}
        model = lgb.train(parameters, data, num_boost_round=100)
        rows = [hand_made_features(one, known) for one, known in zip(self._test, test, strict=True)]
        scores = np.asarray(model.predict(np.concatenate(rows)), np.float32)
        # Trees tie: what is shown higher then comes first, as it would.
        ends = np.cumsum([len(one.item_ids) for one in self._test])[:-1]
        return [part - 1e-6 * np.arange(len(part)) for part in np.split(scores, ends)]


def _row(one: ClickedList, known: Signals) -> Row:
    count = len(one.item_ids)
    labels = np.zeros((count, len(HEADS)), np.float32)
    labels[one.clicked, CLICK] = 1.0
    labels[:, VALUE] = np.nan
    unknown = np.full(count, -1, np.int32)
    # The position is an input here (the list's own score), not a bias to be taken out, hence no list that was shown:
    # calibration then reads all candidates.
    weights = np.ones(len(labels), np.float32)
    return Row(
        shown=False,
        features=known.features,
        user_vector=None,
        labels=labels,
        positions=unknown,
        weights=weights,
        missed_count=0,
    )


def _interval(differences: npt.NDArray[Any]) -> tuple[float, float]:
    """95% bootstrap interval of the mean over lists."""
    rng = np.random.default_rng(7)
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(_BOOTSTRAPS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
