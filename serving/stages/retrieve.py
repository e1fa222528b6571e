"""Retrieve: candidates from the candidate service and the user's batch scores, merged.

Second stage. Invariant: each item comes once, with every source that proposed it; a source that is away is left out
and named, never waited for past the stage's budget.
"""

from typing import Protocol

import numpy as np

from core.errors import StageError
from features.catalog import Catalog, Rows
from headrace.v1 import types_pb2 as types
from headrace.v1.candidate_service_pb2 import RetrieveCandidatesRequest, RetrieveCandidatesResponse
from headrace.v1.types_pb2 import ItemFilter
from serving.clients import CandidateClient
from serving.query import SOURCE_BIT, Candidates, Query, Staged, UserFeatures, places_of
from serving.trace import Drop, Removed

# Reciprocal rank fusion: an item's score is the sum over its sources of 1 / (60 + rank), which needs no common
# scale of the sources' scores. Source: Cormack, Clarke and Buettcher, SIGIR 2009, who also give the 60.
FUSION = 60.0


class Retriever(Protocol):
    """Finds candidates."""

    async def retrieve(self, query: Query, user: UserFeatures) -> Staged:
        """Never fails: what could not be asked is missing, and the trace says why."""
        ...


class MergingRetriever:
    """Asks the candidate service and adds the batch scores of the user's row."""

    def __init__(self, client: CandidateClient) -> None:
        self._client = client

    async def retrieve(self, query: Query, user: UserFeatures) -> Staged:
        if query.page.snapshot is not None:
            # A later page ranks what the first one found: nothing is skipped, nothing comes in between.
            return Staged(query.page.snapshot)
        catalog = query.release.catalog
        found = Candidates.of_rows(np.empty(0, np.int32))
        try:
            response = await self._client.retrieve(self._request(query, user), query.budget)
        except StageError as error:
            query.trace.blame(error)
        else:
            _note(query, response)
            found = _of_response(response, catalog)
        pins = query.release.rules.pins(query.surface, user.segment)
        found = _with_pins(_with_batch(found, user, catalog), catalog.rows(pin.item_id for pin in pins))
        return _capped(found, query.num_candidates + len(pins))

    def _request(self, query: Query, user: UserFeatures) -> RetrieveCandidatesRequest:
        return RetrieveCandidatesRequest(
            user_id=user.user_id,
            embedding=user.vector,
            embedding_version=user.embedding_version,
            embedding_revision=user.embedding_revision,
            state=user.state_bytes,
            num_candidates=query.num_candidates,
            filter=_worth_sending(query.request.filter),
            context=query.request.context,
            segment=user.segment,
            probe_item_ids=[query.probe_item_id] if query.probe_item_id else [],
            columns=True,
        )


def _of_response(response: RetrieveCandidatesResponse, catalog: Catalog) -> Candidates:
    """What the candidate service found."""
    rows = catalog.rows(response.item_ids)
    fused, bits = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int32)
    for part in response.proposals:
        at = np.array(part.candidates, np.intp)
        fused[at] += 1.0 / (FUSION + np.array(part.ranks))
        bits[at] |= SOURCE_BIT.get(part.source, 0)
    found = Candidates(rows, np.array(response.scores, np.float32), fused, np.zeros(len(rows), np.float32), bits)
    # A row below 0: upserted a moment ago, not here yet; it has no title and no known availability.
    return found if (rows >= 0).all() else found.take(rows >= 0)


def _with_batch(found: Candidates, user: UserFeatures, catalog: Catalog) -> Candidates:
    """With the user's batch scores: those of items that were found, and the others as candidates of their own."""
    if not len(user.batch_item_ids):
        return found
    scores = np.array(user.batch_scores, np.float32)
    rows = catalog.rows(user.batch_item_ids)[: len(scores)]
    _, first = np.unique(rows, return_index=True)
    ranks = np.sort(first[rows[first] >= 0])
    rows, scores = rows[ranks], scores[ranks]
    fused = (1.0 / (FUSION + ranks)).astype(np.float32)
    at = places_of(rows, found.rows)
    known, more = at >= 0, at < 0
    found.fused[at[known]] += fused[known]
    found.batch[at[known]] = scores[known]
    found.source_bits[at[known]] |= SOURCE_BIT["batch"]
    bits = np.full(int(more.sum()), SOURCE_BIT["batch"], np.int32)
    return found.with_more(Candidates(rows[more], np.zeros(len(bits), np.float32), fused[more], scores[more], bits))


def _with_pins(found: Candidates, rows: Rows) -> Candidates:
    """With the rules' pins, which have no source."""
    if not len(rows):
        return found
    missing = rows[(rows >= 0) & (places_of(rows, found.rows) < 0)]
    return found.with_more(Candidates.of_rows(np.unique(missing))) if len(missing) else found


def _capped(candidates: Candidates, limit: int) -> Staged:
    """The candidates that may go on to the ranker: those on which the sources agree most."""
    if len(candidates) <= limit:
        return Staged(candidates)
    # Pins have no source and stay.
    order = np.argsort(-np.where(candidates.source_bits == 0, np.inf, candidates.fused), kind="stable")
    kept, dropped = np.sort(order[:limit]), order[limit:]
    ranks = np.arange(limit, len(candidates), dtype=np.int32)
    reason = f"beyond the {limit} best retrieved"
    removed = Removed(reason, candidates.rows[dropped], ranks, candidates.fused[dropped])
    return Staged(candidates.take(kept), (removed,))


def _worth_sending(item_filter: ItemFilter) -> ItemFilter | None:
    return item_filter if item_filter.ByteSize() else None


def _note(query: Query, response: RetrieveCandidatesResponse) -> None:
    trace = query.trace
    trace.index_version = response.index_version
    trace.embedding_version = response.embedding_version
    trace.bundle_versions.add(response.bundle_version)
    if response.missing_sources or response.missing_shards:
        trace.degrade(types.DEGRADED_REASON_FEW_CANDIDATES)
    for probe in response.probes:
        if probe.item_id == query.probe_item_id:
            reason = probe.decided_by or ("not retrieved" if probe.known else "the index does not know it")
            rank = probe.exact_rank if probe.HasField("exact_rank") else None
            score = probe.exact_score if probe.HasField("exact_score") else None
            trace.probe = Drop("retrieve", reason, rank, score)
