"""Writes merged candidates into a reply: in columns, or as messages. Called last of all by the retriever.

Invariant: both forms say the same. Columns exist because five hundred candidates are some twelve hundred messages,
which cost more to make and to read than the search for them.
"""

from candidate.merging import Merged
from candidate.snapshot import Snapshot
from headrace.v1.candidate_service_pb2 import CandidateProvenance, RetrieveCandidatesResponse


def fill_columns(response: RetrieveCandidatesResponse, merged: Merged, snapshot: Snapshot) -> None:
    """The form for callers in a hurry."""
    response.item_ids.extend(_item_ids(merged, snapshot))
    response.scores.extend(merged.scores.tolist())
    for name, part in merged.proposals.items():
        proposals = response.proposals.add(source=name)
        proposals.candidates.extend(part.at.tolist())
        proposals.scores.extend(part.scores.tolist())
        proposals.ranks.extend(part.ranks.tolist())


def fill_messages(response: RetrieveCandidatesResponse, merged: Merged, snapshot: Snapshot) -> None:
    """The form for people and simple clients: everything about a candidate in one place."""
    provenance: list[list[CandidateProvenance]] = [[] for _ in range(len(merged.rows))]
    for name, part in merged.proposals.items():
        for at, score, rank in zip(part.at.tolist(), part.scores.tolist(), part.ranks.tolist(), strict=True):
            provenance[at].append(CandidateProvenance(source=name, score=score, rank=rank))
    ids, scores = _item_ids(merged, snapshot), merged.scores.tolist()
    for item_id, score, proposed in zip(ids, scores, provenance, strict=True):
        response.candidates.add(item_id=item_id, score=score, provenance=proposed)


def _item_ids(merged: Merged, snapshot: Snapshot) -> list[str]:
    return [snapshot.catalog.item_ids[row] for row in merged.rows.tolist()]
