"""The thin reader and writer of the online store: rows of `features.definitions` in Redis, in Feast's layout.

The stream writes and reads with `OnlineStore` (sync); the request path has its own async reader over the same
layout. Invariant, the row rule: a guarded write names the bytes that the writer saw in one column (`offsets`, or a
revision) and takes effect only if they are still there, in one step on one key. Writes are never retried silently
and a changed Redis shows itself as StoreChangedError: whoever wrote before it must go back to the marker.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from core.clock import Clock, SystemClock
from core.errors import StageError
from core.settings import RedisSettings
from features import positions
from features.definitions import ColumnType, View
from features.positions import Offsets
from features.stores.layout import Cell, ViewLayout, decode_cell, decode_time, encode_cell, encode_time, row_key

# KEYS[1] row; ARGV: guard field, bytes expected there ('' = absent), then field, value, field, value...
_COMPARE_AND_SET = """
local seen = redis.call('HGET', KEYS[1], ARGV[1])
if (seen or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
return 1
"""
_COMPARE_AND_SET_SHA = hashlib.sha1(_COMPARE_AND_SET.encode(), usedforsecurity=False).hexdigest().encode()
# A whole value: KEYS[1]; what is expected there ('' = absent), what to put there.
_COMPARE_AND_PUT = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
# As for rows, and what the row held else is gone.
_COMPARE_AND_REPLACE = """
local seen = redis.call('HGET', KEYS[1], ARGV[1])
if (seen or '') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
return 1
"""
ABSENT = b""


class StoreChangedError(StageError):
    """Redis is another one than before (restarted, failed over): what was written last may be gone."""

    def __init__(self) -> None:
        super().__init__("redis", "another Redis answers than before; go back to the marker")


class _AnotherRedis(redis.ConnectionError):
    """Raised while connecting, so that the command is not sent."""


@dataclass(frozen=True, slots=True)
class Row:
    """A view's cells of one entity as read. `time_ms` None = never written."""

    cells: Mapping[str, Cell]
    raw: Mapping[str, bytes]
    time_ms: int | None


class Write(NamedTuple):
    """One row to write. With `guard` set, only if that column still holds `expected` (raw bytes, b"" = absent)."""

    view: View
    key: tuple[str, ...]
    cells: Mapping[str, Cell]
    guard: str = ""
    expected: bytes = ABSENT


class OnlineStore:
    """Rows in Redis. Not thread-safe: one per thread."""

    def __init__(self, settings: RedisSettings, project: str, clock: Clock | None = None) -> None:
        self._project = project
        self._clock = clock or SystemClock()
        self._layouts: dict[str, ViewLayout] = {}
        self._run_id: bytes | None = None
        self._client = redis.Redis.from_url(
            settings.url.get_secret_value(),
            socket_timeout=settings.timeout_ms / 1000,
            socket_connect_timeout=settings.timeout_ms / 1000,
            # A silent retry or reconnect would hide a Redis that lost its last seconds.
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=self._on_connect,
        )
        self._compare_and_replace = self._client.register_script(_COMPARE_AND_REPLACE)
        self._compare_and_put = self._client.register_script(_COMPARE_AND_PUT)

    def ping(self) -> None:
        self._run(self._client.ping)

    def read(self, view: View, keys: Sequence[tuple[str, ...]], columns: Sequence[str] | None = None) -> list[Row]:
        """Rows of a view (all its columns, or only these), in the order of `keys`; one round trip."""
        layout = self._layout(view)
        names = list(columns) if columns is not None else [column.name for column in view.columns]
        fields = [layout.timestamp_field, *(layout.fields[name] for name in names)]
        commands = [(b"HMGET", row_key(self._project, view.join_keys, key), *fields) for key in keys]
        return [_row(layout, names, values) for values in self._run(lambda: self._send(commands))]

    def write(self, writes: Sequence[Write]) -> list[bool]:
        """Writes rows in order on one connection; says for each whether it took effect."""
        time = encode_time(self._clock.now_ms())
        commands = [self._command(write, time) for write in writes]
        results = self._run(lambda: self._send(commands))
        return [bool(result) or not write.guard for write, result in zip(writes, results, strict=True)]

    def _command(self, write: Write, time: bytes) -> tuple[bytes, ...]:
        layout = self._layout(write.view)
        fields, types = layout.fields, layout.types
        key = row_key(self._project, write.view.join_keys, write.key)
        values = [layout.timestamp_field, time]
        for name, cell in write.cells.items():
            values += (fields[name], encode_cell(types[name], cell))
        if write.guard:
            return (b"EVALSHA", _COMPARE_AND_SET_SHA, b"1", key, fields[write.guard], write.expected, *values)
        return (b"HSET", key, *values)

    def _send(self, commands: Sequence[tuple[bytes, ...]]) -> list[Any]:
        """Sends commands together and reads their answers.

        As a pipeline of redis-py does, at a fraction of its cost, and without asking for the script each time.
        """
        if not commands:
            return []
        pool = self._client.connection_pool
        connection: Any = pool.get_connection()
        try:
            # As one buffer: redis-py would make a system call for every few commands.
            connection.send_packed_command([b"".join(connection.pack_commands(commands))])
            return [connection.read_response() for _ in commands]
        except BaseException:
            # Answers may be left in it; and a new one has the scripts again.
            connection.disconnect()
            raise
        finally:
            pool.release(connection)

    def replace(self, writes: Sequence[Write]) -> bool:
        """Makes these cells all that is kept of one entity, in one step, if the first write's guard holds.

        The views count as never written: a row of this kind says only which positions are behind it.
        """
        first = writes[0]
        values: list[bytes] = []
        for write in writes:
            layout = self._layout(write.view)
            for name, cell in write.cells.items():
                values += [layout.fields[name], encode_cell(layout.types[name], cell)]
        key = row_key(self._project, first.view.join_keys, first.key)
        guard = self._layout(first.view).fields[first.guard]
        return bool(self._run(lambda: self._compare_and_replace([key], [guard, first.expected, *values])))

    def delete(self, view: View, keys: Sequence[tuple[str, ...]]) -> int:
        """Removes whole entities (all views that share the hash); returns how many were there."""
        if not keys:
            return 0
        pipeline: Any = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.delete(row_key(self._project, view.join_keys, key))
        return sum(self._run(pipeline.execute))

    def clear(self, view: View, keys: Sequence[tuple[str, ...]]) -> None:
        """Removes a view's cells of some entities; what other views keep of them stays."""
        layout = self._layout(view)
        names = (layout.timestamp_field, *layout.fields.values())
        self._run(lambda: self._send([(b"HDEL", row_key(self._project, view.join_keys, key), *names) for key in keys]))

    def read_marker(self, partition: int) -> Offsets:
        """Per (source, partition) the newest offset up to which all rows are written; empty when unknown."""
        return self.read_markers((partition,))[0]

    def read_markers(self, partitions: Sequence[int]) -> list[Offsets]:
        """Markers of several partitions; one round trip."""
        pipeline: Any = self._client.pipeline(transaction=False)
        for partition in partitions:
            pipeline.get(self._marker_key(partition))
        found = self._run(pipeline.execute)
        return [positions.decode(raw or b"") for raw in found]

    def write_marker(self, partition: int, offsets: Offsets, expected: Offsets | None = None) -> bool:
        """Sets the marker; with `expected`, only where it still says so (which tells whether it did)."""
        return self._put(self._marker_key(partition), offsets, expected)

    def read_positions(self, name: str) -> Offsets | None:
        """What is kept under a name beside the markers; None where nothing is."""
        raw = self._run(lambda: self._client.get(f"{self._project}:{name}"))
        return None if raw is None else positions.decode(raw)

    def write_positions(self, name: str, offsets: Offsets, expected: Offsets | None = None) -> bool:
        """As `write_marker`."""
        return self._put(f"{self._project}:{name}", offsets, expected)

    def keys_of(self, view: View, batch: int = 1000) -> Iterable[str]:
        """Entity values of a single-entity view, by scanning; for sweeps and tools."""
        prefix = row_key("", view.join_keys, ("",))[:-4]
        skip, project = len(prefix) + 4, self._project.encode()
        pattern = _escape_glob(prefix) + b"*" + _escape_glob(project)
        cursor = -1
        while cursor != 0:
            cursor, found = self._run(partial(self._client.scan, max(cursor, 0), match=pattern, count=batch))
            for raw in found:
                # A project's name may be the end of another's: the length in the key decides.
                if len(raw) == skip + int.from_bytes(raw[skip - 4 : skip], "little") + len(project):
                    yield raw[skip : len(raw) - len(project)].decode()

    def close(self) -> None:
        self._client.close()

    def _marker_key(self, partition: int) -> str:
        return f"{self._project}:marker:{partition}"

    def _put(self, key: str, offsets: Offsets, expected: Offsets | None) -> bool:
        value = positions.encode(offsets)
        if expected is None:
            return bool(self._run(lambda: self._client.set(key, value)))
        return bool(self._run(lambda: self._compare_and_put([key], [positions.encode(expected), value])))

    def _layout(self, view: View) -> ViewLayout:
        layout = self._layouts.get(view.name)
        if layout is None:
            layout = self._layouts[view.name] = ViewLayout.of(view)
        return layout

    def _on_connect(self, connection: Any) -> None:
        connection.on_connect()
        connection.send_command("INFO", "server")
        info = connection.read_response()
        text = info if isinstance(info, bytes) else str(info).encode()
        run_id = next((line for line in text.split(b"\r\n") if line.startswith(b"run_id:")), b"")
        before, self._run_id = self._run_id, run_id
        if before is not None and run_id != before:
            # Now, before the command that wanted this connection: a marker must not be set on rows that are gone.
            raise _AnotherRedis
        connection.send_command("SCRIPT", "LOAD", _COMPARE_AND_SET)
        connection.read_response()

    def _run(self, call: Any) -> Any:
        try:
            return call()
        except _AnotherRedis as error:
            raise StoreChangedError from error
        except redis.RedisError as error:
            raise StageError("redis", f"{type(error).__name__}: {error}") from error


def _row(layout: ViewLayout, names: Sequence[str], values: Sequence[bytes | None]) -> Row:
    raw = {name: value for name, value in zip(names, values[1:], strict=True) if value is not None}
    types = layout.types
    cells = {name: cell for name, value in raw.items() if (cell := decode_cell(types[name], value)) is not None}
    return Row(cells, raw, decode_time(values[0]))


def read_offsets(raw: bytes) -> dict[tuple[int, int], int]:
    """The positions in the raw bytes of an offsets column; none where there are none."""
    value = decode_cell(ColumnType.BYTES, raw)
    return positions.decode(value) if isinstance(value, bytes) else {}


def _escape_glob(raw: bytes) -> bytes:
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\" else bytes([c]) for c in raw)
