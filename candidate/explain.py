"""Where any item stands for a user, and what let it in or kept it out of an answer.

Called by the retriever for a request's probes, with what that very request was answered from. Invariant: ranks and
scores are exact, counted over all items, whatever the index approximates and the quotas cut off.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from candidate.attributes import Mask
from candidate.merging import Merged, proposers
from candidate.snapshot import Snapshot
from candidate.sources import CandidateSource, Hits, Place, Query
from headrace.v1.candidate_service_pb2 import CandidateProbe, CandidateProvenance

CUT_OFF = "num_candidates: other candidates took their turn first"


class Answered(NamedTuple):
    """What a request was answered from."""

    snapshot: Snapshot
    query: Query
    # The first one: which items may be recommended at all; then the parts of the filter.
    masks: Sequence[Mask]
    sources: Sequence[CandidateSource]
    quotas: Mapping[str, int]
    hits: Mapping[str, Hits]
    # Sources that were late or failed.
    missing: Sequence[str]
    merged: Merged


def probe(item_id: str, answered: Answered) -> CandidateProbe:
    """One item's exact rank and score, its place in every source, and what decided."""
    snapshot, query = answered.snapshot, answered.query
    row = snapshot.catalog.row(item_id)
    if row < 0 or row >= len(query.allowed):
        return CandidateProbe(item_id=item_id, known=False, decided_by="unknown item")
    found = CandidateProbe(item_id=item_id, known=True)
    if query.user_vector is not None:
        servable = answered.masks[0].passing
        scores = snapshot.vectors[: len(servable)] @ query.user_vector
        found.exact_score = float(scores[row])
        found.exact_rank = int(np.count_nonzero(scores[servable] > scores[row]))
    found.blocked_by.extend(mask.name for mask in answered.masks if not mask.passing[row])
    places = {source.name: source.place(snapshot, query, row) for source in answered.sources}
    for name, place in places.items():
        if place is not None:
            found.places.append(CandidateProvenance(source=name, score=place.score, rank=place.rank))
    found.decided_by = _decision(row, found.blocked_by, places, answered)
    return found


def _decision(row: int, blocked_by: Sequence[str], places: Mapping[str, Place | None], answered: Answered) -> str:
    chosen = proposers(answered.merged, row)
    if chosen:
        return f"source {chosen}"
    if blocked_by:
        return blocked_by[0]
    if any(row in hits.rows for hits in answered.hits.values()):
        return CUT_OFF
    known = [CandidateProvenance(source=n, score=p.score, rank=p.rank) for n, p in places.items() if p is not None]
    return beyond_quotas(known, answered.quotas, answered.missing)


def beyond_quotas(places: Iterable[CandidateProvenance], quotas: Mapping[str, int], missing: Sequence[str]) -> str:
    """Why no source proposed an item that passes the filter, from its places."""
    reasons = [_reason(place.source, place.rank, quotas.get(place.source, 0), missing) for place in places]
    return "quota: " + ("; ".join(reasons) or "no source knows it for this user")


def _reason(source: str, rank: int, quota: int, missing: Sequence[str]) -> str:
    if source in missing:
        return f"{source} has it at rank {rank}, but was late or failed"
    if rank < quota:
        return f"{source} has it at rank {rank} of its {quota}, but the approximate search missed it"
    return f"{source} has it at rank {rank}, its quota is {quota}"
