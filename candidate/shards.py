"""One index over several candidate processes: each searches the items that hash to it, whoever is asked asks the rest.

Between the gRPC adapter and the retriever, where `candidate.shard_targets` names more than one process. Every process
follows the whole catalogue (a history may hold any item, and popularity is everybody's), so only the sources that
search vectors are spread. Invariant: the answer is that of one index over all items, but for shards that are away, late
or of another release: those are named in `missing_shards`, and the others' items are the answer.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

import grpc
import numpy as np

from candidate import metrics
from candidate.explain import CUT_OFF, beyond_quotas
from candidate.merging import merge, proposers, scaled_quotas
from candidate.reply import fill_columns, fill_messages
from candidate.requests import MAX_CANDIDATES
from candidate.shard import Shard
from candidate.sources import Hits
from core.deadline import Deadline
from core.grpc_runtime import channel
from core.settings import CandidateSettings
from core.telemetry import get_logger
from headrace.v1.candidate_service_pb2 import (
    CandidateProbe,
    RetrieveCandidatesRequest,
    RetrieveCandidatesResponse,
)
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub

_log = get_logger("candidate")
# The sources that search the index, and so are spread over the shards.
SPREAD = ("ann", "item_to_item")
# Marks a call from another shard: it is answered from the own items alone.
_MARK = ("x-headrace-shard", "1")
# What others may take of the caller's time: the rest is for merging, and for the way back. One that did not answer last
# time is not waited for as long.
_SHARE, _SHARE_WHEN_AWAY = 0.8, 0.2

Local = Callable[[RetrieveCandidatesRequest], Awaitable[RetrieveCandidatesResponse]]


class Answer(NamedTuple):
    """What one shard says."""

    shard: int
    response: RetrieveCandidatesResponse


class Shards:
    """The other processes. Used from one event loop."""

    def __init__(self, settings: CandidateSettings) -> None:
        self._shard = Shard.of(settings)
        self._quotas = {str(name): quota for name, quota in settings.quotas.items()}
        self._channels = {
            number: channel(target) for number, target in enumerate(settings.shard_targets) if number != settings.shard
        }
        self._targets = tuple(settings.shard_targets)
        self._away: set[int] = set()

    async def close(self) -> None:
        await asyncio.gather(*(connection.close(None) for connection in self._channels.values()))

    async def retrieve(
        self, request: RetrieveCandidatesRequest, deadline: Deadline, local: Local
    ) -> RetrieveCandidatesResponse:
        """The answer of all shards. What the own one raises is raised; what others raise makes them missing."""
        ours = _in_columns(request)
        theirs = _in_columns(request)
        if not request.probe_item_ids:
            # The other sources are the same everywhere; but who is to explain what they did must ask them.
            theirs.source_quotas.clear()
            theirs.source_quotas.update(self._spread_quotas(request))
            # All that their sources bring: what is cut off is decided here.
            theirs.num_candidates = min(MAX_CANDIDATES, max(1, sum(theirs.source_quotas.values())))
        left_seconds = deadline.remaining_ms() / 1000
        asked = [asyncio.create_task(self._ask(number, theirs, left_seconds)) for number in self._channels]
        try:
            first = Answer(self._shard.number, await local(ours))
            others = [answer for answer in await asyncio.gather(*asked) if answer is not None]
        finally:
            for task in asked:
                task.cancel()
        others = [answer for answer in others if self._agrees(first, answer)]
        answered = {answer.shard for answer in (first, *others)}
        missing = [f"{number} ({target})" for number, target in enumerate(self._targets) if number not in answered]
        return combined(request, first, others, missing, self._shard)

    def _spread_quotas(self, request: RetrieveCandidatesRequest) -> Mapping[str, int]:
        if request.source_quotas:
            return {name: request.source_quotas.get(name, 0) for name in SPREAD}
        return scaled_quotas(self._quotas, SPREAD, request.num_candidates)

    async def _ask(self, number: int, request: RetrieveCandidatesRequest, left_seconds: float) -> Answer | None:
        stub = CandidateServiceStub(self._channels[number])
        timeout = left_seconds * (_SHARE_WHEN_AWAY if number in self._away else _SHARE)
        try:
            answer = Answer(number, await stub.RetrieveCandidates(request, timeout=timeout, metadata=(_MARK,)))
        except grpc.aio.AioRpcError as error:
            metrics.shards_missing.labels(str(number)).inc()
            if number not in self._away:
                _log.warning("a shard is away", shard=number, target=self._targets[number], problem=error.details())
            self._away.add(number)
            return None
        if number in self._away:
            _log.info("a shard is back", shard=number, target=self._targets[number])
            self._away.discard(number)
        return answer

    def _agrees(self, ours: Answer, theirs: Answer) -> bool:
        """Whether both answer from one release; scores of different towers are not to be compared."""
        same = (
            ours.response.embedding_version == theirs.response.embedding_version
            and ours.response.index_version == theirs.response.index_version
        )
        if not same:
            metrics.shards_missing.labels(str(theirs.shard)).inc()
        return same


def is_from_shard(context: grpc.ServicerContext) -> bool:
    """Whether the caller is another shard."""
    return _MARK in tuple(context.invocation_metadata() or ())


def combined(
    request: RetrieveCandidatesRequest,
    first: Answer,
    others: Sequence[Answer],
    missing: Sequence[str],
    shard: Shard,
) -> RetrieveCandidatesResponse:
    """One answer of several, all in columns: the vector sources of all shards, the other sources of the first."""
    row_of: dict[str, int] = {}
    parts: dict[str, list[Hits]] = {}
    for answer in (first, *others):
        items = np.array([row_of.setdefault(item_id, len(row_of)) for item_id in answer.response.item_ids], np.int64)
        for proposals in answer.response.proposals:
            if answer is first or proposals.source in SPREAD:
                at = np.array(proposals.candidates, np.int64)
                parts.setdefault(proposals.source, []).append(Hits(items[at], np.array(proposals.scores, np.float32)))
    quotas = first.response.source_quotas
    merged = merge({name: _best(of, quotas[name]) for name, of in parts.items()}, quotas, request.num_candidates)
    response = RetrieveCandidatesResponse(
        index_version=first.response.index_version,
        embedding_version=first.response.embedding_version,
        bundle_version=first.response.bundle_version,
        encoded_on_the_spot=first.response.encoded_on_the_spot,
        state_revision=first.response.state_revision,
        missing_sources=first.response.missing_sources,
        missing_shards=missing,
        source_quotas=quotas,
    )
    fill = fill_columns if request.columns else fill_messages
    item_ids = list(row_of)
    fill(response, merged, item_ids)
    answers = {answer.shard: answer.response for answer in (first, *others)}
    for place, item_id in enumerate(request.probe_item_ids):
        chosen = proposers(merged, row_of.get(item_id, -1))
        found = _probe(place, item_id, answers, chosen, shard.owner(item_id))
        # Its own shard proposed it; among the items of all shards it may be beyond every quota.
        within = [part for part in found.places if part.rank < quotas.get(part.source, 0)]
        if found.decided_by == CUT_OFF and found.places and not within:
            found.decided_by = beyond_quotas(found.places, quotas, first.response.missing_sources)
        response.probes.append(found)
    return response


def _in_columns(request: RetrieveCandidatesRequest) -> RetrieveCandidatesRequest:
    copy = RetrieveCandidatesRequest()
    copy.CopyFrom(request)
    copy.columns = True
    return copy


def _best(parts: Sequence[Hits], quota: int) -> Hits:
    """The best of what the shards' sources brought; each item is one shard's own."""
    if len(parts) == 1:
        return parts[0]
    rows, scores = np.concatenate([part.rows for part in parts]), np.concatenate([part.scores for part in parts])
    order = np.argsort(-scores, kind="stable")[:quota]
    return Hits(rows[order], scores[order])


def _probe(
    place: int, item_id: str, answers: Mapping[int, RetrieveCandidatesResponse], chosen: str, owner: int
) -> CandidateProbe:
    """What the item's own shard says of it: that one alone knows whether its index had it."""
    if owner not in answers:
        return CandidateProbe(item_id=item_id, known=False, decided_by=f"shard {owner} is away")
    probe = CandidateProbe()
    probe.CopyFrom(answers[owner].probes[place])
    if chosen:
        probe.decided_by = f"source {chosen}"
    elif probe.decided_by.startswith("source "):
        probe.decided_by = CUT_OFF
    return probe
