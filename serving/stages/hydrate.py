"""Hydrate: what is known of the user, in one read, with what the request itself says that the user just did.

First stage. Invariant: the state handed on is the stored one with the request's session events applied by the same
function that the stream applies, so an event that has come through Kafka as well counts once.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from core.deadline import Deadline
from core.errors import MalformedEventError, StageError
from core.settings import FeaturesSettings
from core.telemetry import get_logger
from features import windows
from features.catalog import Catalog
from features.windows import UserState
from headrace.v1 import types_pb2 as types
from headrace.v1.events_pb2 import Event, Feedback
from headrace.v1.types_pb2 import IngestToken
from serving.breaker import CircuitBreaker
from serving.clients import guarded
from serving.query import Query, Status, UserFeatures
from serving.store_reader import UserRow, UserStore

_log = get_logger("hydrate")
# The stream takes a few milliseconds for an event; a finer step would only cost Redis reads.
_POLL_SECONDS = 0.003


class Hydrator(Protocol):
    """Finds what is known of the user."""

    async def hydrate(self, query: Query) -> UserFeatures:
        """Never fails: what could not be read is missing, and the trace says why."""
        ...


class StoreHydrator:
    """Reads the online store."""

    def __init__(self, store: UserStore, breaker: CircuitBreaker, settings: FeaturesSettings) -> None:
        self._store = store
        self._breaker = breaker
        self._settings = settings

    async def hydrate(self, query: Query) -> UserFeatures:
        request, budget = query.request, query.budget
        try:
            with guarded(self._breaker, is_fair=budget.is_fair):
                if request.tokens and not await self._reach(query.user_id, request.tokens, budget.waiting()):
                    query.trace.degrade(types.DEGRADED_REASON_TOKEN_NOT_REACHED)
                row = await self._store.read(query.user_id, budget.stage("hydrate"))
        except StageError as error:
            query.trace.blame(error)
            # Without the history nobody can say what the user has seen.
            query.trace.degrade(types.DEGRADED_REASON_SEEN_UNKNOWN)
            if request.tokens:
                query.trace.degrade(types.DEGRADED_REASON_TOKEN_NOT_REACHED)
            return self._features(query, UserRow(), types.FEATURE_STATUS_UNSPECIFIED)
        status = self._status(row.state_time_ms, query.now_ms)
        if status == types.FEATURE_STATUS_STALE:
            query.trace.degrade(types.DEGRADED_REASON_STALE_FEATURES)
        return self._features(query, row, status)

    async def _reach(self, user_id: str, tokens: Sequence[IngestToken], until: Deadline) -> bool:
        """Waits until the user's state includes the tokens; False when it did not in time."""
        while True:
            offsets = await self._store.read_offsets(user_id, until)
            if all(offsets.get((token.source, token.partition), -1) >= token.offset for token in tokens):
                return True
            if until.remaining_seconds() <= 2 * _POLL_SECONDS:
                return False
            await asyncio.sleep(_POLL_SECONDS)

    def _status(self, time_ms: int | None, now_ms: int) -> Status:
        if time_ms is None:
            return types.FEATURE_STATUS_MISSING
        stale = now_ms - time_ms > self._settings.stale_after_seconds * 1000
        return types.FEATURE_STATUS_STALE if stale else types.FEATURE_STATUS_PRESENT

    def _features(self, query: Query, row: UserRow, status: Status) -> UserFeatures:
        state, state_bytes, session_events = self._state(query, row.state)
        return UserFeatures(
            query.user_id,
            state,
            state_bytes,
            row.vector,
            row.embedding_version,
            row.embedding_revision,
            row.batch_item_ids,
            row.batch_scores,
            row.profile,
            row.segment or query.request.context.tags.get("segment", ""),
            session_events,
            status,
        )

    def _state(self, query: Query, stored: bytes) -> tuple[UserState, bytes, Sequence[Event]]:
        try:
            state = windows.decode(stored)
        except MalformedEventError as error:
            _log.warning("a stored state cannot be read", problem=str(error))
            state, stored = UserState(), b""
        events = query.request.session_events
        if not events:
            return state, stored, ()
        completed = apply_session_events(state, events, query.release.catalog, self._settings)
        return state, windows.encode(state), completed


def apply_session_events(
    state: UserState, events: Sequence[Event], catalog: Catalog, settings: FeaturesSettings
) -> list[Event]:
    """Applies events that the request carries, with the categories that ingestion would give them; returns them."""
    completed = []
    for event in events:
        copy = Event()
        copy.CopyFrom(event)
        fill_categories(copy, catalog)
        completed.append(copy)
    windows.apply(state, map(windows.as_user_event, completed), settings)
    return completed


def fill_categories(event: Event | Feedback, catalog: Catalog) -> None:
    """The item's categories as known now, where the producer gave none."""
    row = catalog.row(event.item_id)
    if not event.categories and row >= 0:
        event.categories.extend(catalog.items[row].categories)
