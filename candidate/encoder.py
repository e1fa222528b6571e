"""Vectors of users and items for serving: states and items in, numpy arrays of unit vectors out.

Called by the candidate service (on the spot, and for EncodeUsers) and by offline (batch scores, evaluation).
Large batches may be encoded in bfloat16, where that was found to be near enough. Invariant: an item without a vector is
stepped over; a user of whom no item is known gets a zero vector and is said to be unknown. No state of its own: safe
from several threads.
"""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from candidate import history
from candidate.content import item_content
from candidate.towers import ContentTensors, Towers, UserTower
from core.settings import FeaturesSettings
from core.telemetry import get_logger
from features.catalog import Catalog
from features.windows import UserState
from headrace.v1.events_pb2 import Item

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_log = get_logger("candidate")

_ITEMS_AT_ONCE = 4096
# A vector in bfloat16 must point where the exact one does, for each of some made-up users.
LEAST_COSINE = 0.9995
_CHECKED_USERS = 64


class UserEncoder:
    """The user tower in front of states.

    Args:
        towers: as trained.
        settings: that the states were made with.
        bfloat16_from_users: batches of so many users and more are encoded in bfloat16, unless that fails the accuracy
            check; 0 = never. A user's vector then depends a little on the size of its batch.
    """

    def __init__(self, towers: Towers, settings: FeaturesSettings, bfloat16_from_users: int = 0) -> None:
        self._tower = towers.user
        self._config = towers.config
        self._settings = settings
        self._low_from = bfloat16_from_users
        self._low = self._checked_low() if bfloat16_from_users else None

    @property
    def uses_bfloat16(self) -> bool:
        """Whether large batches are encoded in bfloat16."""
        return self._low is not None

    def encode(self, states: Sequence[UserState], catalog: Catalog, item_vectors: Floats) -> tuple[Floats, Bools]:
        """Encodes users.

        Args:
            states: B users.
            catalog: knows the rows of items.
            item_vectors: by catalogue row; a zero vector means none. [rows, d]

        Returns:
            Unit vectors [B, d], and whether any item of each history was known [B].
        """
        users, rows, kinds, weights, times_ms = history.of_states(
            states, catalog.rows, self._config.kinds, self._settings
        )
        rows[rows >= len(item_vectors)] = -1
        rows[~item_vectors[rows].any(axis=1)] = -1
        steps = history.sequences(users, len(states), rows, kinds, weights, times_ms)
        return self.encode_steps(steps, steps.starts[:-1], steps.starts[1:], item_vectors)

    def encode_steps(
        self, steps: history.Sequences, begin: history.Ints, end: history.Ints, item_vectors: Floats
    ) -> tuple[Floats, Bools]:
        """The same from ranges of steps, for those who have them at hand (training, evaluation)."""
        batch = history.pad(steps, begin, end, self._config.history_length)
        known = batch.lengths > 0
        device = self._tower.weight.device
        low = self._low if len(begin) >= self._low_from else None
        with torch.inference_mode():
            arrays = (item_vectors[batch.rows], batch.kinds, batch.gaps, batch.weights, batch.lengths)
            tensors = [torch.from_numpy(array).to(device) for array in arrays]
            vectors = _last_low(low, tensors) if low is not None else self._tower.last(*tensors)
        result: Floats = vectors.float().cpu().numpy()
        if not known.all():
            result = np.where(known[:, None], result, np.float32(0))
        return result, known

    def _checked_low(self) -> UserTower | None:
        """The tower in bfloat16, or None where its vectors are not near enough."""
        low = deepcopy(self._tower).to(torch.bfloat16).eval()
        config, draw = self._config, torch.Generator().manual_seed(0)
        shape = (_CHECKED_USERS, config.history_length)
        device = self._tower.weight.device
        tensors = [
            functional.normalize(torch.randn(*shape, config.dimension, generator=draw), dim=-1),
            torch.randint(len(config.kinds) + 1, shape, generator=draw),
            torch.randint(history.GAP_BUCKETS, shape, generator=draw),
            torch.rand(shape, generator=draw),
            torch.randint(1, config.history_length + 1, shape[:1], generator=draw),
        ]
        tensors = [tensor.to(device) for tensor in tensors]
        with torch.inference_mode():
            cosines = functional.cosine_similarity(self._tower.last(*tensors), _last_low(low, tensors))
        least = float(cosines.min())
        if not least >= LEAST_COSINE:
            _log.warning("bfloat16 is not near enough, encoding in float32", least_cosine=least, asked=LEAST_COSINE)
            return None
        return low


def _last_low(tower: UserTower, tensors: list[Tensor]) -> Tensor:
    items, kinds, gaps, weights, lengths = tensors
    return tower.last(items.to(torch.bfloat16), kinds, gaps, weights.to(torch.bfloat16), lengths)


def encode_items(towers: Towers, items: Sequence[Item]) -> Floats:
    """Unit vectors of items [n, d]: content, and the id part of those that the towers were trained on."""
    device = towers.log_scale.device
    vectors = np.zeros((len(items), towers.config.dimension), np.float32)
    with torch.inference_mode():
        for start in range(0, len(items), _ITEMS_AT_ONCE):
            part = items[start : start + _ITEMS_AT_ONCE]
            ids = towers.id_rows([item.item_id for item in part]).to(device)
            encoded = towers.item(ContentTensors.of(item_content(part), device), ids)
            vectors[start : start + len(part)] = encoded.float().cpu().numpy()
    return vectors
