"""Writes merged candidates into a reply: in columns, or as messages. Called last of all by the retriever.

Invariant: both forms say the same. Columns exist because five hundred candidates are some twelve hundred messages,
which cost more to make and to read than the search for them.
"""

from collections.abc import Sequence

from candidate.merging import Merged
from headrace.v1.candidate_service_pb2 import CandidateProvenance, RetrieveCandidatesResponse


def fill_columns(response: RetrieveCandidatesResponse, merged: Merged, item_ids: Sequence[str]) -> None:
    """The form for callers in a hurry. `item_ids` by row."""
    response.item_ids.extend(_item_ids(merged, item_ids))
    response.scores.extend(merged.scores.tolist())
    for name, part in merged.proposals.items():
        proposals = response.proposals.add(source=name)
        proposals.candidates.extend(part.at.tolist())
        proposals.scores.extend(part.scores.tolist())
        proposals.ranks.extend(part.ranks.tolist())


def fill_messages(response: RetrieveCandidatesResponse, merged: Merged, item_ids: Sequence[str]) -> None:
    """The form for people and simple clients: everything about a candidate in one place. `item_ids` by row."""
    provenance: list[list[CandidateProvenance]] = [[] for _ in range(len(merged.rows))]
    for name, part in merged.proposals.items():
        for at, score, rank in zip(part.at.tolist(), part.scores.tolist(), part.ranks.tolist(), strict=True):
            provenance[at].append(CandidateProvenance(source=name, score=score, rank=rank))
    ids, scores = _item_ids(merged, item_ids), merged.scores.tolist()
    for item_id, score, proposed in zip(ids, scores, provenance, strict=True):
        response.candidates.add(item_id=item_id, score=score, provenance=proposed)


def _item_ids(merged: Merged, item_ids: Sequence[str]) -> list[str]:
    return [item_ids[row] for row in merged.rows.tolist()]
