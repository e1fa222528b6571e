"""How far an approximate search has to look: lists to probe, by how deep in the order of all items the answer lies.

Measured when lists are trained, with the exact neighbours of queries. Without a filter the k best items are the first
k. With one, the k-th that passes may stand anywhere: how deep is estimated on a sample, so that a filter that cuts out
the user's own corner of the space costs time and no recall. Invariant: pure; what is measured is never changed.
"""

import math
from dataclasses import dataclass

import numpy as np

from candidate.index.bits import Bits, Rows, having
from candidate.index.exact import Floats

# Probes are raised until this share of the exact neighbours is in the lists probed, in held-out queries: with what
# other queries differ from those, and half precision, 0.98 is found.
RECALL_TARGET, RECALL_QUERIES, RECALL_K = 0.985, 256, 500
# Ranks at which the lists needed are measured: powers of two, from the first to DEEPEST.
_FIRST, DEEPEST = 64, 8192
# One item in so many is in the sample, within these numbers.
_SAMPLE_EVERY, _LEAST_SAMPLE, _MOST_SAMPLE = 32, 4096, 16_384
# A filter that takes out so few for each of the k is not looked at closely: all of them may be the best.
_FEW = 0.1
# While this share of those down to the k-th that passes pass, they lie all over that ball; else in its shell.
_BALL = 0.6
# What a depth may be underestimated by: it rests on few rows of the sample.
_SAFETY = 1.5


@dataclass(frozen=True, slots=True)
class Reach:
    """Lists to probe, by rank."""

    ranks: tuple[int, ...]
    # So that the target is met for all items up to that rank ...
    best: tuple[int, ...]
    # ... and for those from half of it on alone: of about three quarters of it.
    at_rank: tuple[int, ...]
    lists: int

    @classmethod
    def everywhere(cls, lists: int) -> "Reach":
        """Not measured: all lists."""
        return cls((1,), (lists,), (lists,), lists)

    def of_best(self, k: int) -> int:
        """For the k best items."""
        return self._at(self.best, k)

    def of_passing(self, k: int, depth: int) -> int:
        """For k items of which the last is the `depth`-th of all."""
        return self.of_best(depth) if k >= _BALL * depth else self._at(self.at_rank, math.ceil(depth / 0.75))

    def _at(self, probes: tuple[int, ...], rank: int) -> int:
        if rank > self.ranks[-1]:
            # Beyond what was measured the lists grow with the items in them.
            return min(self.lists, math.ceil(probes[-1] * rank / self.ranks[-1]))
        return min(self.lists, math.ceil(np.interp(rank, self.ranks, probes)))


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of the items, to estimate by."""

    rows: Rows  # [s]
    vectors: Floats  # [s, d]
    # Items for each of the sample.
    weight: float

    @classmethod
    def of(cls, vectors: Floats, rows: Rows, seed: int = 0) -> "Sample":
        """Of the rows of `vectors` [n, d]."""
        wanted = min(_MOST_SAMPLE, max(_LEAST_SAMPLE, len(rows) // _SAMPLE_EVERY))
        taken = np.sort(np.random.default_rng(seed).choice(rows, min(len(rows), wanted), replace=False))
        return cls(taken, vectors[taken], len(rows) / max(1, len(taken)))

    def depth(self, queries: Floats, k: int, passing: Bits, excluded: int) -> int:
        """About how many items are at least as good as the k-th that passes, for the query where they are most.

        `excluded` are those that the filter takes out; `passing` may lack others that are removed from the index.
        """
        if excluded <= _FEW * k:
            return k + excluded
        scores = queries @ self.vectors.T
        inside = having(passing, self.rows)
        wanted = math.ceil(k / self.weight)
        if inside.sum() <= wanted:
            return math.ceil(self.weight * len(self.rows))
        worst = -np.partition(-scores[:, inside], wanted, axis=1)[:, wanted : wanted + 1]
        deepest = int((scores >= worst).sum(axis=1).max())
        return min(k + excluded, math.ceil(_SAFETY * self.weight * deepest))


def measure(centroid_ranks: Rows, lists: int) -> Reach:
    """The reach from how many lists are nearer than that of each exact neighbour [B, n], best neighbour first."""
    count = centroid_ranks.shape[1]
    ranks = [2**power for power in range(_FIRST.bit_length() - 1, DEEPEST.bit_length()) if 2**power < count] + [count]
    best = [_covering(centroid_ranks[:, :rank]) for rank in ranks]
    at_rank = [_covering(centroid_ranks[:, rank // 2 : rank]) for rank in ranks]
    # More is never asked for less: what a small sample says is smoothed that way.
    return Reach(
        tuple(ranks),
        tuple(np.maximum.accumulate(best).tolist()),
        tuple(np.maximum.accumulate(at_rank).tolist()),
        lists,
    )


def _covering(centroid_ranks: Rows) -> int:
    return int(np.quantile(centroid_ranks, RECALL_TARGET, method="higher")) + 1
