"""What a large user tower thinks of each step of a log, for a smaller one to learn from.

Made once, before the student trains (offline/training/towers.py): the teacher's user vector at every step, from which
its opinion of all items follows with one product. Invariant: teacher and student were trained on the same items, in
the same order.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from candidate import history
from candidate.history import Ints, Sequences
from candidate.towers import Towers
from core.errors import ConfigError
from offline.training.softmax import Teacher

_AT_ONCE = 64


@dataclass(frozen=True)
class TeacherVectors:
    """A teacher's vectors. `users` [steps, d] (rows behind `ends` are zero), `items` [trained items, d]."""

    towers: Towers
    embedding_version: str
    users: npt.NDArray[np.float16]
    items: Tensor
    share: float
    device: str

    @classmethod
    def of(
        cls,
        towers: Towers,
        item_vectors: npt.NDArray[np.float32],
        steps: Sequences,
        ends: Ints,
        rows: Ints,
        share: float,
        device: str,
        precision: torch.dtype,
    ) -> "TeacherVectors":
        """Encodes every step that is trained on.

        Args:
            towers: the teacher, as it serves.
            item_vectors: its vectors of all items. [items, d]
            steps: of all users.
            ends: behind the last step to train on, of each user. [users]
            rows: the trained items. [trained items]
            share: how much its opinion counts, against what really came next.
            device: where to compute.
            precision: of the products.
        """
        length = towers.config.history_length
        begin, end, kept = _overlapping(steps.starts[:-1], ends, length)
        users = np.zeros((len(steps.rows), towers.config.dimension), np.float16)
        towers = towers.to(device)
        order = np.argsort(end - begin, kind="stable")
        with torch.inference_mode(), torch.autocast(device, precision, enabled=precision != torch.float32):
            for start in range(0, len(order), _AT_ONCE):
                at = order[start : start + _AT_ONCE]
                inputs = history.pad(steps, begin[at], end[at], length)
                arrays = (item_vectors[inputs.rows], inputs.kinds, inputs.gaps, inputs.weights)
                vectors = towers.user(*(torch.from_numpy(array).to(device) for array in arrays)).half().cpu().numpy()
                places = begin[at][:, None] + np.arange(vectors.shape[1])
                wanted = (places >= kept[at][:, None]) & (places < end[at][:, None])
                users[places[wanted]] = vectors[wanted]
        items = torch.from_numpy(item_vectors[rows]).to(device)
        return cls(towers, towers.embedding_version, users, items, share, device)

    def opinion(self, steps: Ints, precision: torch.dtype) -> Teacher:
        """What it thinks comes after some steps [n]."""
        users = torch.from_numpy(self.users[steps]).to(self.device).float() * self.towers.scale()
        return Teacher(users.to(precision), self.items.to(precision), self.share)

    def start(self, student: Towers) -> None:
        """Gives the student its own weights to begin with: item tower, first blocks, first positions.

        Raises:
            ConfigError: they differ in dimension, or were trained on other items.
        """
        ours, theirs = self.towers.config, student.config
        if (ours.dimension, ours.heads, ours.item_ids) != (theirs.dimension, theirs.heads, theirs.item_ids):
            raise ConfigError("teacher and student must have one dimension and be trained on the same items")
        if ours.blocks < theirs.blocks or ours.history_length < theirs.history_length:
            raise ConfigError(
                "offline.teacher_blocks and teacher_history_length must not be below offline.blocks and "
                "features.history_length: a teacher is the larger one"
            )
        own = self.towers.state_dict()
        own["user.position.weight"] = own["user.position.weight"][: theirs.history_length]
        student.load_state_dict({**student.state_dict(), **{name: own[name] for name in student.state_dict()}})


def _overlapping(first: Ints, last: Ints, length: int) -> tuple[Ints, Ints, Ints]:
    """Windows that overlap by half, and from where on the steps of each count: with at least half a window before."""
    begins, ends, kept = [], [], []
    for start, stop in zip(first.tolist(), last.tolist(), strict=True):
        at = start
        while at < stop:
            begins.append(at)
            ends.append(min(at + length, stop))
            kept.append(at if at == start else at + length // 2)
            if ends[-1] == stop:
                break
            at += length - length // 2
    return np.array(begins, np.int64), np.array(ends, np.int64), np.array(kept, np.int64)
