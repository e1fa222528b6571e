"""Rebuilds the online store from the event log, with the positions from which the stream goes on.

For a lost Redis whose topics no longer reach back, and for a changed feature definition (beside the live rows, under
another project). What `materialize` writes, but rows and markers carry the newest position of each partition in the
log: the stream skips what they include and reads on from there. Invariant: a row that includes more than the log does
stays as it is, and who was erased stays erased; so a rebuild may be run again at any time.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from core.bundle import CURRENT, ReleaseBundle, open_current
from core.clock import SystemClock
from core.settings import FeaturesSettings, Settings
from features import item_stats
from features.definitions import ITEM_STATS
from features.item_stats import ItemPartial
from features.positions import Offsets
from features.stores import erasures
from features.stores.definition import check_definition
from features.stores.erasures import Erasure, Erasures, UnerasedLog
from features.stores.event_log import EventLog, in_order, user_events
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, ITEMS, USERS, LogTable, from_table
from features.stores.log_positions import SOURCE, by_source, positions
from features.stores.online import ITEM_STATS_IN_DOUBT, OnlineStore
from headrace.v1.events_pb2 import Item, ItemStats, User
from offline.logs import open_log, read_items
from offline.materialize import MaterializeSummary, Origins, write_all
from offline.replay import LOG_PARTITION, SHOWN_COLUMNS, Entry, Replay, Shown, shown
from offline.reporting import Reporter

_EVENT_COLUMNS = (
    "user_id", "event_id", "item_id", "kind", "event_time", "value", "confidence", "categories", "segment"
)  # fmt: skip
_PLACE = ("partition", "offset", "ingest_time")
_DELETE_ROWS = 500
# Source and partition; None for what was imported.
Where = tuple[int, int] | None


@dataclass(frozen=True)
class RebuildSummary(MaterializeSummary):
    """And where the stream goes on."""

    project: str
    partitions: int
    erased_users: int


class PlacedReplay(Replay):
    """A replay that also keeps the sums of each source partition apart, and what each user's rows came from."""

    def __init__(self, items: Iterable[Item], settings: FeaturesSettings) -> None:
        super().__init__(items, settings)
        self.partition_partials: dict[int, dict[str, ItemPartial]] = {}
        self.wheres_of: dict[str, set[tuple[int, int]]] = {}

    def place(self, entries: Iterable[tuple[Entry, Where]]) -> None:
        for entry, where in entries:
            event = entry if not isinstance(entry, Shown) else entry.event
            if where is not None:
                self.wheres_of.setdefault(event.user_id, set()).add(where)
            if not self.advance((entry,)):
                continue
            partials = self.partition_partials.setdefault(LOG_PARTITION if where is None else where[1], {})
            for item_id in entry.item_ids if isinstance(entry, Shown) else (event.item_id,):
                self._count_in(partials, event._replace(item_id=item_id))

    def placed_stats(self) -> Iterator[ItemStats]:
        """The statistics as messages, one per item and source partition (-1 = imported), by partition and item_id."""
        for partition, partials in sorted(self.partition_partials.items()):
            for item_id, partial in sorted(partials.items()):
                yield item_stats.as_message(item_id, partition, partial, self._settings)


def rebuild(
    log_root: str | Path, registry: Path, settings: Settings, *, project: str | None = None, progress: bool = True
) -> RebuildSummary:
    """Replays a log into the online store.

    Args:
        log_root: folder or URL of the event log.
        registry: its current bundle, if there is one, gives vectors and batch scores.
        settings: where Redis is, and what is kept of users and items.
        project: write under this project, beside the rows of `features.project`.
        progress: show a progress bar.

    Raises:
        StageError: Redis does not answer.
        ConfigError, ArtifactError: a log or bundle that cannot be read; rows of another feature definition.
    """
    started = time.monotonic()
    if project:
        settings = settings.model_copy(update={"features": settings.features.model_copy(update={"project": project})})
    log = open_log(log_root)
    records = Erasures(str(log_root)).all()
    bundle = open_current(registry) if (registry / CURRENT).is_file() else None
    users, profiles = _states(log, USERS)
    replay = PlacedReplay(read_items(log), settings.features)
    replay.place(placed_entries(log))
    newest = {where: last for table in (EVENTS, FEEDBACK, IMPRESSIONS) for where, last in positions(log, table).items()}
    _, items = _states(log, ITEMS)
    kept_seconds = _kept_seconds(log, settings.streams.removed_item_keep_seconds)
    origins = Origins(
        _user_offsets(replay, newest, records),
        _with_tombstones(profiles, records),
        items,
        [stats for stats in _stats(replay, newest) if kept_seconds.get(stats.item_id, 1) > 0],
        frozenset(one.user_id for one in records) - replay.states.keys(),
    )
    store = OnlineStore(settings.redis, settings.features.project)
    try:
        written = _write(store, replay, users, bundle, settings, origins, records, Reporter(shown=progress))
        for stats in origins.stats or ():
            if stats.item_id in kept_seconds:
                key = (stats.item_id, str(stats.source_partition))
                store.expire(ITEM_STATS, [key], kept_seconds[stats.item_id])
        partitions = _write_markers(store, newest)
        store.drop_text(ITEM_STATS_IN_DOUBT)
    finally:
        store.close()
    return RebuildSummary(
        **written,
        watermark_ms=replay.watermark_ms,
        seconds=time.monotonic() - started,
        project=settings.features.project,
        partitions=partitions,
        erased_users=len(origins.erased),
    )


