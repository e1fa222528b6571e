"""Vectors of users and items for serving: states and items in, numpy arrays of unit vectors out.

Called by the candidate service (on the spot, and for EncodeUsers) and by offline (batch scores, evaluation).
Invariant: an item without a vector is stepped over; a user of whom no item is known gets a zero vector and is said to
be unknown. No state of its own: safe from several threads.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from candidate import history
from candidate.content import item_content
from candidate.towers import ContentTensors, Towers
from core.settings import FeaturesSettings
from features.catalog import Catalog
from features.windows import UserState
from headrace.v1.events_pb2 import Item

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_ITEMS_AT_ONCE = 4096


class UserEncoder:
    """The user tower in front of states."""

    def __init__(self, towers: Towers, settings: FeaturesSettings) -> None:
        self._tower = towers.user
        self._config = towers.config
        self._settings = settings

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
        with torch.inference_mode():
            arrays = (item_vectors[batch.rows], batch.kinds, batch.gaps, batch.weights, batch.lengths)
            vectors = self._tower.last(*(torch.from_numpy(array).to(device) for array in arrays))
        result: Floats = vectors.float().cpu().numpy()
        if not known.all():
            result = np.where(known[:, None], result, np.float32(0))
        return result, known


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
