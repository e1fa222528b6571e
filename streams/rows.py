"""The rows that the stream owns, in memory and in the online store: read, compared and set, never overwritten blindly.

Sits between the reader and features/stores/online.py. Order of a batch, on one connection: item partials, then user
rows, then (called by the reader) the partition's marker. Invariant: a row in memory is what was last read or written,
offsets and all; after any StageError that is no longer known, so the caller drops everything and goes back.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from google.protobuf.message import DecodeError

from core.errors import MalformedEventError, StageError
from core.settings import FeaturesSettings
from core.telemetry import get_logger
from features import item_stats, positions, windows
from features.definitions import ITEM_STATS, USER_STATE, ColumnType, View
from features.item_stats import ItemPartial
from features.positions import Offsets
from features.stores.layout import Cell, encode_cell
from features.stores.online import ABSENT, OnlineStore, Put, Row, Write, read_offsets
from features.windows import Outcome, UserEvent, UserState
from headrace.v1.events_pb2 import ItemStats
from streams import metrics, processor
from streams.processor import Changes, ItemKey, Received
from streams.row_cache import Entry, RowCache

_log = get_logger("streams.rows")

# Somebody else wins the race for one row again and again: then something is wrong that waiting will not mend.
_ATTEMPTS = 50
# An item's partial sums are a few hundred bytes, a user's state a few thousand.
_ITEMS_PER_USER = 4
# Rows that are read, or encoded and written, together: what is made of them stays in the processor's caches, and no
# buffer is large however large the batch.
_ROWS_AT_ONCE = 500
_USER_COLUMNS, _ITEM_COLUMNS = ("state", "offsets"), ("stats", "offsets")

K = TypeVar("K")


class RowsChangedError(StageError):
    """The store holds an older row or marker than what was written: it has lost something."""

    def __init__(self, what: str) -> None:
        super().__init__("redis", f"{what} is older than what was written; go back to the marker")


@dataclass(slots=True)
class Applied:
    """What became of a batch."""

    # By topic and outcome.
    outcomes: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    # Users whose vector is, or may be, out of date now.
    dirty: set[str] = field(default_factory=set)
    # Statistics as the store has them, for the replicas: headrace.v1.ItemStats by item and partition.
    stats: dict[ItemKey, bytes] = field(default_factory=dict)
    # Those of them that more than impressions have changed, or of which nobody knows what has.
    with_events: set[ItemKey] = field(default_factory=set)
    # Messages whose user has a row that cannot be read, and why.
    refused: list[tuple[Received, str]] = field(default_factory=list)
    watermark_ms: int = 0
    # Events behind their user's watermark; events of which nobody knows whether they came before.
    late: int = 0
    outside_horizon: int = 0


class Rows:
    """User states and item partials of the partitions that this worker owns. Not thread-safe."""

    def __init__(self, store: OnlineStore, settings: FeaturesSettings, capacity: int) -> None:
        self._store = store
        self._settings = settings
        self._users: RowCache[str, UserState] = RowCache(capacity)
        self._items: RowCache[ItemKey, ItemPartial] = RowCache(capacity * _ITEMS_PER_USER)
        self._markers: dict[int, Offsets] = {}
        # Partitions of rows that were just read, until the store has proved to be the one that was written to.
        self._unproven: set[int] = set()

    def claim(self, partition: int, sources: Iterable[int]) -> Offsets:
        """The partition's marker, which from now on is expected to stay as this worker leaves it.

        Where there is none, one that says so is set: a store that is emptied later is then known by its absence.
        """
        self._markers[partition] = self._store.read_marker(partition)
        if not self._markers[partition]:
            self.write_markers({partition: {(source, partition): -1 for source in sources}}, {})
        return self._markers[partition]

    def write_markers(self, offsets: Mapping[int, Offsets], told: Mapping[int, Offsets]) -> None:
        """Moves partitions' markers forward (what they hold of other sources stays), and up to where replicas know."""
        moved: dict[int, tuple[Offsets, Offsets]] = {}
        for partition, reached in offsets.items():
            before = self._markers.get(partition, {})
            marker = {**before, **{where: max(offset, before.get(where, -1)) for where, offset in reached.items()}}
            if marker != before:
                moved[partition] = marker, before
        more = [Put(f"told:{partition}", known) for partition, known in told.items()]
        for partition, done in zip(moved, self._store.write_markers(moved, more), strict=False):
            if not done:
                # Emptied, older, or another worker's by now: rows in memory may not be what the store has.
                raise RowsChangedError(f"the marker of partition {partition}")
            self._markers[partition] = moved[partition][0]

    def read_told(self, partition: int) -> Offsets | None:
        """Up to where the replicas have been told of the partition's item statistics; None where nobody said."""
        return self._store.read_positions(f"told:{partition}")

    def drop(self, partitions: Iterable[int] | None = None) -> None:
        """Forgets the rows of some partitions, or everything."""
        if partitions is None:
            self._users.clear()
            self._items.clear()
            self._markers.clear()
            self._unproven.clear()
            return
        gone = set(partitions)
        self._users.drop(gone)
        self._items.drop(gone)
        for partition in gone:
            self._markers.pop(partition, None)
        self._unproven -= gone

    def commit(self, batch: Sequence[Received]) -> Applied:
        """Applies a batch and writes its rows.

        Raises:
            StageError: the store did not take everything, or has lost something; drop the rows, go back to the marker.
        """
        applied = Applied()
        for _ in range(_ATTEMPTS):
            self._load_together(batch)
            batch = self._load_users(batch, applied)
            if not batch:
                self._shrink()
                return applied
            users = {received.event.user_id for received in batch}
            states = {user_id: self._users[user_id].value for user_id in users}
            changes = processor.apply(batch, states, self._settings)
            self._write_items(changes, applied)
            self._tell_items_again(changes.replayed_items - applied.stats.keys(), applied)
            beaten = self._write_users(changes)
            self._tell(batch, changes, beaten, applied)
            newest = max((states[user_id].watermark_ms for user_id in changes.users - beaten), default=0)
            applied.watermark_ms = max(applied.watermark_ms, newest)
            batch = [received for received in batch if received.event.user_id in beaten]
        raise StageError("redis", f"rows of {len(batch)} events were changed by others {_ATTEMPTS} times; going back")

    def _load_together(self, batch: Sequence[Received]) -> None:
        """What a small batch needs, and the markers that prove it, in one round trip; a large one loads in parts."""
        if len(batch) > _ROWS_AT_ONCE:
            return
        partition_of = {received.event.user_id: received.raw.partition for received in batch}
        users = [user_id for user_id in partition_of if user_id not in self._users]
        touched = dict.fromkeys(key for received in batch for key in processor.items_of(received))
        items = [key for key in touched if key not in self._items]
        if not users and not items:
            return
        partitions = sorted(self._unproven | set(partition_of.values()))
        reads = ((USER_STATE, _user_keys(users), _USER_COLUMNS), (ITEM_STATS, _item_keys(items), _ITEM_COLUMNS))
        (user_rows, item_rows), markers = self._store.read_proven(reads, partitions)
        self._keep_users(users, user_rows, partition_of)
        self._keep_items(items, item_rows)
        self._prove(partitions, markers)

    # --- users ---

    def _load_users(self, batch: Sequence[Received], applied: Applied) -> Sequence[Received]:
        partition_of = {received.event.user_id: received.raw.partition for received in batch}
        missing = self._users.missing(partition_of)
        if not missing:
            return batch
        refused: dict[str, str] = {}
        for users in _some_at_once(missing):
            rows = self._store.read(USER_STATE, _user_keys(users), _USER_COLUMNS)
            refused |= self._keep_users(users, rows, partition_of)
        self._unproven.update(partition_of.values())
        if not refused:
            return batch
        applied.refused += [
            (received, refused[received.event.user_id]) for received in batch if received.event.user_id in refused
        ]
        return [received for received in batch if received.event.user_id not in refused]

    def _keep_users(self, users: Sequence[str], rows: Sequence[Row], partition_of: Mapping[str, int]) -> dict[str, str]:
        """Takes rows into memory; returns the users whose row cannot be read, and why."""
        refused: dict[str, str] = {}
        for user_id, row in zip(users, rows, strict=True):
            try:
                state = windows.decode(_bytes(row, "state"))
            except MalformedEventError as error:
                refused[user_id] = f"the user's row cannot be read: {error}"
                continue
            self._users[user_id] = Entry(state, row.raw.get("offsets", ABSENT), partition_of[user_id])
        return refused

    def _write_users(self, changes: Changes) -> set[str]:
        """Writes the changed users; returns those whose row somebody else had changed."""
        beaten: set[str] = set()
        for users in _some_at_once(changes.users):
            writes, raws = [], []
            for user_id in users:
                entry = self._users[user_id]
                state = entry.value
                write, raw = _guarded(
                    USER_STATE,
                    (user_id,),
                    state.offsets,
                    entry.raw,
                    {
                        "state": windows.encode(state),
                        "revision": state.revision,
                        "watermark_ms": state.watermark_ms,
                    },
                )
                writes.append(write)
                raws.append(raw)
            for user_id, raw, done in zip(users, raws, self._write(writes), strict=True):
                if done:
                    self._users[user_id].raw = raw
                else:
                    beaten.add(user_id)
        self._reload_beaten(beaten)
        return beaten

    def _reload_beaten(self, users: set[str]) -> None:
        if not users:
            return
        metrics.CONFLICTS.labels(USER_STATE.name).inc(len(users))
        keys = sorted(users)
        rows = self._store.read(USER_STATE, _user_keys(keys), ("offsets",))
        for user_id, row in zip(keys, rows, strict=True):
            _check_not_older(f"the row of user {user_id!r}", self._users.pop(user_id).raw, row)

    # --- items ---

    def _write_items(self, changes: Changes, applied: Applied) -> None:
        pending = changes.items
        for _ in range(_ATTEMPTS):
            self._load_items(pending)
            beaten: list[ItemKey] = []
            for keys in _some_at_once(pending):
                beaten += self._count_items({key: pending[key] for key in keys}, applied)
            if not beaten:
                return
            self._check_beaten_items(beaten)
            pending = {key: pending[key] for key in beaten}
        raise StageError("redis", f"{len(pending)} item rows were changed by others {_ATTEMPTS} times; going back")

    def _count_items(self, pending: Mapping[ItemKey, list[UserEvent]], applied: Applied) -> list[ItemKey]:
        """Adds events to loaded rows and writes them; returns those that somebody else had changed."""
        writes, raws, keys = [], [], []
        for key, events in pending.items():
            entry = self._items[key]
            partial = entry.value
            if not processor.count(partial, events, self._settings):
                continue
            stats = item_stats.encode(*key, partial, self._settings)
            cells: dict[str, Cell] = {"stats": stats, "revision": partial.revision}
            write, raw = _guarded(ITEM_STATS, (key[0], str(key[1])), partial.offsets, entry.raw, cells)
            writes.append(write)
            raws.append((entry, raw, stats))
            keys.append(key)
        beaten = []
        for key, (entry, raw, stats), done in zip(keys, raws, self._write(writes), strict=True):
            if done:
                entry.raw = raw
                applied.stats[key] = stats
                if any(event.kind != windows.IMPRESSION for event in pending[key]):
                    applied.with_events.add(key)
            else:
                beaten.append(key)
        return beaten

    def _tell_items_again(self, keys: set[ItemKey], applied: Applied) -> None:
        """Whoever wrote these rows may have died before the replicas were told."""
        self._load_items(dict.fromkeys(keys))
        for key in keys:
            partial = self._items[key].value
            if partial.revision:
                applied.stats[key] = item_stats.encode(*key, partial, self._settings)
                applied.with_events.add(key)

    def _check_beaten_items(self, keys: list[ItemKey]) -> None:
        metrics.CONFLICTS.labels(ITEM_STATS.name).inc(len(keys))
        rows = self._store.read(ITEM_STATS, _item_keys(keys), ("offsets",))
        for key, row in zip(keys, rows, strict=True):
            _check_not_older(f"the row of item {key[0]!r}", self._items.pop(key).raw, row)

    def _load_items(self, wanted: Mapping[ItemKey, object]) -> None:
        for some in _some_at_once(self._items.missing(wanted)):
            self._keep_items(some, self._store.read(ITEM_STATS, _item_keys(some), _ITEM_COLUMNS))
            self._unproven.update(partition for _, partition in some)

    def _keep_items(self, keys: Sequence[ItemKey], rows: Sequence[Row]) -> None:
        for key, row in zip(keys, rows, strict=True):
            self._items[key] = Entry(_partial(key, _bytes(row, "stats")), row.raw.get("offsets", ABSENT), key[1])

    # --- both ---

    def _write(self, writes: list[Write]) -> list[bool]:
        """Writes rows. What was read before counts only if the store still holds this worker's markers."""
        if self._unproven:
            partitions = sorted(self._unproven)
            self._prove(partitions, self._store.read_markers(partitions))
        return self._store.write(writes)

    def _prove(self, partitions: Sequence[int], markers: Sequence[Offsets]) -> None:
        for partition, marker in zip(partitions, markers, strict=True):
            if marker != self._markers.get(partition, {}):
                raise RowsChangedError(f"the marker of partition {partition}")
        self._unproven.clear()

    def _shrink(self) -> None:
        self._users.shrink()
        self._items.shrink()
        metrics.CACHED_ROWS.labels(USER_STATE.name).set(len(self._users))
        metrics.CACHED_ROWS.labels(ITEM_STATS.name).set(len(self._items))

    @staticmethod
    def _tell(batch: Sequence[Received], changes: Changes, beaten: set[str], applied: Applied) -> None:
        applied.dirty |= changes.dirty - beaten
        applied.late += changes.late
        applied.outside_horizon += changes.outside_horizon
        kept: Iterable[tuple[Received, Outcome]] = zip(batch, changes.outcomes, strict=True)
        if beaten:
            kept = [pair for pair in kept if pair[0].event.user_id not in beaten]
        applied.outcomes.update((received.raw.topic, outcome) for received, outcome in kept)


