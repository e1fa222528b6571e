"""Trains the ranker on the questions of an event log, calibrates it, and says how much better its order is.

A list-wise softmax for the order and a cross-entropy per head for the probabilities; the newest part of the log, by
event time, chooses the epoch to keep, then fits the calibration. Invariant: the same log, towers, settings and seed
give the same model; nothing at or after `before_ms` is read, and no training label reaches into the held-out time.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from candidate.encoder import UserEncoder
from core.errors import ConfigError
from core.settings import Settings
from core.telemetry import get_logger
from features.catalog import Catalog, Floats, Rows
from features.stores.event_log import EventLog
from features.vectors import CANDIDATE_FEATURES
from headrace.v1.events_pb2 import Item
from offline.replay import Entry, read_entries
from offline.reporting import Reporter
from offline.training.ranker_candidates import CandidateSources
from offline.training.ranker_questions import Question, questions_of
from offline.training.ranker_rows import Row, RowMaker
from offline.training.towers import TrainedTowers
from ranker.calibration import Calibration, expected_calibration_error, fit_platt, save_calibration
from ranker.model import CLICK, CONVERSION, HEADS, VALUE, ItemTable, RankerBatch, RankerConfig, RankerModel, save_ranker
from ranker.scorer import Scorer, collate

_log = get_logger("training")

LISTS_PER_STEP = 48
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
# Heads that teach less than the order of clicks.
CONVERSION_WEIGHT, VALUE_WEIGHT = 0.5, 0.3
# Share of training lists that go without the user's vector, or without retrieval scores: both are at their best on
# what the towers were trained on, and the ranker must not lean on them more than they will hold.
VECTOR_DROPOUT, SCORE_DROPOUT = 0.1, 0.3
HELD_OUT_LISTS, SERVED_LISTS = 2000, 400
# Of what the towers held out, the newest part is held out here too.
HELD_OUT_SHARE, LEAST_LISTS = 0.4, 300
PATIENCE_EPOCHS = 2
# A head needs this many positive labels to be trained, a calibration on shown lists this many clicks.
LEAST_LABELS, LEAST_SHOWN_CLICKS = 50, 100
CUTOFF = 10
_SCORE = CANDIDATE_FEATURES.index("retrieval_score")


@dataclass
class TrainedRanker:
    """What training gives."""

    model: RankerModel
    metrics: dict[str, float]


def train_ranker(
    log: EventLog,
    items: Sequence[Item],
    towers: TrainedTowers,
    settings: Settings,
    work: Path,
    *,
    device: str = "auto",
    before_ms: int | None = None,
    progress: bool = True,
) -> TrainedRanker:
    """Trains the ranker and writes it and its calibration into `work`.

    Args:
        log: events and, where there are any, impressions.
        items: the catalogue, in the order of the item vectors.
        towers: the trained towers; their vectors are inputs of the ranker and bring its negatives.
        settings: `offline` for the training, `features` and `candidate` for what is computed and retrieved.
        work: folder for RANKER, RANKER_CONFIG and CALIBRATION.
        device: cpu, cuda, or auto for CUDA where there is one.
        before_ms: events at or after this time are not looked at.
        progress: show progress bars on the terminal.

    Raises:
        ConfigError: the log holds no question that could be learned from.
    """
    started = time.monotonic()
    reporter = Reporter(shown=progress)
    torch.manual_seed(settings.offline.seed)
    rows = _rows(list(read_entries(log, end_ms=before_ms)), items, towers, settings, reporter)
    if not any((row.labels[:, CLICK] > 0).any() for row in rows.train):
        raise ConfigError(
            f"event log {log.root} has nothing to train a ranker on: it needs events of features.positive_kinds by "
            "users with some history; import more events"
        )
    trainer = _Trainer(rows, towers.item_vectors, _categories(items, settings), settings, _device(device))
    epochs = trainer.run(reporter, started)
    calibration, metrics = trainer.calibrate()
    metrics |= trainer.order(calibration)
    save_ranker(trainer.model, work)
    save_calibration(calibration, work)
    seconds = time.monotonic() - started
    metrics |= {"rows": float(sum(len(row.labels) for row in rows.train)), "epochs": epochs, "seconds": seconds}
    _log.info("ranker trained", **{name: round(value, 4) for name, value in metrics.items()})
    return TrainedRanker(trainer.model.cpu(), metrics)


def _categories(items: Sequence[Item], settings: Settings) -> Rows:
    """Category numbers of the items, as the catalogue gives them, [n, 4]."""
    catalog = Catalog(settings.features)
    for item in items:
        catalog.upsert(item)
    return catalog.column("categories")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class _Rows(NamedTuple):
    """Training lists, held-out lists of the same making, and held-out lists with all that would be retrieved."""

    train: list[Row]
    held_out: list[Row]
    served: list[Row]


def _rows(
    entries: Sequence[Entry], items: Sequence[Item], towers: TrainedTowers, settings: Settings, reporter: Reporter
) -> _Rows:
    train, held_out = _split(questions_of(entries, settings), entries, settings)
    served = _evenly([question for question in held_out if question.has_click()], SERVED_LISTS)
    parts = ((train, 0), (held_out, 1), (served, 2))
    asked = sorted(((q, part) for part_questions, part in parts for q in part_questions), key=lambda a: a[0].time_ms)
    encoder = UserEncoder(towers.towers.eval(), settings.features)
    maker = RowMaker(entries, items, CandidateSources(encoder, towers.item_vectors, settings), settings)
    with reporter.bar("ranker: features", 2 * len(asked)) as advance:
        made = maker.make([question for question, _ in asked], [part == 2 for _, part in asked], advance)
    found: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for (_, part), row in zip(asked, made, strict=True):
        if row is not None:
            found[part].append(row)
    return _Rows(*found)


def _split(
    questions: Sequence[Question], entries: Sequence[Entry], settings: Settings
) -> tuple[list[Question], list[Question]]:
    """Questions to train on and to hold out, by time; each thinned evenly to what is allowed.

    To train on: those from the time that the towers held out. On older ones the towers' vectors are better than they
    will ever be in serving, and a ranker that learns from them trusts them too much (on the simulated shop: worse than
    retrieval alone, in spite of seven times the rows). Where the towers left too few, older ones serve all the same.
    """
    share = settings.offline.validation_share
    towers_end_ms, train_end_ms = _time_at(entries, 1 - share), _time_at(entries, 1 - HELD_OUT_SHARE * share)
    # No label may reach into what is held out.
    until_ms = train_end_ms - settings.features.session_gap_seconds * 1000
    train = _informative([q for q in questions if towers_end_ms < q.time_ms < until_ms], settings.offline.seed)
    if sum(question.has_click() for question in train) < LEAST_LISTS:
        train = _informative([q for q in questions if q.time_ms < until_ms], settings.offline.seed)
    held_out = [q for q in questions if q.time_ms > train_end_ms]
    per_list = [len(q.click) + settings.offline.ranker_negatives for q in train]
    budget = int(settings.offline.ranker_max_rows / max(1.0, float(np.mean(per_list)) if per_list else 1.0))
    # Old tastes and old statistics teach less: of a long log the newer part, and of that an even sample.
    return _evenly(train[-2 * budget :], budget), _evenly(held_out, HELD_OUT_LISTS)


def _time_at(entries: Sequence[Entry], share: float) -> int:
    """Time by which this share of the entries had happened."""
    return entries[max(0, min(len(entries), round(len(entries) * share)) - 1)].time_ms if entries else 0


def _informative(questions: Sequence[Question], seed: int) -> list[Question]:
    """Lists without a click say little: as many of them are kept as there are with one."""
    silent = [index for index, question in enumerate(questions) if question.shown and not question.has_click()]
    drop = max(0, 2 * len(silent) - len(questions))
    dropped = set(np.random.default_rng(seed).permutation(silent)[:drop].tolist())
    return [question for index, question in enumerate(questions) if index not in dropped]


def _evenly(questions: Sequence[Question], count: int) -> list[Question]:
    if len(questions) <= count:
        return list(questions)
    return [questions[int(index)] for index in np.linspace(0, len(questions) - 1, count)]


class _Trainer:
    """The model and the rows that it learns from."""

    def __init__(
        self,
        rows: _Rows,
        item_vectors: Floats,
        categories: Rows,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self._rows, self._vectors, self._categories = rows, item_vectors, categories
        self._settings, self._device = settings, device
        labels = np.concatenate([row.labels for row in rows.train])
        trained = ["click"]
        if float((labels[:, CONVERSION] > 0).sum()) >= LEAST_LABELS:
            trained.append("conversion")
        if float(np.isfinite(labels[:, VALUE]).sum()) >= LEAST_LABELS:
            trained.append("value")
        self.model = RankerModel(RankerConfig(item_vectors.shape[1], trained_heads=tuple(trained)))
        self.model.set_scale(
            torch.from_numpy(np.stack([row.features.user for row in rows.train])),
            torch.from_numpy(np.concatenate([row.features.candidates for row in rows.train])),
        )
        self.model.to(device)
        self._table = ItemTable(item_vectors, categories, device)
        self._rng = np.random.default_rng(settings.offline.seed)

    def run(self, reporter: Reporter, started: float) -> int:
        """Trains until the held-out loss is no longer better or the time is over; returns the epoch kept."""
        offline = self._settings.offline
        optimiser = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = -(-len(self._rows.train) // LISTS_PER_STEP)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, LEARNING_RATE, total_steps=steps * offline.ranker_epochs, pct_start=0.1
        )
        best, kept, kept_state = float("inf"), 0, copy.deepcopy(self.model.state_dict())
        with reporter.bar("ranker: training", steps * offline.ranker_epochs) as advance:
            for epoch in range(1, offline.ranker_epochs + 1):
                self.model.train()
                for lists in self._steps(self._rows.train, shuffle=True):
                    optimiser.zero_grad()
                    loss = self._loss(self._batch(lists, training=True))
                    torch.autograd.backward(loss)
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
                    optimiser.step()
                    schedule.step()
                    advance(1)
                held_out = self._held_out_loss()
                if held_out < best:
                    best, kept, kept_state = held_out, epoch, copy.deepcopy(self.model.state_dict())
                limit = offline.max_train_seconds
                if epoch - kept >= PATIENCE_EPOCHS or (limit and time.monotonic() - started > limit):
                    break
        self.model.load_state_dict(kept_state)
        self.model.eval()
        return kept

    def calibrate(self) -> tuple[Calibration, dict[str, float]]:
        """Fits each head on every other held-out list and measures it on the rest.

        On lists that were shown where there are enough of them, so that a probability is one of being clicked when
        shown; else on lists with drawn negatives.
        """
        shown = [row for row in self._rows.held_out if row.shown]
        clicks = sum(float((row.labels[:, CLICK] > 0).sum()) for row in shown)
        on_shown = clicks >= LEAST_SHOWN_CLICKS
        lists = shown if on_shown else self._rows.held_out
        fit, check = (self._logits(lists[start::2], only_shown=on_shown) for start in (0, 1))
        heads, metrics = {}, {}
        for head in self.model.config.trained_heads:
            index = HEADS.index(head)
            (x, y), (x_check, y_check) = (_known(part, index) for part in (fit, check))
            heads[head] = fit_platt(x, y)
            name = "ece" if head == "click" else f"{head}_ece"
            metrics[name] = expected_calibration_error(heads[head](x_check), y_check)
        x, y = _known(self._logits(self._rows.held_out, only_shown=False), CLICK)
        return Calibration(heads, "impressions" if on_shown else "sampled"), {**metrics, "auc": auc(x, y)}

    def order(self, calibration: Calibration) -> dict[str, float]:
        """NDCG@10 of the retrieved candidates in the ranker's order and in that of retrieval."""
        scorer = Scorer(self.model, self._vectors, self._categories, calibration, self._device)
        ranked, retrieved = [], []
        for row in self._rows.served:
            gains = (row.labels[:, CLICK] > 0).astype(np.float32)
            (scores,) = scorer.score([row.features], [row.user_vector])
            ranked.append(ndcg(scores.score, gains, row.missed_count))
            by_source = row.features.candidates[:, _SCORE]
            vector = row.user_vector
            by_vector = by_source if vector is None else self._vectors[row.features.candidate_rows] @ vector
            retrieved.append(ndcg(by_vector, gains, row.missed_count))
        if not ranked:
            return {}
        return {"ndcg_at_10": float(np.mean(ranked)), "retrieval_ndcg_at_10": float(np.mean(retrieved))}

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
        for index, row in enumerate(rows):
            labels[index, : len(row.labels)] = row.labels
            positions[index, : len(row.labels)] = row.positions
        if training:
            inputs = self._without_some(inputs)
        return _Batch(
            inputs.to(self._device),
            torch.from_numpy(labels).to(self._device),
            torch.from_numpy(positions).to(self._device),
        )

    def _without_some(self, inputs: RankerBatch) -> RankerBatch:
        size = len(inputs.users)
        keep = torch.from_numpy((self._rng.random((size, 1)) >= VECTOR_DROPOUT).astype(np.float32))
        blind = torch.from_numpy(self._rng.random(size) < SCORE_DROPOUT)
        inputs.candidates[:, :, _SCORE][blind] = self.model.candidate_mean[_SCORE].cpu()
        return inputs._replace(user_vectors=inputs.user_vectors * keep, has_vector=inputs.has_vector * keep)

    def _loss(self, batch: "_Batch") -> Tensor:
        logits = self.model(batch.inputs, self._table, batch.positions)
        click = batch.labels[:, :, CLICK]
        there = torch.isfinite(click)
        wanted = torch.where(there, click, torch.zeros_like(click))
        clicks = wanted.sum(1)
        shares = logits[:, :, CLICK].masked_fill(~there, -1e4).log_softmax(1)
        asked = clicks > 0
        listwise = -((shares * wanted).sum(1) / clicks.clamp(min=1))[asked]
        loss: Tensor = listwise.sum() / asked.sum().clamp(min=1) + _entropy(logits, batch.labels, CLICK)
        if "conversion" in self.model.config.trained_heads:
            loss = loss + CONVERSION_WEIGHT * _entropy(logits, batch.labels, CONVERSION)
        if "value" in self.model.config.trained_heads:
            loss = loss + VALUE_WEIGHT * _entropy(logits, batch.labels, VALUE)
        return loss

    def _held_out_loss(self) -> float:
        rows = self._rows.held_out or self._rows.train
        self.model.eval()
        with torch.inference_mode():
            losses = [
                float(self._loss(self._batch(lists)._replace(positions=None)))
                for lists in self._steps(rows, shuffle=False)
            ]
        return float(np.mean(losses))

    def _logits(self, rows: Sequence[Row], *, only_shown: bool) -> tuple[Floats, Floats]:
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
    positions: Tensor | None


