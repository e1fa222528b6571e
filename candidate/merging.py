"""Merges what the sources bring: each item once, every source its share, and who proposed what at which rank.

Called by the retriever. Arrays in, arrays out. Invariant: the best score of an item is the one that the ranker was
trained with ("best score wins"), and the result depends on the hits alone, not on who was asked first.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from candidate.sources import Floats, Hits, Rows
from features.vectors import SOURCES


class Proposals(NamedTuple):
    """What one source proposed of the merged candidates, in its order. All [n]."""

    # Places among the candidates.
    at: Rows
    scores: Floats
    # In the source's own order, 0 = first.
    ranks: Rows


class Merged(NamedTuple):
    """C candidates, best first: rows, and the score of the best source of each; [C], [C]."""

    rows: Rows
    scores: Floats
    proposals: dict[str, Proposals]


def proposers(merged: Merged, row: int) -> str:
    """Who proposed a candidate, at which rank: "ann (rank 3), trending (rank 0)"; nothing where it is none."""
    at = np.flatnonzero(merged.rows == row)
    found = [
        f"{name} (rank {part.ranks[np.flatnonzero(part.at == at[0])[0]]})"
        for name, part in merged.proposals.items()
        if len(at) and at[0] in part.at
    ]
    return ", ".join(found)


def merge(hits: Mapping[str, Hits], quotas: Mapping[str, int], limit: int) -> Merged:
    """Merges hits, at most `limit` items.

    Sources take turns in proportion to their quotas: an item's turn is rank / quota at the source where that is least.
    So where the limit is below the sum of the quotas, each source keeps about its share.
    """
    names = sorted(hits, key=SOURCES.index)
    if not names:
        return Merged(np.zeros(0, np.int64), np.zeros(0, np.float32), {})
    turns = np.concatenate([np.arange(len(hits[name].rows)) / max(1, quotas.get(name, 0)) for name in names])
    proposed = np.concatenate([hits[name].rows for name in names])[np.argsort(turns, kind="stable")]
    # The first place of each row is the one of its earliest turn.
    distinct, first = np.unique(proposed, return_index=True)
    in_turn = np.argsort(first)[:limit]
    rows, scores = distinct[in_turn], np.full(len(in_turn), -np.inf, np.float32)
    place_of = np.full(len(distinct), -1, np.int64)
    place_of[in_turn] = np.arange(len(in_turn))
    proposals = {}
    for name in names:
        at = place_of[np.searchsorted(distinct, hits[name].rows)]
        ranks = np.flatnonzero(at >= 0)
        at, of_source = at[ranks], hits[name].scores[ranks]
        scores[at] = np.maximum(scores[at], of_source)
        proposals[name] = Proposals(at, of_source, ranks)
    return Merged(rows, scores, proposals)


def scaled_quotas(quotas: Mapping[str, int], running: Sequence[str], wanted: int) -> dict[str, int]:
    """The settings' quotas of the sources that can bring something, raised together until they can fill `wanted`."""
    chosen = {name: quotas.get(name, 0) for name in running}
    total = sum(chosen.values())
    factor = max(1.0, wanted / total) if total else 1.0
    return {name: min(wanted, round(quota * factor + 0.5) if quota else 0) for name, quota in chosen.items()}