def placed_entries(log: UnerasedLog, end_ms: int | None = None) -> Iterator[tuple[Entry, Where]]:
    """What a log says, before `end_ms`, of users who were not erased since: in event-time order, with its origin."""
    lists = _rows(log, IMPRESSIONS, SHOWN_COLUMNS, end_ms)
    streams: list[Iterator[tuple[Entry, Where]]] = [zip(shown(lists), _wheres(lists), strict=True)]
    for table in (EVENTS, FEEDBACK):
        rows = _rows(log, table, _EVENT_COLUMNS, end_ms)
        streams.append(zip(user_events(rows), _wheres(rows), strict=True))
    return merge(*streams, key=lambda pair: pair[0].time_ms)


def _rows(log: UnerasedLog, table: LogTable, columns: Sequence[str], end_ms: int | None) -> pa.Table:
    """Copies stay, as the stream saw them: the states count them."""
    names = [*columns, *_PLACE]
    parts = []
    for _, rows in by_source(log, table, names):
        if end_ms is not None:
            rows = rows.filter(pc.less(rows["event_time"].cast(pa.int64()), end_ms))
        parts.append(rows)
    if not parts:
        return pa.schema([*(table.read_schema.field(name) for name in names), SOURCE]).empty_table()
    return in_order(pa.concat_tables(parts).unify_dictionaries().combine_chunks(), copies=True)


def _wheres(rows: pa.Table) -> Iterator[Where]:
    for batch in rows.select(["source", "partition"]).to_batches(max_chunksize=65_536):
        for source, partition in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield None if source is None or partition is None else (source, partition)


def _states(log: EventLog, table: LogTable) -> tuple[list[User], dict[str, Offsets]]:
    """The newest messages of a compacted topic, and the positions that each of their rows includes."""
    rows, newest = log.states(table), positions(log, table)
    messages = list(from_table(table, rows))
    offsets = {
        getattr(message, table.key): {where: last for where, last in newest.items() if where[1] == partition}
        for message, partition in zip(messages, rows["partition"].to_pylist(), strict=True)
        if partition is not None
    }
    return messages, offsets


def _user_offsets(replay: PlacedReplay, newest: Offsets, records: Sequence[Erasure]) -> dict[str, Offsets]:
    offsets = {user: {where: newest[where] for where in wheres} for user, wheres in replay.wheres_of.items()}
    for one in records:
        # Of a user who came back: the row must go beyond the erased one.
        if one.user_id in offsets:
            source, partition, position = one.tombstone
            for where, offset in {**one.cut, (source, partition): position}.items():
                offsets[one.user_id][where] = max(offset, offsets[one.user_id].get(where, -1))
    return offsets


def _with_tombstones(profiles: dict[str, Offsets], records: Sequence[Erasure]) -> dict[str, Offsets]:
    for one in records:
        if one.user_id in profiles:
            where = (one.tombstone.source, one.tombstone.partition)
            profiles[one.user_id][where] = max(one.tombstone.offset, profiles[one.user_id].get(where, -1))
    return profiles


def _stats(replay: PlacedReplay, newest: Offsets) -> list[ItemStats]:
    for partition, partials in replay.partition_partials.items():
        offsets = {where: last for where, last in newest.items() if where[1] == partition}
        for partial in partials.values():
            partial.offsets = dict(offsets)
    return list(replay.placed_stats())


def _kept_seconds(log: EventLog, keep_seconds: int) -> dict[str, int]:
    """Items that were removed: how long their statistics stay, as the stream keeps them (0 and less = no longer)."""
    rows, now_ms = log.newest(ITEMS), SystemClock().now_ms()
    rows = rows.filter(rows["deleted"])
    times = pc.fill_null(rows["ingest_time"].cast(pa.int64()), 0).to_pylist()
    ids = rows["item_id"].to_pylist()
    return {item_id: keep_seconds - (now_ms - time_ms) // 1000 for item_id, time_ms in zip(ids, times, strict=True)}


def _write(
    store: OnlineStore,
    replay: PlacedReplay,
    users: Sequence[User],
    bundle: ReleaseBundle | None,
    settings: Settings,
    origins: Origins,
    records: Sequence[Erasure],
    reporter: Reporter,
) -> dict[str, int]:
    check_definition(store, settings.features)
    erasures.apply(store, erasures.pending(store, records))
    written = write_all(store, replay, users, bundle, settings, reporter, origins)
    # Sums of a whole log from before would count what the partitions' own sums count now.
    imported = replay.partition_partials.get(LOG_PARTITION, {})
    stale = [(item_id, str(LOG_PARTITION)) for item_id in replay.partials if item_id not in imported]
    for start in range(0, len(stale), _DELETE_ROWS):
        store.delete(ITEM_STATS, stale[start : start + _DELETE_ROWS])
    return written


def _write_markers(store: OnlineStore, newest: Offsets) -> int:
    """After all rows: the stream goes on behind them."""
    numbers = sorted({partition for _, partition in newest})
    for partition in numbers:
        ours = {where: last for where, last in newest.items() if where[1] == partition}
        stored = store.read_marker(partition)
        store.write_marker(partition, {w: max(ours.get(w, -1), stored.get(w, -1)) for w in {**stored, **ours}})
    return len(numbers)
