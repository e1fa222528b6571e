"""The work behind the RPCs: users to vectors, filter to a mask, sources fanned out and merged. No transport.

Runs on the worker threads, against one snapshot from beginning to end. Invariant: a stored vector is used only when it
is of the snapshot's embedding version and not older than the state; else the user is encoded from the state here.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from candidate import metrics
from candidate.attributes import Mask, rows_mask
from candidate.executor import Job
from candidate.explain import Answered, probe
from candidate.merging import merge, scaled_quotas
from candidate.reply import fill_columns, fill_messages
from candidate.requests import decode_state, embedding_of, time_of
from candidate.snapshot import Snapshot
from candidate.sources import CandidateSource, Hits, Query
from core.clock import Clock
from core.errors import StageTimeoutError
from core.settings import Settings
from core.telemetry import get_logger
from features import windows
from features.windows import UserState
from headrace.v1.candidate_service_pb2 import (
    EncodedUser,
    EncodeUsersRequest,
    EncodeUsersResponse,
    RetrieveCandidatesRequest,
    RetrieveCandidatesResponse,
)

_log = get_logger("candidate")

Floats = npt.NDArray[np.float32]


class _User(NamedTuple):
    state: UserState
    # None where no item of the history is known.
    vector: Floats | None
    was_encoded: bool


class Retriever:
    """Answers requests from a snapshot. Safe from several threads."""

    def __init__(self, settings: Settings, sources: Sequence[CandidateSource], clock: Clock) -> None:
        self._settings = settings
        self._positive = frozenset(settings.features.positive_kinds)
        self._sources = sources
        self._budget_ms = {str(name): budget for name, budget in settings.candidate.source_budget_ms.items()}
        self._default_quotas: Mapping[str, int] = {str(k): v for k, v in settings.candidate.quotas.items()}
        self._clock = clock

    def retrieve(self, request: RetrieveCandidatesRequest, snapshot: Snapshot, job: Job) -> RetrieveCandidatesResponse:
        """Candidates for one checked request.

        Raises:
            InvalidRequestError: a field that only the snapshot can judge (dimension, attribute names, state).
            StageTimeoutError: the call was over before anything was found.
        """
        now_ms = time_of(request, self._clock)
        user = self._user(request, snapshot)
        masks = self._masks(request, snapshot, user.state, now_ms)
        query = self._query(snapshot, user, masks, now_ms)
        quotas = self._quotas(request, query)
        hits, missing = self._fan_out(snapshot, query, quotas, job)
        merged = merge(hits, quotas, request.num_candidates)
        response = RetrieveCandidatesResponse(
            index_version=snapshot.manifest.index_version,
            embedding_version=snapshot.embedding_version,
            bundle_version=snapshot.manifest.bundle_version,
            encoded_on_the_spot=user.was_encoded,
            state_revision=user.state.revision,
            missing_sources=missing,
            source_quotas=quotas,
        )
        if request.columns:
            fill_columns(response, merged, snapshot.catalog.item_ids)
        else:
            fill_messages(response, merged, snapshot.catalog.item_ids)
        answered = Answered(snapshot, query, masks, self._sources, quotas, hits, missing, merged)
        for item_id in request.probe_item_ids:
            job.check()
            response.probes.append(probe(item_id, answered))
        return response

    def encode(self, request: EncodeUsersRequest, snapshot: Snapshot, job: Job) -> EncodeUsersResponse:
        """Vectors of checked users, a batch at a time; stops between batches where the call is over."""
        response = EncodeUsersResponse(embedding_version=snapshot.embedding_version)
        size = self._settings.candidate.encode_batch_users
        for start in range(0, len(request.users), size):
            job.check()
            users = request.users[start : start + size]
            states = [decode_state(f"users[{start + at}].state", user.state) for at, user in enumerate(users)]
            vectors, known = snapshot.encoder.encode(states, snapshot.catalog, snapshot.vectors)
            for user, state, vector, is_known in zip(users, states, vectors, known, strict=True):
                embedding = vector.tolist() if is_known else None
                response.users.append(EncodedUser(user_id=user.user_id, embedding=embedding, revision=state.revision))
            metrics.encoded_users.labels("EncodeUsers").inc(len(users))
        return response

    def _user(self, request: RetrieveCandidatesRequest, snapshot: Snapshot) -> _User:
        state = decode_state("state", request.state)
        is_ours = request.embedding_version == snapshot.embedding_version
        stored = embedding_of(request, snapshot.dimension, is_ours)
        if is_ours and stored.any() and request.embedding_revision >= state.revision:
            return _User(state, stored, was_encoded=False)
        if not state.history:
            return _User(state, None, was_encoded=False)
        vectors, known = snapshot.encoder.encode([state], snapshot.catalog, snapshot.vectors)
        metrics.encoded_users.labels("RetrieveCandidates").inc()
        return _User(state, vectors[0] if known[0] else None, was_encoded=True)

    def _masks(
        self, request: RetrieveCandidatesRequest, snapshot: Snapshot, state: UserState, now_ms: int
    ) -> list[Mask]:
        servable = snapshot.servable(now_ms)
        masks = [Mask("not available at this time", servable)]
        masks += snapshot.attributes.masks(request.filter, snapshot.catalog, len(servable))
        if request.exclude_seen:
            seen = snapshot.catalog.rows(entry.item_id for entry in state.history)
            masks.append(Mask("exclude_seen", ~rows_mask(seen, len(servable))))
        return masks

    def _query(self, snapshot: Snapshot, user: _User, masks: list[Mask], now_ms: int) -> Query:
        allowed = masks[0].passing if len(masks) == 1 else np.logical_and.reduce([mask.passing for mask in masks])
        recent = windows.recent_items(user.state, self._positive)[: self._settings.candidate.item_to_item_seeds]
        seeds = snapshot.catalog.rows(recent).astype(np.int64)
        return Query(user.vector, seeds[(seeds >= 0) & (seeds < len(snapshot.vectors))], allowed, now_ms)

    def _quotas(self, request: RetrieveCandidatesRequest, query: Query) -> dict[str, int]:
        if request.source_quotas:
            return {source.name: request.source_quotas.get(source.name, 0) for source in self._sources}
        # What cannot bring anything for this user leaves its share to the others.
        no_seeds = not len(query.seeds)
        idle = {"ann": query.user_vector is None, "item_to_item": no_seeds, "co_visitation": no_seeds}
        running = [source.name for source in self._sources if not idle.get(source.name, False)]
        return scaled_quotas(self._default_quotas, running, request.num_candidates)

    def _fan_out(
        self, snapshot: Snapshot, query: Query, quotas: dict[str, int], job: Job
    ) -> tuple[dict[str, Hits], list[str]]:
        """What each source brings, and the names of those that were late or failed."""
        hits: dict[str, Hits] = {}
        missing: list[str] = []
        for source in self._sources:
            quota = quotas.get(source.name, 0)
            if quota <= 0:
                continue
            if job.is_over or job.deadline.remaining_ms() < self._budget_ms.get(source.name, 0.0):
                missing.append(source.name)
                metrics.sources_missing.labels(source.name, "late").inc()
                continue
            started = time.perf_counter()
            try:
                hits[source.name] = source.retrieve(snapshot, query, quota)
            except Exception as error:  # noqa: BLE001 - one source's fault must not cost the others
                missing.append(source.name)
                metrics.sources_missing.labels(source.name, "failed").inc()
                _log.error("a source failed", source=source.name, error=repr(error))
            metrics.source_ms.labels(source.name).observe((time.perf_counter() - started) * 1000)
        if missing and not hits:
            raise StageTimeoutError("candidate", f"no source answered in time ({', '.join(missing)})")
        return hits, missing
