"""How good a trained ranker is: its calibration and the quality of its order, on held-out time.

Last step of offline/training/ranker.py. Invariant: a calibration is fitted on one half of the held-out lists and
measured on the other.
"""

from collections.abc import Sequence

import numpy as np

from features.catalog import Floats
from features.vectors import CANDIDATE_FEATURES
from offline.ndcg import ndcg
from offline.training.ranker_fit import Trainer
from offline.training.ranker_rows import Row
from ranker.calibration import Calibration, expected_calibration_error, fit_platt
from ranker.model import CLICK, HEADS
from ranker.scorer import Scorer

# Clicks on lists that were shown which a calibration on such lists needs.
LEAST_SHOWN_CLICKS = 100
_SCORE = CANDIDATE_FEATURES.index("retrieval_score")


def calibrate(
    trainer: Trainer, held_out: Sequence[Row], served: Sequence[Row] = ()
) -> tuple[Calibration, dict[str, float]]:
    """Fits each head on every other held-out list and measures it on the rest.

    On lists that were shown where there are enough of them, so that a probability is one of being clicked when
    shown; else on whole retrieved lists, where it is one of being chosen when retrieved.
    """
    if not held_out:
        return Calibration(), {}
    shown = [row for row in held_out if row.shown]
    clicks = sum(float((row.labels[:, CLICK] > 0).sum()) for row in shown)
    on_shown = clicks >= LEAST_SHOWN_CLICKS
    lists = shown if on_shown else served or held_out
    heads, metrics = {}, {}
    for head in trainer.model.config.trained_heads:
        index = HEADS.index(head)
        # Of the other heads only what was chosen has labels, which all held-out lists have.
        whose, only_shown = (lists, on_shown) if head == "click" else (held_out, False)
        parts = (trainer.logits(whose[start::2], only_shown=only_shown) for start in (0, 1))
        (x, y), (x_check, y_check) = (_known(part, index) for part in parts)
        heads[head] = fit_platt(x, y)
        name = "ece" if head == "click" else f"{head}_ece"
        metrics[name] = expected_calibration_error(heads[head](x_check), y_check)
    x, y = _known(trainer.logits(held_out, only_shown=False), CLICK)
    return Calibration(heads, "impressions" if on_shown else "retrieved" if served else "sampled"), {
        **metrics,
        "auc": auc(x, y),
    }


def order(scorer: Scorer, served: Sequence[Row], item_vectors: Floats) -> tuple[float, float]:
    """NDCG@10 of the retrieved candidates in the ranker's order and in that of retrieval; 0 without lists."""
    ranked, retrieved = [], []
    for row in served:
        gains = (row.labels[:, CLICK] > 0).astype(np.float32)
        (scores,) = scorer.score([row.features], [row.user_vector])
        ranked.append(ndcg(scores.score, gains, row.missed_count))
        by_source = row.features.candidates[:, _SCORE]
        vector = row.user_vector
        by_vector = by_source if vector is None else item_vectors[row.features.candidate_rows] @ vector
        retrieved.append(ndcg(by_vector, gains, row.missed_count))
    return (float(np.mean(ranked)), float(np.mean(retrieved))) if ranked else (0.0, 0.0)


def auc(scores: Floats, labels: Floats) -> float:
    """Probability that a positive scores above a negative, ties half; 0.5 where one kind is missing."""
    positive = labels > 0.5
    count, others = int(positive.sum()), int((~positive).sum())
    if count == 0 or others == 0:
        return 0.5
    _, inverse, ties = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[inverse]
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def _known(part: tuple[Floats, Floats], head: int) -> tuple[Floats, Floats]:
    logits, labels = part
    known = np.isfinite(labels[:, head])
    return logits[known, head], labels[known, head]
