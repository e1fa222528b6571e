"""Fits the ranker's network to its rows: a list-wise softmax for the order, a cross-entropy per head.

Second half of offline/training/ranker.py. Invariant: the same rows, settings and seed give the same weights; the
weights that are kept are moving averages, of the epoch with the least held-out loss.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from core.settings import Settings
from features.catalog import Floats, Rows
from features.vectors import CANDIDATE_FEATURES, USER_FEATURES
from offline.reporting import Reporter
from offline.training.ranker_distil import MORE_EPOCHS, Teacher
from offline.training.ranker_rows import Row
from ranker.model import CLICK, CONVERSION, HEADS, VALUE, RankerBatch, RankerConfig, RankerModel, item_table
from ranker.scorer import collate

LISTS_PER_STEP = 48
WEIGHT_DECAY = 0.01
# Of the moving average over steps: single steps scatter by several per cent of NDCG where rows are few.
AVERAGE_DECAY = 0.98
# Heads that teach less than the order of clicks.
CONVERSION_WEIGHT, VALUE_WEIGHT = 0.5, 0.3
# Share of training lists that go without the user's vector, or without retrieval scores: the ranker must stand without.
VECTOR_DROPOUT, SCORE_DROPOUT = 0.1, 0.3
# Labels that a head needs to be trained.
LEAST_LABELS = 50
# Lists that the scale of similarities is taken from.
_SCALE_LISTS = 500
_SCORES = [
    CANDIDATE_FEATURES.index(name)
    for name in ("retrieval_score", "log_place", "score_from_last", "log_places_from_last")
]
_SCORES_OF_LAST = [USER_FEATURES.index(name) for name in ("score_of_last", "log2_place_of_last")]


class Split(NamedTuple):
    """Training lists, held-out lists of the same making, and held-out lists with all that would be retrieved."""

    train: list[Row]
    held_out: list[Row]
    served: list[Row]


class Trainer:
    """The model and the rows that it learns from.

    Args:
        rows: what is learnt, and what is held out.
        item_vectors: of the towers. [n, d]
        categories: [n, 4]
        settings: `offline`.
        device: where to train.
        tastes: [n, k]
        shape: makes the network's configuration.
        teacher: a trained ranker to learn from, too.
    """

    def __init__(
        self,
        rows: Split,
        item_vectors: Floats,
        categories: Rows,
        settings: Settings,
        device: torch.device,
        tastes: Floats | None = None,
        shape: Callable[..., RankerConfig] = RankerConfig,
        teacher: RankerModel | None = None,
    ) -> None:
        self._rows, self._vectors, self._settings, self._device = rows, item_vectors, settings, device
        self._teacher = Teacher(teacher, settings.offline.teacher_share) if teacher else None
        self._epochs = settings.offline.ranker_epochs * (MORE_EPOCHS if teacher else 1)
        labels = np.concatenate([row.labels for row in rows.train])
        trained = ["click"]
        if float((labels[:, CONVERSION] > 0).sum()) >= LEAST_LABELS:
            trained.append("conversion")
        if float(np.isfinite(labels[:, VALUE]).sum()) >= LEAST_LABELS:
            trained.append("value")
        items, width = (0, 0) if tastes is None else tastes.shape
        self.model = RankerModel(shape(item_vectors.shape[1], items, width, trained_heads=tuple(trained)))
        if tastes is not None:
            self.model.tastes.copy_(torch.from_numpy(tastes))
        self.model.begin_as_retrieved()
        if self._teacher:
            self._teacher.start(self.model)
        self.model.to(device)
        self._table = item_table(self.model, item_vectors, categories, device)
        self._rng = np.random.default_rng(settings.offline.seed)
        self._set_scale()

    def _set_scale(self) -> None:
        rows = self._rows.train
        sample = self._batch([rows[int(at)] for at in np.linspace(0, len(rows) - 1, min(len(rows), _SCALE_LISTS))])
        there = torch.isfinite(sample.labels[:, :, CLICK])
        self.model.set_scale(
            torch.from_numpy(np.stack([row.features.user for row in rows])).to(self._device),
            torch.from_numpy(np.concatenate([row.features.candidates for row in rows])).to(self._device),
            self.model.alike(sample.inputs, self._table)[there],
        )

    def run(self, reporter: Reporter) -> int:
        """Trains for all epochs, or until the time is over; returns the number of the one that is kept."""
        offline, started = self._settings.offline, time.monotonic()
        optimiser = torch.optim.AdamW(self.model.parameters(), offline.ranker_learning_rate, weight_decay=WEIGHT_DECAY)
        steps = -(-len(self._rows.train) // LISTS_PER_STEP)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, offline.ranker_learning_rate, total_steps=steps * self._epochs, pct_start=0.1
        )
        average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))  # type: ignore[no-untyped-call]
        best, kept, kept_state = float("inf"), 0, copy.deepcopy(self.model.state_dict())
        with reporter.bar("ranker: training", steps * self._epochs) as advance:
            for epoch in range(1, self._epochs + 1):
                self.model.train()
                for lists in self._steps(self._rows.train, shuffle=True):
                    optimiser.zero_grad()
                    loss = self._loss(self.model, self._batch(lists, training=True))
                    torch.autograd.backward(loss)
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
                    optimiser.step()
                    schedule.step()
                    average.update_parameters(self.model)
                    advance(1)
                held_out = self._held_out_loss(average.module)
                if held_out < best:
                    best, kept, kept_state = held_out, epoch, copy.deepcopy(average.module.state_dict())
                limit = offline.max_train_seconds
                if limit and time.monotonic() - started > limit:
                    break
        self.model.load_state_dict(kept_state)
        self.model.eval()
        return kept

    def _steps(self, rows: Sequence[Row], *, shuffle: bool) -> Iterator[list[Row]]:
        order = self._rng.permutation(len(rows)) if shuffle else np.arange(len(rows))
        for start in range(0, len(rows), LISTS_PER_STEP):
            yield [rows[index] for index in order[start : start + LISTS_PER_STEP]]

    def _batch(self, rows: Sequence[Row], *, training: bool = False) -> "_Batch":
        features, vectors = [row.features for row in rows], [row.user_vector for row in rows]
        inputs = collate(features, vectors, self._vectors.shape[1], len(self._table))
        longest = inputs.candidates.shape[1]
        labels = np.full((len(rows), longest, len(HEADS)), np.nan, np.float32)
        positions = np.full((len(rows), longest), -1, np.int64)
        weights = np.ones((len(rows), longest), np.float32)
        for index, row in enumerate(rows):
            labels[index, : len(row.labels)] = row.labels
            positions[index, : len(row.labels)] = row.positions
            weights[index, : len(row.labels)] = row.weights
        if training:
            inputs = self._without_some(inputs)
        return _Batch(
            inputs.to(self._device),
            torch.from_numpy(labels).to(self._device),
            torch.from_numpy(positions).to(self._device),
            torch.from_numpy(weights).to(self._device),
        )

    def _without_some(self, inputs: RankerBatch) -> RankerBatch:
        size = len(inputs.users)
        keep = torch.from_numpy((self._rng.random((size, 1)) >= VECTOR_DROPOUT).astype(np.float32))
        blind = torch.from_numpy(self._rng.random(size) < SCORE_DROPOUT)
        for column in _SCORES:
            inputs.candidates[:, :, column][blind] = self.model.candidate_mean[column].cpu()
        for column in _SCORES_OF_LAST:
            inputs.users[:, column][blind] = self.model.user_mean[column].cpu()
        return inputs._replace(user_vectors=inputs.user_vectors * keep, has_vector=inputs.has_vector * keep)

    def _loss(self, model: nn.Module, batch: "_Batch", *, learning: bool = True) -> Tensor:
        """With positions and the teacher's opinion while `learning`, on the labels alone to compare epochs."""
        logits = model(batch.inputs, self._table, batch.positions if learning else None)
        teacher = self._teacher if learning else None
        opinion = teacher.logits(batch.inputs, self._table) if teacher else None
        click = batch.labels[:, :, CLICK]
        there = torch.isfinite(click)
        wanted = torch.where(there, click, torch.zeros_like(click))
        clicks = wanted.sum(1, keepdim=True)
        shares = _among(logits, batch, there).log_softmax(1)
        aims = wanted / clicks.clamp(min=1)
        if teacher and opinion is not None:
            aims = teacher.mixed(aims, _among(opinion, batch, there).softmax(1))
            labels = teacher.mixed(batch.labels, opinion.sigmoid())
            batch = batch._replace(labels=labels)
        asked = clicks[:, 0] > 0
        listwise = -(shares * aims).sum(1)[asked]
        loss: Tensor = listwise.sum() / asked.sum().clamp(min=1) + _entropy(logits, batch, CLICK)
        if "conversion" in self.model.config.trained_heads:
            loss = loss + CONVERSION_WEIGHT * _entropy(logits, batch, CONVERSION)
        if "value" in self.model.config.trained_heads:
            loss = loss + VALUE_WEIGHT * _entropy(logits, batch, VALUE)
        return loss

    def _held_out_loss(self, model: nn.Module) -> float:
        rows = self._rows.held_out or self._rows.train
        model.eval()
        with torch.inference_mode():
            losses = [
                float(self._loss(model, self._batch(lists), learning=False))
                for lists in self._steps(rows, shuffle=False)
            ]
        return float(np.mean(losses))

    def logits(self, rows: Sequence[Row], *, only_shown: bool) -> tuple[Floats, Floats]:
        """Logits and labels of all candidates of some lists, [n, heads] each; `only_shown` leaves drawn ones out."""
        logits, labels = [np.zeros((0, len(HEADS)), np.float32)], [np.zeros((0, len(HEADS)), np.float32)]
        with torch.inference_mode():
            for lists in self._steps(rows, shuffle=False):
                batch = self._batch(lists)
                made = self.model(batch.inputs, self._table).float().cpu().numpy()
                for one, row in zip(made, lists, strict=True):
                    kept = row.positions >= 0 if only_shown else np.ones(len(row.labels), np.bool_)
                    logits.append(one[: len(row.labels)][kept])
                    labels.append(row.labels[kept])
        return np.concatenate(logits), np.concatenate(labels)


class _Batch(NamedTuple):
    inputs: RankerBatch
    # [B, C, heads]; NaN = not known, or padding.
    labels: Tensor
    # Where it was shown, -1 = it was not. [B, C]
    positions: Tensor
    # [B, C]
    weights: Tensor


def _among(logits: Tensor, batch: _Batch, there: Tensor) -> Tensor:
    """Click logits [B, C] as of whole lists: each candidate counts for as many as it was drawn from."""
    return (logits[:, :, CLICK] + batch.weights.log()).masked_fill(~there, -1e4)


def _entropy(logits: Tensor, batch: _Batch, head: int) -> Tensor:
    """Mean cross-entropy over the candidates whose label is known."""
    known = torch.isfinite(batch.labels[:, :, head])
    if head == CLICK:
        # Of a list that was shown, what was not in it was not refused.
        shown = batch.positions >= 0
        known &= shown | ~shown.any(1, keepdim=True)
    if not bool(known.any()):
        return logits.sum() * 0
    weights = batch.weights[known]
    made = binary_cross_entropy_with_logits(logits[:, :, head][known], batch.labels[:, :, head][known], weights)
    return made * len(weights) / weights.sum()
