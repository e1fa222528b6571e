"""Retrieve: candidates from the candidate service and the user's batch scores, merged.

Second stage. Invariant: each item comes once, with every source that proposed it; a source that is away is left out
and named, never waited for past the stage's budget.
"""

from typing import Protocol

import numpy as np

from core.errors import StageError
from features.catalog import Catalog
from headrace.v1 import types_pb2 as types
from headrace.v1.candidate_service_pb2 import RetrieveCandidatesRequest, RetrieveCandidatesResponse
from headrace.v1.types_pb2 import ItemFilter
from serving.clients import CandidateClient
from serving.query import SOURCE_BIT, Candidates, Query, Staged, UserFeatures
from serving.trace import Drop, Removed

# Reciprocal rank fusion: an item's score is the sum over its sources of 1 / (60 + rank), which needs no common
# scale of the sources' scores. Source: Cormack, Clarke and Buettcher, SIGIR 2009, who also give the 60.
FUSION = 60.0
_NO_SOURCE = (0.0, 0.0, 0.0, 0)


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
        merged = _Merger(query.release.catalog)
        try:
            response = await self._client.retrieve(self._request(query, user), query.budget)
        except StageError as error:
            query.trace.blame(error)
        else:
            _note(query, response)
            merged.add_response(response)
        merged.add_batch(user)
        pins = query.release.rules.pins(query.surface, user.segment)
        merged.add_rows([query.release.catalog.row(pin.item_id) for pin in pins])
        return _capped(merged.candidates(), query.num_candidates + len(pins))

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


class _Merger:
    """Candidates by catalogue row, in the order of their first source."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        # row -> retrieval score, fused score, batch score, source bits
        self._entries: dict[int, tuple[float, float, float, int]] = {}

    def add_response(self, response: RetrieveCandidatesResponse) -> None:
        """Adds what the candidate service found; to be called first."""
        count = len(response.item_ids)
        fused, bits = np.zeros(count), np.zeros(count, np.int32)
        for part in response.proposals:
            at = np.array(part.candidates, np.intp)
            fused[at] += 1.0 / (FUSION + np.array(part.ranks))
            bits[at] |= SOURCE_BIT.get(part.source, 0)
        columns = (self._catalog.rows(response.item_ids).tolist(), response.scores, fused.tolist(), bits.tolist())
        for row, score, fused_score, source_bits in zip(*columns, strict=True):
            # A row below 0: upserted a moment ago, not here yet; it has no title and no known availability.
            if row >= 0:
                self._entries[row] = (score, fused_score, 0.0, source_bits)

    def add_batch(self, user: UserFeatures) -> None:
        batch = SOURCE_BIT["batch"]
        rows = self._catalog.rows(user.batch_item_ids).tolist()
        for rank, (row, score) in enumerate(zip(rows, user.batch_scores, strict=False)):
            if row >= 0:
                retrieval, fused, _, bits = self._entries.get(row, _NO_SOURCE)
                self._entries[row] = (retrieval, fused + 1.0 / (FUSION + rank), score, bits | batch)

    def add_rows(self, rows: list[int]) -> None:
        for row in rows:
            if row >= 0:
                self._entries.setdefault(row, _NO_SOURCE)

    def candidates(self) -> Candidates:
        if not self._entries:
            return Candidates.of_rows(np.empty(0, np.int32))
        retrieval, fused, batch, bits = zip(*self._entries.values(), strict=True)
        return Candidates(
            np.fromiter(self._entries, np.int32, len(self._entries)),
            np.array(retrieval, np.float32),
            np.array(fused, np.float32),
            np.array(batch, np.float32),
            np.array(bits, np.int32),
        )


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
