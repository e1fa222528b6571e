"""The thin reader and writer of the online store: rows of `features.definitions` in Redis, in Feast's layout.

The stream writes and reads with `OnlineStore` (sync); the request path has its own async reader over the same
layout. Invariant, the row rule: a guarded write names the bytes that the writer saw in one column (`offsets`, or a
revision) and takes effect only if they are still there, in one step on one key. Writes are never retried silently
and a changed Redis shows itself as StoreChangedError: whoever wrote before it must go back to the marker. In a cluster
each primary has its own copy of a marker and the oldest counts: a primary that lost rows has lost the marker with them.
(Item statistics that one primary alone lost need `headrace rebuild`: users' rows elsewhere say they were counted. The
stream worker notices that a primary is another one and says so, see streams/doubts.py.)
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import redis

from core.clock import Clock, SystemClock
from core.errors import StageError
from core.settings import RedisSettings
from features import positions
from features.definitions import ColumnType, View
from features.positions import Offsets
from features.stores.cluster import ClusterLink
from features.stores.layout import Cell, ViewLayout, decode_cell, decode_time, encode_cell, encode_time, row_key
from features.stores.link import AnotherRedisError, Command, Link, RedisLink

# KEYS[1] row; ARGV: guard field, bytes expected there ('' = absent), then field, value, field, value...
_COMPARE_AND_SET = """
local seen = redis.call('HGET', KEYS[1], ARGV[1])
if (seen or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
return 1
"""
# A whole value: KEYS[1]; what is expected there ('' = absent), what to put there.
_COMPARE_AND_PUT = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
# As for rows, but ARGV[3] = seconds to keep it (0 = for ever), and what the row held else is gone.
_COMPARE_AND_REPLACE = """
local seen = redis.call('HGET', KEYS[1], ARGV[1])
if (seen or '') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
if ARGV[3] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[3]) end
return 1
"""
_SCRIPTS = (_COMPARE_AND_SET, _COMPARE_AND_PUT, _COMPARE_AND_REPLACE)
_COMPARE_AND_SET_SHA, _COMPARE_AND_PUT_SHA, _COMPARE_AND_REPLACE_SHA = (
    hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest().encode() for script in _SCRIPTS
)
ABSENT = b""
# Name of the text that is there from such a loss to the next rebuild.
ITEM_STATS_IN_DOUBT = "item-stats-in-doubt"


class StoreChangedError(StageError):
    """Redis is another one than before (restarted, failed over): what was written last may be gone."""

    def __init__(self) -> None:
        super().__init__("redis", "another Redis answers than before; go back to the marker")


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


class Put(NamedTuple):
    """Positions to keep under a name; with `expected`, only where it still says so."""

    name: str
    offsets: Offsets
    expected: Offsets | None = None


class OnlineStore:
    """Rows in Redis. Not thread-safe: one per thread."""

    def __init__(self, settings: RedisSettings, project: str, clock: Clock | None = None) -> None:
        self._project = project
        self._clock = clock or SystemClock()
        self._layouts: dict[str, ViewLayout] = {}
        self._link: Link = (ClusterLink if settings.cluster else RedisLink)(settings, _SCRIPTS)
        # Each copy of a marker as last read or written.
        self._copies: dict[bytes, bytes] = {}
        # How often StoreChangedError was raised.
        self.changes = 0

    def is_cluster(self) -> bool:
        """Whether rows lie on more than one Redis. Raises StageError."""
        return len(self._run(self._link.homes)) > 1

    def is_torn(self, partition: int) -> bool:
        """Whether the copies of a marker differed when they were last read."""
        return len({self._copies.get(key, ABSENT) for key in self._keys(_marker(partition))}) > 1

    def ping(self) -> None:
        for home in self._run(self._link.homes):
            self._send([(b"PING",)], home)

    def read(self, view: View, keys: Sequence[tuple[str, ...]], columns: Sequence[str] | None = None) -> list[Row]:
        """Rows of a view (all its columns, or only these), in the order of `keys`; one round trip."""
        names = list(columns) if columns is not None else [column.name for column in view.columns]
        return self._rows(view, names, self._send(self._reads(view, keys, names)))

    def read_proven(
        self, reads: Sequence[tuple[View, Sequence[tuple[str, ...]], Sequence[str]]], partitions: Sequence[int]
    ) -> tuple[list[list[Row]], list[Offsets]]:
        """Rows of several views (view, keys, columns), and markers as they stood after that; one round trip."""
        commands: list[Command] = []
        for view, keys, names in reads:
            commands += self._reads(view, keys, names)
        marker_keys = [key for partition in partitions for key in self._keys(_marker(partition))]
        answers = iter(self._send([*commands, *((b"GET", key) for key in marker_keys)]))
        rows = [self._rows(view, names, list(islice(answers, len(keys)))) for view, keys, names in reads]
        return rows, self._note_markers(partitions, marker_keys, list(answers))

    def _reads(self, view: View, keys: Sequence[tuple[str, ...]], names: Sequence[str]) -> list[Command]:
        layout = self._layout(view)
        fields = [layout.timestamp_field, *(layout.fields[name] for name in names)]
        return [(b"HMGET", row_key(self._project, view.join_keys, key), *fields) for key in keys]

    def _rows(self, view: View, names: Sequence[str], answers: Sequence[Sequence[bytes | None]]) -> list[Row]:
        layout = self._layout(view)
        return [_row(layout, names, values) for values in answers]

    def write(self, writes: Sequence[Write]) -> list[bool]:
        """Writes rows, those of one Redis in order on one connection; says for each whether it took effect."""
        time = encode_time(self._clock.now_ms())
        results = self._send([self._command(write, time) for write in writes])
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

    def replace(self, writes: Sequence[Write], keep_seconds: int = 0) -> bool:
        """Makes these cells all that is kept of one entity, in one step, if the first write's guard holds.

        The views count as never written: a row of this kind says only which positions are behind it, for so long
        (0 = for ever).
        """
        first = writes[0]
        values: list[bytes] = []
        for write in writes:
            layout = self._layout(write.view)
            for name, cell in write.cells.items():
                values += [layout.fields[name], encode_cell(layout.types[name], cell)]
        key = row_key(self._project, first.view.join_keys, first.key)
        guard = self._layout(first.view).fields[first.guard]
        guarded = (key, guard, first.expected, b"%d" % keep_seconds)
        command = (b"EVALSHA", _COMPARE_AND_REPLACE_SHA, b"1", *guarded, *values)
        return bool(self._send([command])[0])

    def delete(self, view: View, keys: Sequence[tuple[str, ...]]) -> int:
        """Removes whole entities (all views that share the hash); returns how many were there."""
        return sum(self._send([(b"DEL", row_key(self._project, view.join_keys, key)) for key in keys]))

    def expire(self, view: View, keys: Sequence[tuple[str, ...]], seconds: int) -> None:
        """Lets whole entities go after a time; 0 = they stay, whatever was said before."""
        names = [row_key(self._project, view.join_keys, key) for key in keys]
        self._send([(b"EXPIRE", name, seconds) if seconds else (b"PERSIST", name) for name in names])

    def clear(self, view: View, keys: Sequence[tuple[str, ...]]) -> None:
        """Removes a view's cells of some entities; what other views keep of them stays."""
        layout = self._layout(view)
        names = (layout.timestamp_field, *layout.fields.values())
        self._send([(b"HDEL", row_key(self._project, view.join_keys, key), *names) for key in keys])

    def read_marker(self, partition: int) -> Offsets:
        """Per (source, partition) the newest offset up to which all rows are written; empty when unknown."""
        return self.read_markers((partition,))[0]

    def read_markers(self, partitions: Sequence[int]) -> list[Offsets]:
        """Markers of several partitions; one round trip."""
        keys = [key for partition in partitions for key in self._keys(_marker(partition))]
        return self._note_markers(partitions, keys, self._send([(b"GET", key) for key in keys]))

    def _note_markers(
        self, partitions: Sequence[int], keys: Sequence[bytes], answers: Sequence[bytes | None]
    ) -> list[Offsets]:
        self._copies.update(zip(keys, (raw or ABSENT for raw in answers), strict=True))
        return [self._oldest(self._keys(_marker(partition))) for partition in partitions]

    def write_marker(self, partition: int, offsets: Offsets, expected: Offsets | None = None) -> bool:
        """Sets the marker; with `expected`, only where it still says so (which tells whether it did)."""
        return self.write_positions(_marker(partition), offsets, expected)

    def read_positions(self, name: str) -> Offsets | None:
        """What is kept under a name beside the markers; None where nothing is."""
        keys = self._keys(name)
        raws = self._send([(b"GET", key) for key in keys])
        self._copies.update(zip(keys, (raw or ABSENT for raw in raws), strict=True))
        return None if None in raws else self._oldest(keys)

    def write_positions(self, name: str, offsets: Offsets, expected: Offsets | None = None) -> bool:
        """As `write_marker`."""
        return self.write_all([Put(name, offsets, expected)])[0]

    def write_markers(self, puts: Mapping[int, tuple[Offsets, Offsets]], more: Sequence[Put] = ()) -> list[bool]:
        """Sets markers (to what, where it says what), and other positions with them; one round trip."""
        markers = [Put(_marker(partition), offsets, expected) for partition, (offsets, expected) in puts.items()]
        return self.write_all([*markers, *more])

    def write_all(self, puts: Sequence[Put]) -> list[bool]:
        """Sets several positions; says for each whether it did."""
        keys_of = [self._keys(put.name) for put in puts]
        values = [positions.encode(put.offsets) for put in puts]
        commands: list[Command] = []
        for put, keys, value in zip(puts, keys_of, values, strict=True):
            if put.expected is None:
                commands += [(b"SET", key, value) for key in keys]
                continue
            # Copies may differ: some of them may have been written just before an error.
            same, raw = self._oldest(keys) == put.expected, positions.encode(put.expected)
            script = (b"EVALSHA", _COMPARE_AND_PUT_SHA, b"1")
            commands += [(*script, key, self._copies.get(key, ABSENT) if same else raw, value) for key in keys]
        answers = iter(self._send(commands))
        done = []
        for keys, value in zip(keys_of, values, strict=True):
            found = [next(answers) for _ in keys]
            done.append(all(found))
            if done[-1]:
                self._copies.update(dict.fromkeys(keys, value))
        return done

    def put_text(self, name: str, text: str) -> str:
        """Keeps a text under a name where there is none yet; returns what is there."""
        key = f"{self._project}:{name}".encode()
        _, kept = self._send([(b"SET", key, text, b"NX"), (b"GET", key)])
        return bytes(kept or b"").decode()

    def read_text(self, name: str) -> str | None:
        """What is kept under a name by `put_text`."""
        (kept,) = self._send([(b"GET", f"{self._project}:{name}".encode())])
        return None if kept is None else bytes(kept).decode()

    def drop_text(self, name: str) -> None:
        self._send([(b"DEL", f"{self._project}:{name}".encode())])

    def keys_of(self, view: View, batch: int = 1000) -> Iterable[str]:
        """Entity values of a single-entity view, by scanning; for sweeps and tools."""
        prefix = row_key("", view.join_keys, ("",))[:-4]
        skip, project = len(prefix) + 4, self._project.encode()
        pattern = _escape_glob(prefix) + b"*" + _escape_glob(project)
        for home in self._run(self._link.homes):
            cursor: int | None = None
            while cursor != 0:
                scan = (b"SCAN", cursor or 0, b"MATCH", pattern, b"COUNT", batch)
                ((at, found),) = self._send([scan], home)
                cursor = int(at)
                for raw in found:
                    # A project's name may be the end of another's: the length in the key decides.
                    if len(raw) == skip + int.from_bytes(raw[skip - 4 : skip], "little") + len(project):
                        yield raw[skip : len(raw) - len(project)].decode()

    def close(self) -> None:
        self._link.close()

    def _keys(self, name: str) -> list[bytes]:
        """A copy at each Redis that keeps rows."""
        key = f"{self._project}:{name}".encode()
        return [home + key for home in self._run(self._link.homes)]

    def _oldest(self, keys: Sequence[bytes]) -> Offsets:
        """What all copies of some positions agree on, as last seen."""
        first, *others = [positions.decode(self._copies.get(key, ABSENT)) for key in keys]
        for other in others:
            first = {where: min(offset, other[where]) for where, offset in first.items() if where in other}
        return first

    def _layout(self, view: View) -> ViewLayout:
        layout = self._layouts.get(view.name)
        if layout is None:
            layout = self._layouts[view.name] = ViewLayout.of(view)
        return layout

    def _send(self, commands: Sequence[Command], at: bytes = b"") -> list[Any]:
        return self._run(self._link.send, commands, at)  # type: ignore[no-any-return]

    def _run(self, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except AnotherRedisError as error:
            self.changes += 1
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


def _marker(partition: int) -> str:
    return f"marker:{partition}"
