"""How well towers rank what came next: among all items, those that the user had before left out.

Used while towers train (offline/training/trainer.py) and to judge them afterwards. Invariant: full ranking, no drawn
negatives; an item that ties with the target counts as behind it.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from candidate.encoder import Bools
from candidate.history import Floats, Ints, Sequences
from offline.ndcg import CUTOFF, ndcg_of_ranks
from offline.training.interactions import Held

_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over targets."""

    ndcg_at_10: float
    hr_at_10: float

    @classmethod
    def of(cls, ranks: Ints) -> "Quality":
        """From the rank of each target, 0 = first [n]."""
        if not len(ranks):
            return cls(0.0, 0.0)
        return cls(float(ndcg_of_ranks(ranks).mean()), float((ranks < CUTOFF).mean()))


class StepsEncoder(Protocol):
    """Towers, one or several together: `candidate.encoder.UserEncoder` says what this is."""

    def encode_steps(self, steps: Sequences, begin: Ints, end: Ints, item_vectors: Floats) -> tuple[Floats, Bools]: ...


def target_ranks(encoder: StepsEncoder, item_vectors: Floats, steps: Sequences, held: Held) -> Ints:
    """The rank of each held target, 0 = first [n].

    Args:
        encoder: makes the users' vectors.
        item_vectors: by row of the steps. [items, d]
        steps: of all users.
        held: what is predicted, from which steps before it.
    """
    ranks = np.zeros(len(held.target), np.int64)
    # Histories of like length together: a batch costs what its longest does.
    order = np.argsort(held.end - held.begin, kind="stable")
    for start in range(0, len(order), _AT_ONCE):
        part = order[start : start + _AT_ONCE]
        begin, end = held.begin[part], held.end[part]
        users, _ = encoder.encode_steps(steps, begin, end, item_vectors)
        scores = users @ item_vectors.T
        ranks[part] = ranks_of_scores(scores, steps, begin, end, steps.rows[held.target[part]])
    return ranks


def ranks_of_scores(scores: npt.NDArray[np.float32], steps: Sequences, begin: Ints, end: Ints, targets: Ints) -> Ints:
    """Ranks of `targets` [B] by scores [B, items], which are changed: what steps begin:end had counts as last."""
    own = scores[np.arange(len(targets)), targets]
    lengths = end - begin
    seen = np.arange(lengths.sum()) + np.repeat(begin - (np.cumsum(lengths) - lengths), lengths)
    scores[np.repeat(np.arange(len(begin)), lengths), steps.rows[seen]] = -np.inf
    ranks: Ints = (scores > own[:, None]).sum(axis=1)
    return ranks