def _user_keys(users: Iterable[str]) -> list[tuple[str, ...]]:
    return [(user_id,) for user_id in users]


def _item_keys(keys: Iterable[ItemKey]) -> list[tuple[str, ...]]:
    return [(item_id, str(partition)) for item_id, partition in keys]


def _some_at_once(keys: Collection[K]) -> Iterator[list[K]]:
    remaining = iter(keys)
    while some := list(islice(remaining, _ROWS_AT_ONCE)):
        yield some


def _guarded(
    view: View, key: tuple[str, ...], offsets: Offsets, expected: bytes, cells: dict[str, Cell]
) -> tuple[Write, bytes]:
    """A write that takes effect only on the row as it was, and the raw offsets that it leaves."""
    value = positions.encode(offsets)
    cells["offsets"] = value
    return Write(view, key, cells, "offsets", expected), encode_cell(ColumnType.BYTES, value)


def _partial(key: ItemKey, stored: bytes) -> ItemPartial:
    if not stored:
        return ItemPartial()
    try:
        return item_stats.decode(ItemStats.FromString(stored))
    except DecodeError as error:
        # Statistics are not worth a standstill of the partition.
        _log.error("item row cannot be read and begins anew; rebuild it", item=key[0], problem=str(error))
        return ItemPartial()


def _bytes(row: Row, name: str) -> bytes:
    cell = row.cells.get(name, b"")
    return cell if isinstance(cell, bytes) else b""


def _check_not_older(what: str, ours: bytes, row: Row) -> None:
    """Raises RowsChangedError where the stored row misses something that this worker read or wrote before."""
    stored = read_offsets(row.raw.get("offsets", ABSENT))
    if any(offset > stored.get(where, -1) for where, offset in read_offsets(ours).items()):
        raise RowsChangedError(what)
