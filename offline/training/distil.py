"""What large towers, one or several together, think of each step of a log, for a smaller one to learn from.

Made once, before the student trains (offline/training/towers.py): the teachers' user vectors at every step, from which
their opinion of all items follows with one product. Invariant: teachers and student were trained on the same items, in
the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from candidate import history
from candidate.encoder import Bools, UserEncoder
from candidate.history import Floats, Ints, Sequences
from candidate.towers import Towers
from core.errors import ConfigError
from core.settings import FeaturesSettings
from offline.training.softmax import Teacher

_AT_ONCE = 64


class Ensemble:
    """Several towers as one: their vectors side by side, so that a product is the mean of their logits.

    Args:
        towers: trained on the same items.
        item_vectors: of each, by row of the steps. [items, d] each
        features: settings.
    """

    def __init__(self, towers: Sequence[Towers], item_vectors: Sequence[Floats], features: FeaturesSettings) -> None:
        self._towers, self._own = towers, item_vectors
        self._encoders = [UserEncoder(one, features) for one in towers]
        parts = zip(towers, item_vectors, strict=True)
        #: By row of the steps, with scale. [items, sum of d]
        self.item_vectors: Floats = np.hstack([vectors * float(one.scale()) / len(towers) for one, vectors in parts])

    def encode_steps(self, steps: Sequences, begin: Ints, end: Ints, item_vectors: Floats) -> tuple[Floats, Bools]:  # noqa: ARG002
        """As `UserEncoder.encode_steps`; each tower reads the histories in its own item vectors."""
        parts = [
            encoder.encode_steps(steps, begin, end, own) for encoder, own in zip(self._encoders, self._own, strict=True)
        ]
        return np.hstack([vectors for vectors, _ in parts]), parts[0][1]

    def encode_all(self, steps: Sequences, ends: Ints, device: str, precision: torch.dtype) -> npt.NDArray[np.float16]:
        """A vector for every step up to `ends` [users], zero behind. [steps, sum of d]."""
        return np.hstack(
            [
                _every_step(one, own, steps, ends, device, precision)
                for one, own in zip(self._towers, self._own, strict=True)
            ]
        )

    def start(self, student: Towers) -> None:
        """Gives a student the first one's weights to begin with: item tower, first blocks, first positions.

        Raises:
            ConfigError: they differ in dimension, or were trained on other items.
        """
        ours, theirs = self._towers[0].config, student.config
        if (ours.dimension, ours.heads, ours.item_ids) != (theirs.dimension, theirs.heads, theirs.item_ids):
            raise ConfigError("teacher and student must have one dimension and be trained on the same items")
        if ours.blocks < theirs.blocks or ours.history_length < theirs.history_length:
            raise ConfigError(
                "offline.teacher_blocks and teacher_history_length must not be below offline.blocks and "
                "features.history_length: a teacher is the larger one"
            )
        own = self._towers[0].state_dict()
        own["user.position.weight"] = own["user.position.weight"][: theirs.history_length]
        student.load_state_dict({**student.state_dict(), **{name: own[name] for name in student.state_dict()}})

    @property
    def embedding_versions(self) -> list[str]:
        return [one.embedding_version for one in self._towers]


@dataclass(frozen=True)
class TeacherVectors:
    """What teachers think. `users` [steps, e] (rows behind `ends` are zero), `items` [trained items, e], with scale."""

    ensemble: Ensemble
    users: npt.NDArray[np.float16]
    items: Tensor
    share: float
    device: str

    @classmethod
    def of(
        cls,
        ensemble: Ensemble,
        steps: Sequences,
        ends: Ints,
        rows: Ints,
        share: float,
        device: str,
        precision: torch.dtype,
    ) -> "TeacherVectors":
        """Encodes every step that is trained on.

        Args:
            ensemble: the teachers, as they serve.
            steps: of all users.
            ends: behind the last step to train on, of each user. [users]
            rows: the trained items. [trained items]
            share: how much their opinion counts, against what really came next.
            device: where to compute.
            precision: of the products.
        """
        users = ensemble.encode_all(steps, ends, device, precision)
        return cls(ensemble, users, torch.from_numpy(ensemble.item_vectors[rows]).to(device), share, device)

    def opinion(self, steps: Ints, precision: torch.dtype) -> Teacher:
        """What they think comes after some steps [n]."""
        users = torch.from_numpy(self.users[steps]).to(self.device, precision)
        return Teacher(users, self.items.to(precision), self.share)


def _every_step(
    towers: Towers, item_vectors: Floats, steps: Sequences, ends: Ints, device: str, precision: torch.dtype
) -> npt.NDArray[np.float16]:
    length = towers.config.history_length
    begin, end, kept = _overlapping(steps.starts[:-1], ends, length)
    users = np.zeros((len(steps.rows), towers.config.dimension), np.float16)
    tower = towers.user.to(device)
    order = np.argsort(end - begin, kind="stable")
    with torch.inference_mode(), torch.autocast(device, precision, enabled=precision != torch.float32):
        for start in range(0, len(order), _AT_ONCE):
            at = order[start : start + _AT_ONCE]
            inputs = history.pad(steps, begin[at], end[at], length)
            arrays = (item_vectors[inputs.rows], inputs.kinds, inputs.gaps, inputs.weights)
            vectors = tower(*(torch.from_numpy(array).to(device) for array in arrays)).half().cpu().numpy()
            places = begin[at][:, None] + np.arange(vectors.shape[1])
            wanted = (places >= kept[at][:, None]) & (places < end[at][:, None])
            users[places[wanted]] = vectors[wanted]
    return users


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
