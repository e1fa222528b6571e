"""Item vectors of a log by who took what: how items go together over whole histories, in a few numbers each.

A step of the ranker's training; the ranker crosses them with the history (ranker/similarities.py). The leading
singular vectors of the users-by-items matrix, each damped by how much of it is signal: the low-rank form of the linear
item-to-item model of Steck ("Embarrassingly Shallow Autoencoders", WWW 2019). Invariant: only events before the given
time count, and only the products of two vectors mean anything, not their axes.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np
import torch

from core.settings import FeaturesSettings
from features.catalog import Floats
from features.windows import UserEvent
from headrace.v1.events_pb2 import Item
from offline.replay import Entry

TASTE_WIDTH = 32
# A direction as strong as this share of the weakest that is kept counts for half.
_DAMPING = 0.25
_POWER_ROUNDS = 4


def tastes_of(
    entries: Iterable[Entry], items: Sequence[Item], settings: FeaturesSettings, before_ms: int, seed: int
) -> Floats:
    """[n, TASTE_WIDTH], rows in the order of the items; zeros for those that nobody took.

    Args:
        entries: in event-time order.
        items: the catalogue.
        settings: which events count (`positive_kinds`).
        before_ms: only earlier ones.
        seed: of the random projection.
    """
    row_of = {item.item_id: row for row, item in enumerate(items)}
    positive = frozenset(settings.positive_kinds)
    users: dict[str, int] = {}
    taken = {
        (users.setdefault(entry.user_id, len(users)), row_of[entry.item_id])
        for entry in takewhile(lambda entry: entry.time_ms < before_ms, entries)
        if isinstance(entry, UserEvent) and entry.kind in positive and entry.item_id in row_of
    }
    out = np.zeros((len(items), TASTE_WIDTH), np.float32)
    width = min(TASTE_WIDTH, len(users), len(items))
    if not width:
        return out
    matrix = torch.sparse_coo_tensor(
        torch.tensor(sorted(taken)).T, torch.ones(len(taken)), (len(users), len(items)), check_invariants=True
    ).coalesce()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, strengths, directions = torch.svd_lowrank(matrix, min(2 * width, *matrix.shape), niter=_POWER_ROUNDS)
    energy = strengths[:width] ** 2
    damped = directions[:, :width] * torch.sqrt(energy / (energy + _DAMPING * energy[-1] + 1e-6))
    out[:, :width] = damped.numpy()
    return out