def ndcg(scores: Floats, gains: Floats, missed: int = 0, cutoff: int = CUTOFF) -> float:
    """NDCG of one list with gains of 0 or 1; `missed` further relevant items are not in the list."""
    relevant = int(gains.sum()) + missed
    if relevant == 0:
        return 0.0
    best = np.argsort(-scores, kind="stable")[:cutoff]
    discounts = 1 / np.log2(np.arange(2, cutoff + 2))
    return float((gains[best] * discounts[: len(best)]).sum() / discounts[:relevant].sum())


def auc(scores: Floats, labels: Floats) -> float:
    """Probability that a positive scores above a negative, ties half; 0.5 where one kind is missing."""
    positive = labels > 0.5
    count, others = int(positive.sum()), int((~positive).sum())
    if count == 0 or others == 0:
        return 0.5
    _, inverse, ties = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[inverse]
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def _entropy(logits: Tensor, labels: Tensor, head: int) -> Tensor:
    """Mean cross-entropy over the candidates whose label is known."""
    known = torch.isfinite(labels[:, :, head])
    if not bool(known.any()):
        return logits.sum() * 0
    return binary_cross_entropy_with_logits(logits[:, :, head][known], labels[:, :, head][known])


def _known(part: tuple[Floats, Floats], head: int) -> tuple[Floats, Floats]:
    logits, labels = part
    known = np.isfinite(labels[:, head])
    return logits[known, head], labels[known, head]
