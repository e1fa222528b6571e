"""What the agents of the quiet topics do with a batch: items and users to profile rows, tombstones to removals.

Called by the Faust agents (app.py) on a thread. Invariant: a row carries its source position, that of a removed item or
user too, and only a later one replaces it, so messages may come twice and a worker that wakes up late brings nothing
back; nothing raises but StageError, which the agent waits out.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from google.protobuf.message import Message

from core import codec
from core.clock import Clock, SystemClock
from core.errors import MalformedEventError, StageError
from core.telemetry import get_logger
from features import positions
from features.definitions import ITEM_PROFILE, ITEM_STATS, View
from features.positions import Offsets
from features.stores import erasures
from features.stores.erasures import Erasure, Erasures
from features.stores.layout import Cell
from features.stores.online import ABSENT, OnlineStore, Row, Write, read_offsets
from features.windows import Position
from headrace.v1.events_pb2 import Item, User
from streams import metrics
from streams.processor import RawMessage

_log = get_logger("streams.agents")

_ATTEMPTS = 20


@dataclass(slots=True)
class Profiles:
    """One batch of a quiet topic, sorted out."""

    # Newest valid message of each key; None removes it.
    newest: dict[str, tuple[Message | None, RawMessage]] = field(default_factory=dict)
    # Newest tombstone of each key that had one, also where an upsert came after it.
    removals: dict[str, RawMessage] = field(default_factory=dict)
    # All valid ones, in order, for the event log.
    rows: list[tuple[Message | None, RawMessage]] = field(default_factory=list)
    letters: list[tuple[RawMessage, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Erasing:
    """What the users agent needs for tombstones.

    `ends` gives the newest position of each user-keyed topic that holds the users of a partition of the users topic.
    Without `records` (no event log) an erasure lasts as long as its row.
    """

    ends: Callable[[int], dict[tuple[int, int], int]]
    records: Erasures | None = None
    on_erased: Callable[[str], None] = lambda _: None
    clock: Clock = field(default_factory=SystemClock)


@dataclass(frozen=True, slots=True)
class Removing:
    """What the items agent needs for tombstones.

    A removed item's row says for `keep_seconds` that it was removed; its statistics go then, too. `stats_partitions`
    gives the source partitions that an item may have statistics of.
    """

    keep_seconds: int
    stats_partitions: Callable[[], Iterable[int]]


class ProfileProcessor:
    """One of the two quiet topics. Not thread-safe: a store of its own, one batch at a time."""

    def __init__(
        self,
        view: View,
        store: OnlineStore,
        sources: Mapping[str, int],
        tombstones: Erasing | Removing,
    ) -> None:
        self._view = view
        self._store = store
        self._sources = sources
        self._tombstones = tombstones
        self._offsets_column = "item_offsets" if view is ITEM_PROFILE else "profile_offsets"

    def sort_out(self, batch: Sequence[RawMessage]) -> Profiles:
        """Decodes and checks; what is malformed becomes a letter. Never raises."""
        profiles = Profiles()
        for raw in batch:
            try:
                key, message = self._decode(raw)
            except MalformedEventError as error:
                profiles.letters.append((raw, str(error)))
            except Exception as error:  # noqa: BLE001 - one message must never stop a topic
                profiles.letters.append((raw, f"unexpected {type(error).__name__} while decoding: {error}"[:500]))
            else:
                profiles.newest[key] = (message, raw)
                if message is None:
                    profiles.removals[key] = raw
                profiles.rows.append((message, raw))
        return profiles

    def write(self, profiles: Profiles) -> None:
        """Writes rows and removes what tombstones name. Raises StageError; writing again does no harm."""
        if isinstance(self._tombstones, Removing):
            self._remove(self._tombstones, profiles.removals)
        else:
            self._erase(self._tombstones, profiles.removals)
        waiting = {key: entry for key, entry in profiles.newest.items() if entry[0] is not None}
        for _ in range(_ATTEMPTS):
            if not waiting:
                return
            waiting = self._write_once(waiting)
        raise StageError("redis", f"{len(waiting)} rows of {self._view.name} were changed by others all the time")

    def _remove(self, removing: Removing, removals: Mapping[str, RawMessage]) -> None:
        """Items: leaves a row's position alone, unless the row is newer than the tombstone (which came again)."""
        waiting = dict(removals)
        for _ in range(_ATTEMPTS):
            if not waiting:
                break
            rows = self._rows(waiting)
            older = {key: raw for key, raw in waiting.items() if self._reached(rows[key], raw) < raw.offset}
            waiting = {key: raw for key, raw in older.items() if not self._bury(removing, key, raw, rows[key])}
        else:
            raise StageError("redis", f"{len(waiting)} rows of {self._view.name} were changed by others all the time")
        buried = [key for key, row in self._rows(removals).items() if _is_buried(row)]
        self._expire_stats(removing, buried, removing.keep_seconds)
        # Asked after it, not before: another worker may have revived one just now.
        self._expire_stats(removing, [key for key, row in self._rows(buried).items() if not _is_buried(row)], 0)

    def _bury(self, removing: Removing, key: str, raw: RawMessage, row: Row) -> bool:
        where, offsets = (self._sources[raw.topic], raw.partition), self._stored_offsets(row)
        cells: dict[str, Cell] = {self._offsets_column: positions.encode({**offsets, where: raw.offset})}
        expected = row.raw.get(self._offsets_column, ABSENT)
        write = Write(self._view, (key,), cells, self._offsets_column, expected)
        return self._store.replace([write], removing.keep_seconds)

    def _rows(self, keys: Collection[str]) -> dict[str, Row]:
        rows = self._store.read(self._view, [(key,) for key in keys], (self._offsets_column,))
        return dict(zip(keys, rows, strict=True))

    def _reached(self, row: Row, raw: RawMessage) -> int:
        """The newest position of the message's partition that a row includes."""
        return self._stored_offsets(row).get((self._sources[raw.topic], raw.partition), -1)

    def _revive(self, removing: Removing, keys: Sequence[str]) -> None:
        """Before removed items are written again: what would have gone with them stays."""
        self._store.expire(self._view, [(key,) for key in keys], 0)
        self._expire_stats(removing, keys, 0)

    def _expire_stats(self, removing: Removing, keys: Sequence[str], seconds: int) -> None:
        if keys:
            numbers = [str(partition) for partition in removing.stats_partitions()]
            self._store.expire(ITEM_STATS, [(key, number) for key in keys for number in numbers], seconds)

    def _erase(self, erasing: Erasing, removals: Mapping[str, RawMessage]) -> None:
        """Users: what a tombstone means stands in features/stores/erasures.py."""
        found = [
            Erasure(key, Position(self._sources[raw.topic], raw.partition, raw.offset)) for key, raw in removals.items()
        ]
        for bare in erasures.pending(self._store, found):
            erasure = replace(bare, cut=erasing.ends(bare.tombstone.partition), time_ms=erasing.clock.now_ms())
            if erasing.records is not None:
                # Before the row goes: once it is gone nothing else knows how far the erasure reaches.
                erasure = erasing.records.add(erasure)
            for user_id in erasures.apply(self._store, [erasure]):
                erasing.on_erased(user_id)
                metrics.ERASED_USERS.inc()

    def _write_once(
        self, waiting: Mapping[str, tuple[Message | None, RawMessage]]
    ) -> dict[str, tuple[Message | None, RawMessage]]:
        """Writes rows that are newer than what is stored; returns those that somebody else changed meanwhile."""
        rows = self._rows(waiting)
        if isinstance(self._tombstones, Removing):
            self._revive(self._tombstones, [key for key, row in rows.items() if _is_buried(row)])
        writes = []
        for key, (message, raw) in waiting.items():
            row = rows[key]
            where, offsets = (self._sources[raw.topic], raw.partition), self._stored_offsets(row)
            if offsets.get(where, -1) < raw.offset:
                cells = self._cells(message)
                cells[self._offsets_column] = positions.encode({**offsets, where: raw.offset})
                expected = row.raw.get(self._offsets_column, ABSENT)
                writes.append(Write(self._view, (key,), cells, self._offsets_column, expected))
        done = self._store.write(writes)
        return {write.key[0]: waiting[write.key[0]] for write, ok in zip(writes, done, strict=True) if not ok}

    def _decode(self, raw: RawMessage) -> tuple[str, Message | None]:
        field_name = self._view.join_keys[0]
        if raw.value is None:
            try:
                key = (raw.key or b"").decode()
            except UnicodeDecodeError as error:
                raise MalformedEventError("key", f"must be the {field_name} in UTF-8") from error
            codec.check_id("key", key)
            return key, None
        if self._view is ITEM_PROFILE:
            item = codec.decode(Item(), raw.value, raw.headers)
            codec.check_item(item)
            codec.check_key(raw.key, item.item_id, field_name)
            return item.item_id, item
        user = codec.decode(User(), raw.value, raw.headers)
        codec.check_user(user)
        codec.check_key(raw.key, user.user_id, field_name)
        return user.user_id, user

    @staticmethod
    def _cells(message: Message | None) -> dict[str, Cell]:
        if isinstance(message, Item):
            return {"item": message.SerializeToString(), "title": message.title}
        if isinstance(message, User):
            return {"profile": message.SerializeToString(), "profile_segment": message.segment}
        raise TypeError(f"no row for {type(message).__name__}")

    def _stored_offsets(self, row: Row) -> Offsets:
        return read_offsets(row.raw.get(self._offsets_column, ABSENT))


def _is_buried(row: Row) -> bool:
    """Whether this is what a tombstone leaves of an item."""
    return bool(row.raw) and row.time_ms is None
