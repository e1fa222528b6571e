"""The request path's reader of the online store: one user, one round trip.

The views of a user share one Redis hash (features.stores.layout), so hydrate is one HMGET. Invariant: never waits past
the deadline it is given, never retries, and every failure is a StageError of `redis`.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import redis
from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from core.deadline import Deadline
from core.errors import StageError, StageTimeoutError
from core.settings import RedisSettings
from features import positions
from features.definitions import USER_BATCH_SCORES, USER_EMBEDDING, USER_PROFILE, USER_STATE, ColumnType, View
from features.stores.cluster import ClusterReads
from features.stores.layout import Cell, ViewLayout, decode_cell, decode_time, row_key
from headrace.v1.events_pb2 import User

T = TypeVar("T")
# Enough for every request at once; each takes a connection for one round trip.
_MAX_CONNECTIONS = 512
# When our own loop was late, what has arrived meanwhile gets so long to be read.
_LATE_LOOP_SECONDS = 0.005


class UserRow(NamedTuple):
    """A user's cells as stored. Times are those of the writes, None = never written."""

    state: bytes = b""
    state_time_ms: int | None = None
    vector: Sequence[float] = ()
    embedding_version: str = ""
    embedding_revision: int = 0
    batch_item_ids: Sequence[str] = ()
    batch_scores: Sequence[float] = ()
    profile: User | None = None
    segment: str = ""


class UserStore:
    """Reads user rows; belongs to one event loop."""

    def __init__(self, settings: RedisSettings, project: str) -> None:
        self._project = project
        self._client: Any = (ClusterReads if settings.cluster else Redis.from_url)(
            settings.url.get_secret_value(),
            socket_connect_timeout=settings.timeout_ms / 1000,
            socket_timeout=settings.timeout_ms / 1000,
            retry=Retry(NoBackoff(), 0),
            max_connections=_MAX_CONNECTIONS,
            # No greeting: a new connection costs no round trip of its own.
            driver_info=None,
            protocol=2,
        )
        self._fields: list[bytes] = []
        self._columns: list[tuple[View, str]] = []
        for view in (USER_STATE, USER_EMBEDDING, USER_BATCH_SCORES, USER_PROFILE):
            layout = ViewLayout.of(view)
            self._fields.append(layout.timestamp_field)
            self._columns.append((view, ""))
            for column in view.columns:
                self._fields.append(layout.fields[column.name])
                self._columns.append((view, column.name))
        self._offsets_field = ViewLayout.of(USER_STATE).fields["offsets"]
        self._segment_field = ViewLayout.of(USER_PROFILE).fields["profile_segment"]
        self._types = {(view.name, column.name): column.type for view, _ in self._columns for column in view.columns}

    async def read(self, user_id: str, deadline: Deadline) -> UserRow:
        """The user's row; one of defaults where there is none.

        Raises:
            StageError: Redis is away, or holds something that is no row.
            StageTimeoutError: it did not answer in time.
        """
        values = await self._run(self._client.hmget(self._key(user_id), self._fields), deadline)
        try:
            return self._row(values)
        except (DecodeError, ValueError) as error:
            raise StageError("redis", f"the row of a user cannot be read ({error}); rebuild it") from error

    async def read_offsets(self, user_id: str, deadline: Deadline) -> dict[tuple[int, int], int]:
        """Source positions that the user's state includes; cheaper than the row, for waiting."""
        raw = await self._run(self._client.hget(self._key(user_id), self._offsets_field), deadline)
        cell = decode_cell(self._types[(USER_STATE.name, "offsets")], raw)
        return positions.decode(cell) if isinstance(cell, bytes) else {}

    async def read_segments(self, user_ids: Sequence[str], deadline: Deadline) -> list[str]:
        """Segment of each user's profile, "" for none; one round trip."""
        pipeline = self._client.pipeline(transaction=False)
        for user_id in user_ids:
            pipeline.hget(self._key(user_id), self._segment_field)
        cells = [decode_cell(ColumnType.STRING, raw) for raw in await self._run(pipeline.execute(), deadline)]
        return [cell if isinstance(cell, str) else "" for cell in cells]

    def key_and_fields(self, user_id: str) -> tuple[bytes, list[bytes]]:
        """What `read` asks Redis for, to measure it by itself."""
        return self._key(user_id), self._fields

    async def close(self) -> None:
        await self._client.aclose()

    def _key(self, user_id: str) -> bytes:
        return row_key(self._project, USER_STATE.join_keys, (user_id,))

    def _row(self, values: Sequence[bytes | None]) -> UserRow:
        cells: dict[str, Cell] = {}
        state_time_ms = None
        for (view, name), raw in zip(self._columns, values, strict=True):
            if not name:
                if view is USER_STATE:
                    state_time_ms = decode_time(raw)
            elif (cell := decode_cell(self._types[(view.name, name)], raw)) is not None:
                cells[name] = cell
        profile = cells.get("profile")
        return UserRow(
            state=cells.get("state", b""),  # type: ignore[arg-type]  # by the column's type
            state_time_ms=state_time_ms,
            vector=cells.get("vector", ()),  # type: ignore[arg-type]
            embedding_version=cells.get("embedding_version", ""),  # type: ignore[arg-type]
            embedding_revision=cells.get("embedding_revision", 0),  # type: ignore[arg-type]
            batch_item_ids=cells.get("batch_item_ids", ()),  # type: ignore[arg-type]
            batch_scores=cells.get("batch_scores", ()),  # type: ignore[arg-type]
            profile=User.FromString(profile) if isinstance(profile, bytes) else None,
            segment=cells.get("profile_segment", ""),  # type: ignore[arg-type]
        )

    async def _run(self, command: Coroutine[Any, Any, T], deadline: Deadline) -> T:
        task = asyncio.ensure_future(command)
        try:
            await asyncio.wait((task,), timeout=deadline.remaining_seconds())
            if not task.done() and deadline.clock.monotonic() - deadline.at > 0.001:
                # The timer fired late: this process was busy, which is not Redis' fault.
                await asyncio.wait((task,), timeout=_LATE_LOOP_SECONDS)
            if not task.done():
                raise StageTimeoutError("redis", "did not answer within the stage's budget")
            return task.result()
        except redis.TimeoutError as error:
            raise StageTimeoutError("redis", f"did not answer: {error}") from error
        except (redis.RedisError, OSError) as error:
            raise StageError("redis", f"{type(error).__name__}: {error}") from error
        finally:
            if not task.done():
                task.cancel()
                task.add_done_callback(_forget)


def _forget(task: asyncio.Future[Any]) -> None:
    """A cancelled read may still end with an error of its own; nobody waits for it."""
    if not task.cancelled():
        task.exception()
