"""Trains the user and the item tower on the positive interactions of an event log.

Each step of a user's sequence is predicted from those before it, by softmax over all trained items (beyond
FULL_SOFTMAX_ITEMS: over sampled ones, weighted by importance, Bengio and Senecal 2008). The newest part of the log, by
event time, chooses the epoch to keep (NDCG@10, full ranking, seen items left out). Invariant: the same log, settings
and seed give the same sequence of batches, also when resumed; nothing at or after `before_ms` is read.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import functional

from candidate import history
from candidate.content import Content, item_content, without_rare_words
from candidate.encoder import UserEncoder, encode_items
from candidate.history import Ints, Sequences, kind_names
from candidate.towers import ContentTensors, MaskDropout, Towers, TowersConfig, save_towers
from core.bundle import ITEM_VECTORS
from core.settings import OfflineSettings, Settings
from core.telemetry import get_logger
from features.stores.event_log import EventLog
from headrace.v1.events_pb2 import Item
from offline.training.checkpoint import Checkpoint
from offline.training.interactions import Held, hold_out, load_steps

_log = get_logger("training")

CURVE = "towers_curve.json"
# Up to this many trained items the softmax is over all of them: on a CPU that product is most of a step.
FULL_SOFTMAX_ITEMS = {"cpu": 4_000, "cuda": 50_000}
SAMPLED_NEGATIVES = 1024
# Share of items that go without their id in a step: the content must be able to stand alone.
ID_DROPOUT = 0.15
# Words of fewer items are left out: they would be a second id.
LEAST_WORD_ITEMS = 3
VALIDATION_TARGETS = 2000
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01
# Small data still gets this many steps an epoch.
LEAST_STEPS_PER_EPOCH = 40


@dataclass
class TrainedTowers:
    """What training gives. `item_vectors` [n, d] has its rows in the order of the items."""

    towers: Towers
    item_vectors: npt.NDArray[np.float32]
    metrics: dict[str, float]


def train_towers(
    log: EventLog,
    items: Sequence[Item],
    settings: Settings,
    work: Path,
    *,
    device: str = "auto",
    before_ms: int | None = None,
    progress: bool = True,
) -> TrainedTowers:
    """Trains both towers and writes them, with the item vectors, into `work`.

    Args:
        log: the events.
        items: the catalogue; rows of the vectors are in its order.
        settings: `offline` for the model and the training, `features` for what counts.
        work: folder for the files; `work/checkpoints` lets a run that was cut short go on.
        device: cpu, cuda, or auto for CUDA where there is one.
        before_ms: events at or after this time are not looked at.
        progress: show a progress bar on the terminal.

    Raises:
        ConfigError: the log holds nothing to train on.
    """
    started = time.monotonic()
    steps = load_steps(log, items, settings.features, before_ms)
    trainer = _Trainer(steps, items, settings, work, _device(device))
    trainer.run(progress)
    towers = trainer.best_towers()
    vectors = encode_items(towers, items)
    work.mkdir(parents=True, exist_ok=True)
    save_towers(towers, work)
    save_file({"vectors": vectors}, work / ITEM_VECTORS)
    metrics = trainer.metrics()
    (work / CURVE).write_text(json.dumps(trainer.checkpoint.progress.curve, indent=1) + "\n", "utf-8")
    _log.info("towers trained", seconds=round(time.monotonic() - started, 1), **metrics)
    return TrainedTowers(towers, vectors, metrics)


class _Trainer:
    def __init__(self, steps: Sequences, items: Sequence[Item], settings: Settings, work: Path, device: str) -> None:
        self._settings: OfflineSettings = settings.offline
        self._steps = steps
        self._items = items
        self._features = settings.features
        self._device = device
        held, train = hold_out(steps, settings.offline.validation_share, VALIDATION_TARGETS, settings.offline.seed)
        self._held: Held = held
        in_training = np.zeros(len(steps.rows) + 1, np.int64)
        in_training[train + 1] = 1
        # What is trained on is the older part of each user's steps.
        self._ends = steps.starts[:-1] + np.diff(np.cumsum(in_training)[steps.starts])
        trained, counts = np.unique(steps.rows[train], return_counts=True)
        self._trained: Ints = trained
        self._id_of = np.full(len(items), -1, np.int64)
        self._id_of[trained] = np.arange(len(trained))
        self._share_of_id = (counts / counts.sum()) ** 0.5
        self._share_of_id /= self._share_of_id.sum()
        content = item_content(items)
        self._content: Content = without_rare_words(content.take(trained), LEAST_WORD_ITEMS)
        self._content_tensors = ContentTensors.of(self._content, device)
        self._all_content = ContentTensors.of(content, device)
        torch.manual_seed(settings.offline.seed)
        self.towers = Towers(self._config(settings)).to(device)
        self.towers.item.fit_numbers(self._content_tensors.numbers)
        self._optimizer = torch.optim.AdamW(
            self.towers.parameters(), lr=settings.offline.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.checkpoint = Checkpoint(work / "checkpoints" / "towers.safetensors", self._fingerprint())

    def run(self, progress: bool) -> None:
        """Trains until validation stops improving, the epochs are over, or the time is."""
        state = self.checkpoint.progress
        if self.checkpoint.resume(self.towers, self._optimizer):
            state = self.checkpoint.progress
            _log.info("training of the towers goes on", epoch=state.epoch, finished=state.finished)
        with _progress_bar(progress) as bar:
            task = bar.add_task("towers", total=self._settings.max_epochs, completed=state.epoch, note="")
            while not state.finished:
                entry = self._epoch(state.epoch, self._time_left(state.seconds))
                state.epoch += 1
                state.seconds += entry["seconds"]
                if entry["ndcg_at_10"] > state.best_score or not self.checkpoint.best:
                    state.best_score, state.best_epoch = entry["ndcg_at_10"], state.epoch
                    self.checkpoint.keep_best(self.towers)
                state.curve.append(entry)
                state.finished = self._is_over(state.epoch, state.best_epoch, state.seconds)
                self.checkpoint.save(self.towers, self._optimizer)
                bar.update(task, completed=state.epoch, note=f"NDCG@10 {entry['ndcg_at_10']:.4f}")

    def best_towers(self) -> Towers:
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
            "towers_steps": float(len(self._steps.rows)),
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
        for begin, end in self._batches(rng):
            losses.append(self._train(begin, end, rng))
            if time.monotonic() - started > seconds_left:
                break
        ndcg, hr = self._validate()
        return {
            "epoch": float(epoch + 1),
            "loss": round(float(torch.stack(losses).mean()), 4) if losses else 0.0,
            "ndcg_at_10": round(ndcg, 5),
            "hr_at_10": round(hr, 5),
            "seconds": round(time.monotonic() - started, 3),
        }

    def _batches(self, rng: np.random.Generator) -> Iterator[tuple[Ints, Ints]]:
        """Windows of inputs, of like length in a batch; each step of training is a target once an epoch."""
        begin, end = _windows(self._steps.starts[:-1], self._ends - 1, self.towers.config.history_length, rng)
        size = min(self._settings.batch_size, max(8, len(begin) // LEAST_STEPS_PER_EPOCH))
        order = rng.permutation(len(begin))
        batches = []
        for start in range(0, len(order), 16 * size):
            pool = order[start : start + 16 * size]
            pool = pool[np.argsort((end - begin)[pool], kind="stable")]
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        for index in rng.permutation(len(batches)):
            yield begin[batches[index]], end[batches[index]]

    def _train(self, begin: Ints, end: Ints, rng: np.random.Generator) -> Tensor:
        length = self.towers.config.history_length
        inputs = history.pad(self._steps, begin, end, length)
        targets = self._id_of[history.pad(self._steps, begin + 1, end + 1, length).rows]
        at = np.flatnonzero(np.arange(targets.shape[1]) < inputs.lengths[:, None])
        ids = self._id_of[inputs.rows]
        kinds, gaps, weights = self._to(inputs.kinds, inputs.gaps, inputs.weights)
        if len(self._trained) <= FULL_SOFTMAX_ITEMS[self._device]:
            vectors = self._item_vectors(None, rng)
            users = self._users(vectors, ids, kinds, gaps, weights, at)
            logits = users @ vectors.T * self.towers.scale()
            loss = functional.cross_entropy(logits, self._to(targets.reshape(-1)[at])[0])
        else:
            loss = self._sampled_loss(ids, targets.reshape(-1)[at], kinds, gaps, weights, at, rng)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.checkpoint.progress.steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * min(1.0, self.checkpoint.progress.steps / WARMUP_STEPS)
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
        vectors = self._item_vectors(needed, rng)
        of_ids, of_targets, of_negatives = np.split(inverse[:-1], [ids.size, ids.size + len(targets)])
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
        kept = (rng.random(len(ids)) >= ID_DROPOUT).astype(np.float32)
        vectors: Tensor = self.towers.item(content, *self._to(ids, kept))
        return vectors

    def _users(
        self, vectors: Tensor, at_vectors: Ints, kinds: Tensor, gaps: Tensor, weights: Tensor, at: Ints
    ) -> Tensor:
        (rows, positions) = self._to(np.maximum(at_vectors, 0), at)
        encoded: Tensor = self.towers.user(functional.embedding(rows, vectors), kinds, gaps, weights)
        return encoded.flatten(0, 1)[positions]

    def _validate(self) -> tuple[float, float]:
        """NDCG@10 and HR@10 of the held-out targets among all items, seen ones left out."""
        held = self._held
        if not len(held.target):
            return 0.0, 0.0
        self.towers.eval()
        with torch.inference_mode():
            vectors = self.towers.item(self._all_content, *self._to(self._id_of)).cpu().numpy()
        encoder = UserEncoder(self.towers, self._features)
        ranks = []
        for start in range(0, len(held.target), 256):
            part = slice(start, start + 256)
            begin, end, target = held.begin[part], held.end[part], self._steps.rows[held.target[part]]
            users, _ = encoder.encode_steps(self._steps, begin, end, vectors)
            scores = users @ vectors.T
            lengths = end - begin
            seen = np.arange(lengths.sum()) + np.repeat(begin - (np.cumsum(lengths) - lengths), lengths)
            own = scores[np.arange(len(target)), target]
            scores[np.repeat(np.arange(len(begin)), lengths), self._steps.rows[seen]] = -np.inf
            ranks.append((scores > own[:, None]).sum(axis=1))
        rank = np.concatenate(ranks)
        hits = rank < 10
        return float(np.where(hits, 1 / np.log2(rank + 2), 0.0).mean()), float(hits.mean())

    def _is_over(self, epoch: int, best_epoch: int, seconds: float) -> bool:
        patient = epoch - best_epoch < self._settings.patience_epochs or not len(self._held.target)
        return epoch >= self._settings.max_epochs or not patient or self._time_left(seconds) <= 0

    def _time_left(self, seconds: float) -> float:
        limit = self._settings.max_train_seconds
        return limit - seconds if limit else float("inf")

    def _to(self, *arrays: "npt.NDArray[np.int64] | npt.NDArray[np.float32]") -> list[Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for array in arrays]

    def _config(self, settings: Settings) -> TowersConfig:
        offline = settings.offline
        return TowersConfig(
            dimension=offline.dimension,
            blocks=offline.blocks,
            heads=offline.heads,
            history_length=settings.features.history_length,
            kinds=kind_names(settings.features),
            item_ids=tuple(self._items[row].item_id for row in self._trained),
            dropout=offline.dropout,
        )

    def _fingerprint(self) -> str:
        """Of what a checkpoint must agree with: the data, the model, the settings of training."""
        digest = hashlib.blake2b(digest_size=16)
        steps = self._steps
        for array in (steps.starts, steps.rows, steps.kinds, steps.weights, steps.times_ms):
            digest.update(array.tobytes())
        digest.update(repr((self.towers.config, self._settings)).encode())
        return digest.hexdigest()


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


def _device(wish: str) -> str:
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wish


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("epoch {task.completed:.0f}"))
    return Progress(*columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), disable=not shown)
