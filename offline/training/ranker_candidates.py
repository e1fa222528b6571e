"""Candidates for the ranker's training rows, as the candidate service would have brought them at that time.

The sources over whole arrays: the user's vector against all items, items near the newest interactions, what trends,
what is new. Invariant: uses only what was known at the question's time: the state before it, items that existed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from candidate.co_visitation import CoVisitation
from candidate.encoder import UserEncoder
from core.settings import Settings
from features import windows
from features.catalog import Catalog, Floats, Rows
from features.vectors import SOURCES
from features.windows import UserState

ANN, ITEM_TO_ITEM, CO_VISITATION, TRENDING, NEW = (
    1 << SOURCES.index(name) for name in ("ann", "item_to_item", "co_visitation", "trending", "new")
)
Mask = npt.NDArray[np.bool_]


class Pool(NamedTuple):
    """What would be retrieved for a user, best first."""

    # Unit vector [d], or None where no item of the history is known.
    user_vector: Floats | None
    rows: Rows
    scores: Floats
    source_bits: Rows
    # What each source brought, best first.
    lists: Sequence[Rows] = ()


class Moment(NamedTuple):
    """What there was to recommend at a time."""

    # Which items could be recommended [n], and their short-term popularity [n].
    known: Mask
    popularity: Floats
    publish_ms: npt.NDArray[np.int64]
    # Which items went together by then, and what time it was.
    pairs: CoVisitation | None = None
    now_ms: int = 0


class CandidateSources:
    """The sources, over the first n rows of a catalogue: those with a vector."""

    def __init__(self, encoder: UserEncoder, item_vectors: Floats, settings: Settings) -> None:
        self._encoder = encoder
        self._vectors = item_vectors
        self._tensor = torch.from_numpy(item_vectors)
        self._quotas = settings.candidate.quotas
        self._seeds = settings.candidate.item_to_item_seeds
        self._positive = frozenset(settings.features.positive_kinds)

    def pools(self, states: Sequence[UserState], catalog: Catalog, moment: Moment) -> list[Pool]:
        """Retrieves for B users at one moment; what the user has in the history is left in."""
        users, has_vector = self._encoder.encode(states, catalog, self._vectors)
        hidden = torch.from_numpy(~moment.known)
        ann = self._best(torch.from_numpy(users) @ self._tensor.T, hidden, self._quotas.get("ann", 0))
        seeds = np.stack([self._seed_vectors(state, catalog) for state in states])
        near = (torch.from_numpy(seeds) @ self._tensor.T).amax(1)
        item_to_item = self._best(near, hidden, self._quotas.get("item_to_item", 0))
        trending, new = self._trending(moment), self._new(moment)
        pools = []
        for index in range(len(states)):
            merged = _Merge(len(self._vectors))
            if has_vector[index]:
                merged.add(ANN, *ann[index])
            if seeds[index].any():
                merged.add(ITEM_TO_ITEM, *item_to_item[index])
            merged.add(CO_VISITATION, *self._going_together(states[index], catalog, moment))
            merged.add(TRENDING, *trending)
            merged.add(NEW, *new)
            pools.append(merged.pool(users[index] if has_vector[index] else None))
        return pools

    @property
    def item_count(self) -> int:
        return len(self._vectors)

    def provenance(self, pool: Pool, rows: Rows) -> tuple[Floats, Rows]:
        """Retrieval scores and source bits of chosen rows, [C] each; of what no source brought, as if ANN had."""
        order = np.argsort(pool.rows, kind="stable")
        at = np.minimum(np.searchsorted(pool.rows[order], rows), max(0, len(order) - 1))
        scores: Floats = np.zeros(len(rows), np.float32)
        bits: Rows = np.full(len(rows), ANN, np.int32)
        if pool.user_vector is not None:
            scores[:] = self._vectors[rows] @ pool.user_vector
        if len(order):
            found = pool.rows[order[at]] == rows
            scores[found] = pool.scores[order[at]][found]
            bits[found] = pool.source_bits[order[at]][found]
        return scores, bits

    def by_vector(self, pool: Pool) -> Floats:
        """What the user's vector makes of each candidate, the pool's own scores where there is none, [C]."""
        return pool.scores if pool.user_vector is None else self._vectors[pool.rows] @ pool.user_vector

    def _best(self, scores: torch.Tensor, hidden: torch.Tensor, count: int) -> list[tuple[Rows, Floats]]:
        top = scores.masked_fill_(hidden, -torch.inf).topk(min(count, scores.shape[1]), 1)
        rows, values = top.indices.numpy().astype(np.int32), top.values.numpy()
        found = np.isfinite(values)
        return [(rows[i][found[i]], values[i][found[i]]) for i in range(len(rows))]

    def _seed_vectors(self, state: UserState, catalog: Catalog) -> Floats:
        rows = catalog.rows(windows.recent_items(state)[: self._seeds])
        rows = rows[(rows >= 0) & (rows < len(self._vectors))]
        out = np.zeros((self._seeds, self._vectors.shape[1]), np.float32)
        out[: len(rows)] = self._vectors[rows]
        return out

    def _going_together(self, state: UserState, catalog: Catalog, moment: Moment) -> tuple[Rows, Floats]:
        """As candidate.sources.CoVisitationSource."""
        if moment.pairs is None:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        recent = windows.recent_items(state, self._positive)[: self._seeds]
        names, similarity = moment.pairs.similar(recent, moment.now_ms)
        rows = catalog.rows(names)
        known = np.flatnonzero((rows >= 0) & (rows < len(moment.known)))
        known = known[moment.known[rows[known]]]
        best = known[np.lexsort((rows[known], -similarity[known]))[: self._quotas.get("co_visitation", 0)]]
        return rows[best], similarity[best].astype(np.float32)

    def _trending(self, moment: Moment) -> tuple[Rows, Floats]:
        popularity = np.where(moment.known, moment.popularity, np.float32(0))
        count = min(self._quotas.get("trending", 0), int((popularity > 0).sum()))
        rows = _top(popularity, count)
        values: Floats = popularity[rows]
        values /= np.float32(max(float(values.max(initial=0.0)), 1e-9))
        return rows, values

    def _new(self, moment: Moment) -> tuple[Rows, Floats]:
        publish_ms = np.where(moment.known, moment.publish_ms, 0)
        count = min(self._quotas.get("new", 0), int((publish_ms > 0).sum()))
        rows = _top(publish_ms, count)
        return rows, np.zeros(len(rows), np.float32)


def draw(pool: Pool, by_vector: Floats, avoid: Rows, count: int, rng: np.random.Generator) -> tuple[Rows, Floats]:
    """Candidates of a retrieved list, at most `count`, and how many of it each stands for.

    Half are the first by the user's vector, which decide the order's head and stand for themselves; the others are
    drawn from the rest. So a loss over them, each counted with its weight, is one over the whole list.
    """
    free = np.flatnonzero(~np.isin(pool.rows, avoid))
    free = free[np.argsort(-by_vector[free], kind="stable")]
    head, rest = free[: count // 2], free[count // 2 :]
    drawn = rng.permutation(rest)[: count - len(head)]
    weights = np.ones(len(head) + len(drawn), np.float32)
    weights[len(head) :] = len(rest) / max(1, len(drawn))
    return pool.rows[np.concatenate([head, drawn])], weights


def _top(values: npt.NDArray[Any], count: int) -> Rows:
    """Rows of the `count` largest, best first."""
    rows = np.argpartition(-values, count - 1)[:count] if count else np.zeros(0, np.int64)
    best: Rows = rows[np.argsort(-values[rows], kind="stable")].astype(np.int32)
    return best


class _Merge:
    """Candidates of several sources: each item once, with its best score and all its sources."""

    def __init__(self, count: int) -> None:
        self._scores = np.full(count, -np.inf, np.float32)
        self._bits = np.zeros(count, np.int32)
        self._lists: list[Rows] = []

    def add(self, source: int, rows: Rows, scores: Floats) -> None:
        self._lists.append(rows)
        self._scores[rows] = np.maximum(self._scores[rows], scores)
        self._bits[rows] |= source

    def pool(self, user_vector: Floats | None) -> Pool:
        rows = np.flatnonzero(self._bits).astype(np.int32)
        rows = rows[np.argsort(-self._scores[rows], kind="stable")]
        return Pool(user_vector, rows, self._scores[rows], self._bits[rows], self._lists)
