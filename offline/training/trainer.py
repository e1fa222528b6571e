"""The loop that trains both towers: batches, loss, schedule, the average of the weights, validation, checkpoints.

Called by offline/training/towers.py, which makes the data and saves the result. Each step of a user's sequence is
predicted from those before it: by softmax over all trained items, beyond FULL_SOFTMAX_ITEMS over sampled ones,
weighted by importance (Bengio and Senecal 2008). What is validated and kept is the moving average of the weights
(Polyak and Juditsky 1992). Invariant: the same data, settings and seed give the same sequence of batches, also when
resumed.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional

from candidate import history
from candidate.content import Content, item_content, without_rare_words
from candidate.encoder import UserEncoder
from candidate.history import Floats, Ints, Sequences
from candidate.towers import ContentTensors, MaskDropout, Towers, TowersConfig
from core.settings import FeaturesSettings, OfflineSettings
from core.telemetry import get_logger
from headrace.v1.events_pb2 import Item
from offline.training.checkpoint import Checkpoint
from offline.training.distil import TeacherVectors
from offline.training.interactions import Held
from offline.training.precision import products_precision
from offline.training.softmax import softmax_loss
from offline.training.validation import Quality, target_ranks

_log = get_logger("training")

# Up to this many trained items the softmax is over all of them.
FULL_SOFTMAX_ITEMS = {"cpu": 20_000, "cuda": 100_000}
SAMPLED_NEGATIVES = 1024
# Share of items that go without their id in a step: the content must be able to stand alone.
ID_DROPOUT = 0.15
# Words of fewer items are left out: they would be a second id.
LEAST_WORD_ITEMS = 3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01
# The learning rate falls along half a cosine to this share of itself (Loshchilov and Hutter 2017).
LAST_RATE_SHARE = 0.02
# The average of the weights looks back about so many epochs.
AVERAGED_EPOCHS = 2
# Small data still gets this many steps an epoch.
LEAST_STEPS_PER_EPOCH = 40


@dataclass(frozen=True, slots=True)
class TowersData:
    """What towers are trained on. Rows of the steps are positions in `items`."""

    items: Sequence[Item]
    steps: Sequences
    # Behind the last step to train on, of each user. [users]
    ends: Ints
    held: Held
    # Behind the last step to learn from when validation has chosen: with those that were held out. [users]
    refit_ends: Ints
    # Rows of the items that get an id part, and that a prediction chooses among. [ids]
    ids: Ints


class TowerTrainer:
    """One training.

    Args:
        data: what to learn.
        config: shape of the towers; its `item_ids` are those of `data.ids`.
        features, offline: settings.
        work: folder; `work/checkpoints` lets a run that was cut short go on.
        device: cpu or cuda.
        teacher: to learn from its opinion, too; made of towers that were trained on the same items.
        start: trained towers to go on from; else a teacher's weights, else new ones.
    """

    def __init__(
        self,
        data: TowersData,
        config: TowersConfig,
        features: FeaturesSettings,
        offline: OfflineSettings,
        work: Path,
        device: str,
        teacher: TeacherVectors | None = None,
        start: Towers | None = None,
    ) -> None:
        self._data, self._settings, self._features, self._device = data, offline, features, device
        self._teacher, self._started_from = teacher, start.embedding_version if start else None
        self._trained = data.ids
        # An item that training never meets is a negative all the same.
        counts = 1 + np.bincount(_trained_steps(data), minlength=len(data.items))[data.ids]
        self._id_of = np.full(len(data.items), -1, np.int64)
        self._id_of[self._trained] = np.arange(len(self._trained))
        self._share_of_id = (counts / counts.sum()) ** 0.5
        self._share_of_id /= self._share_of_id.sum()
        content = item_content(data.items)
        self._content: Content = without_rare_words(content.take(self._trained), LEAST_WORD_ITEMS)
        self._may_lose_id = self._content.any()
        self._content_tensors = ContentTensors.of(self._content, device)
        self._all_content = ContentTensors.of(content, device)
        self._precision = products_precision(device)
        torch.manual_seed(offline.seed)
        self.towers = Towers(config).to(device)
        if start:
            self.towers.load_state_dict(start.state_dict())
        elif teacher:
            teacher.ensemble.start(self.towers)
        else:
            self.towers.item.fit_numbers(self._content_tensors.numbers)
        self._average = {name: tensor.clone() for name, tensor in self.towers.state_dict().items()}
        self._optimizer = torch.optim.AdamW(
            self.towers.parameters(), lr=offline.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.checkpoint = Checkpoint(work / "checkpoints" / "towers.safetensors", self._fingerprint())

    def run(self, name: str, *, progress: bool) -> Towers:
        """Trains until validation stops improving, the epochs are over, or the time is; returns the best towers."""
        resumed = self.checkpoint.resume(self.towers, self._average, self._optimizer)
        state = self.checkpoint.progress
        if resumed:
            _log.info("training goes on", towers=name, epoch=state.epoch, finished=state.finished)
        with _progress_bar(progress) as bar:
            task = bar.add_task(name, total=self._settings.max_epochs, completed=state.epoch, note="")
            while not state.finished:
                entry = self._epoch(state.epoch, self._time_left(state.seconds))
                state.epoch += 1
                state.seconds += entry["seconds"]
                if entry["ndcg_at_10"] > state.best_score or not len(self._data.held.target):
                    state.best_score, state.best_epoch = entry["ndcg_at_10"], state.epoch
                    self.checkpoint.keep_best(self._average)
                state.curve.append(entry)
                state.finished = self._is_over(state.epoch, state.best_epoch, state.seconds)
                self.checkpoint.save(self.towers, self._average, self._optimizer)
                measured = f"NDCG@10 {entry['ndcg_at_10']:.4f}" if len(self._data.held.target) else ""
                bar.update(task, completed=state.epoch, note=measured)
        self.towers.load_state_dict(self.checkpoint.best)
        return self.towers.to("cpu").eval().requires_grad_(requires_grad=False)

    def metrics(self) -> dict[str, float]:
        state = self.checkpoint.progress
        best = state.curve[state.best_epoch - 1]
        return {
            "towers_ndcg_at_10": best["ndcg_at_10"],
            "towers_hr_at_10": best["hr_at_10"],
            "towers_loss": best["loss"],
            "towers_epochs": float(state.epoch),
            "towers_seconds": round(state.seconds, 2),
            "towers_steps": float(len(self._data.steps.rows)),
            "towers_trained_items": float(len(self._trained)),
        }

    def _epoch(self, epoch: int, seconds_left: float) -> dict[str, float]:
        started = time.monotonic()
        rng = np.random.default_rng([self._settings.seed, epoch])
        torch.manual_seed(int(rng.integers(2**31)))
        self.towers.train()
        for module in self.towers.modules():
            if isinstance(module, MaskDropout):
                module.renew()
        losses: list[Tensor] = []
        batches = self._batches(rng)
        for number, (begin, end) in enumerate(batches):
            done = (epoch + number / len(batches)) / self._settings.max_epochs
            losses.append(self._train(begin, end, done, rng))
            self._take_into_average(1 - 1 / (AVERAGED_EPOCHS * len(batches)))
            if time.monotonic() - started > seconds_left:
                break
        quality = self._validate()
        return {
            "epoch": float(epoch + 1),
            "loss": round(float(torch.stack(losses).mean()), 4) if losses else 0.0,
            "ndcg_at_10": round(quality.ndcg_at_10, 5),
            "hr_at_10": round(quality.hr_at_10, 5),
            "seconds": round(time.monotonic() - started, 3),
        }

    def _batches(self, rng: np.random.Generator) -> list[tuple[Ints, Ints]]:
        """Windows of inputs, of like length in a batch; each step of training is a target once an epoch."""
        begin, end = _windows(self._data.steps.starts[:-1], self._data.ends - 1, self.towers.config.history_length, rng)
        # Longer windows, fewer of them: a batch has about so many steps whatever the length.
        most = max(1, self._settings.batch_size * self._features.history_length // self.towers.config.history_length)
        size = min(most, max(8, len(begin) // LEAST_STEPS_PER_EPOCH))
        order = rng.permutation(len(begin))
        batches = []
        for start in range(0, len(order), 16 * size):
            pool = order[start : start + 16 * size]
            pool = pool[np.argsort((end - begin)[pool], kind="stable")]
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        return [(begin[batches[index]], end[batches[index]]) for index in rng.permutation(len(batches))]

    def _train(self, begin: Ints, end: Ints, done: float, rng: np.random.Generator) -> Tensor:
        length = self.towers.config.history_length
        steps = self._data.steps
        inputs = history.pad(steps, begin, end, length)
        inside = np.arange(inputs.rows.shape[1]) < inputs.lengths[:, None]
        target_steps = (begin[:, None] + np.arange(1, inside.shape[1] + 1))[inside]
        at = np.flatnonzero(inside)
        ids = self._id_of[inputs.rows]
        targets = self._id_of[steps.rows[target_steps]]
        kinds, gaps, weights = self._to(inputs.kinds, inputs.gaps, inputs.weights)
        if len(self._trained) <= FULL_SOFTMAX_ITEMS[self._device]:
            with self._low_precision():
                vectors = self._item_vectors(None, rng)
                users = self._users(vectors, ids, kinds, gaps, weights, at)
            scale, (wanted,) = self.towers.scale(), self._to(targets)
            teacher = self._teacher.opinion(target_steps - 1, self._precision) if self._teacher else None
            loss = softmax_loss(users, vectors, scale, wanted, self._precision, teacher)
        else:
            loss = self._sampled_loss(ids, targets, kinds, gaps, weights, at, rng)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.checkpoint.progress.steps += 1
        warm = min(1.0, self.checkpoint.progress.steps / WARMUP_STEPS)
        falling = LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * (1 + math.cos(math.pi * done)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * warm * falling
        self._optimizer.step()
        return loss.detach()

    def _sampled_loss(
        self,
        ids: Ints,
        targets: Ints,
        kinds: Tensor,
        gaps: Tensor,
        weights: Tensor,
        at: Ints,
        rng: np.random.Generator,
    ) -> Tensor:
        negatives = rng.choice(len(self._trained), SAMPLED_NEGATIVES, p=self._share_of_id)
        needed, inverse = np.unique(np.concatenate([ids.reshape(-1), targets, negatives, [0]]), return_inverse=True)
        needed = np.maximum(needed, 0)  # padding reads some vector, and is not looked at
        of_ids, of_targets, of_negatives = np.split(inverse[:-1], [ids.size, ids.size + len(targets)])
        with self._low_precision():
            vectors = self._item_vectors(needed, rng)
            users = self._users(vectors, of_ids.reshape(ids.shape), kinds, gaps, weights, at)
        rows, own, others = self._to(of_targets, targets, negatives)
        (log_share,) = self._to(np.log(SAMPLED_NEGATIVES * self._share_of_id[negatives]).astype(np.float32))
        scale = self.towers.scale()
        positive = (users * vectors[rows]).sum(dim=1, keepdim=True) * scale
        negative = users @ vectors[self._to(of_negatives)[0]].T * scale - log_share
        negative = negative.masked_fill(own[:, None] == others, -torch.inf)
        nothing = torch.zeros(len(users), dtype=torch.int64, device=users.device)
        return functional.cross_entropy(torch.cat([positive, negative], dim=1), nothing)

    def _item_vectors(self, ids: Ints | None, rng: np.random.Generator) -> Tensor:
        """Vectors of trained items (all, or some), a share of them by content alone [n, d]."""
        if ids is None:
            ids, content = np.arange(len(self._trained)), self._content_tensors
        else:
            content = ContentTensors.of(self._content.take(ids), self._device)
        kept = (rng.random(len(ids)) >= ID_DROPOUT) | ~self._may_lose_id[ids]
        vectors: Tensor = self.towers.item(content, *self._to(ids, kept.astype(np.float32)))
        return vectors

    def _users(
        self, vectors: Tensor, at_vectors: Ints, kinds: Tensor, gaps: Tensor, weights: Tensor, at: Ints
    ) -> Tensor:
        (rows, positions) = self._to(np.maximum(at_vectors, 0), at)
        encoded: Tensor = self.towers.user(functional.embedding(rows, vectors), kinds, gaps, weights)
        return encoded.flatten(0, 1)[positions]

    def _low_precision(self) -> torch.autocast:
        return torch.autocast(self._device, self._precision, enabled=self._precision != torch.float32)

    def _take_into_average(self, decay: float) -> None:
        steps = self.checkpoint.progress.steps
        decay = min(decay, (1 + steps) / (10 + steps))  # at first it follows closely
        with torch.no_grad():
            for name, tensor in self.towers.state_dict().items():
                self._average[name].lerp_(tensor, 1 - decay)

    def _validate(self) -> Quality:
        """Of the held-out targets, by the average of the weights."""
        if not len(self._data.held.target):
            return Quality(0.0, 0.0)
        training = {name: tensor.clone() for name, tensor in self.towers.state_dict().items()}
        self.towers.load_state_dict(self._average)
        self.towers.eval()
        with torch.inference_mode():
            vectors = self.towers.item(self._all_content, *self._to(self._id_of)).cpu().numpy()
        ranks = target_ranks(UserEncoder(self.towers, self._features), vectors, self._data.steps, self._data.held)
        self.towers.load_state_dict(training)
        return Quality.of(ranks)

    def _is_over(self, epoch: int, best_epoch: int, seconds: float) -> bool:
        patient = epoch - best_epoch < self._settings.patience_epochs or not len(self._data.held.target)
        return epoch >= self._settings.max_epochs or not patient or self._time_left(seconds) <= 0

    def _time_left(self, seconds: float) -> float:
        limit = self._settings.max_train_seconds
        return limit - seconds if limit else float("inf")

    def _to(self, *arrays: "npt.NDArray[np.int64] | Floats") -> list[Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for array in arrays]

    def _fingerprint(self) -> str:
        """Of what a checkpoint must agree with: the data, the model, the settings of training."""
        digest = hashlib.blake2b(digest_size=16)
        steps = self._data.steps
        for array in (steps.starts, steps.rows, steps.kinds, steps.weights, steps.times_ms, self._data.ends):
            digest.update(array.tobytes())
        teachers = self._teacher.ensemble.embedding_versions if self._teacher else []
        digest.update(repr((self.towers.config, self._settings, teachers, self._started_from)).encode())
        return digest.hexdigest()


def _trained_steps(data: TowersData) -> Ints:
    inside = np.arange(len(data.steps.rows)) < np.repeat(data.ends, np.diff(data.steps.starts))
    return data.steps.rows[inside]


def _windows(first: Ints, last: Ints, length: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Cuts each range into windows of at most `length`, at a place that changes with each call."""
    begins, ends = [], []
    for start, stop in zip(first.tolist(), last.tolist(), strict=True):
        cut = start + length if stop - start <= length else start + int(rng.integers(1, length + 1))
        while start < stop:
            begins.append(start)
            ends.append(min(cut, stop))
            start, cut = cut, cut + length
    return np.array(begins, np.int64), np.array(ends, np.int64)


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("epoch {task.completed:.0f}"))
    return Progress(*columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), disable=not shown)
