"""Logged features made again from the event log: whether training reads what the request read.

Serving logs, for a share of the answers, the numbers that the ranker read and the revision of every row behind them
(features/feature_log.py). Here the same rows are made from the log's events, through the same functions. Invariant: a
vector is rebuilt from exactly the revisions that it names, or it is said what the log lacks; nothing is guessed.

Exact means each bit. One thing no revision says: how events of two topics took turns in one row. Where a row has both,
its sums of doubles may differ in the last place, which the rounding to float32 hides all but once in millions.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import merge
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from google.protobuf.message import DecodeError

from core.bundle import open_bundle
from core.errors import ArtifactError, MalformedEventError, RecommenderError
from core.settings import Settings
from features import feature_log, item_stats, positions, windows
from features.catalog import Catalog
from features.feature_log import LoggedNumbers
from features.item_stats import ItemPartial
from features.positions import Offsets
from features.stores.erasures import UnerasedLog
from features.stores.event_log import EventLog, user_events
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, ITEMS, LogTable, from_table
from features.stores.log_positions import by_source
from features.vectors import CANDIDATE_FEATURES, SOURCES, Listed, ranker_input
from features.windows import Outcome, Position, UserEvent, UserState
from headrace.v1.events_pb2 import Item
from headrace.v1.feature_log_pb2 import LoggedFeatures, StatsRevision, StatsRevisions
from offline.logs import ImportedLog, open_log
from offline.replay import LOG_PARTITION, SHOWN_COLUMNS, Entry, Shown, read_entries, shown

_EVENT_COLUMNS = (
    "user_id", "event_id", "item_id", "kind", "event_time", "value", "confidence", "categories", "segment"
)  # fmt: skip
_PLACE = ("partition", "offset", "ingest_time")
_RETRIEVAL_SCORE = CANDIDATE_FEATURES.index("retrieval_score")
_FIRST_SOURCE = CANDIDATE_FEATURES.index(f"from_{SOURCES[0]}")
# Item and source partition.
_RowKey = tuple[str, int]


class NotRebuiltError(RecommenderError):
    """The log lacks something that the logged features came from."""


class LoggedAnswer(NamedTuple):
    """One answer that logged its features."""

    user_id: str
    recommendation_id: str
    features: LoggedFeatures


@dataclass
class Comparison:
    """Logged against rebuilt, over some answers."""

    answers: int = 0
    # Of them: messages that cannot be read, or of other features than this version's.
    unreadable_answers: int = 0
    # Of the others.
    items: int = 0
    # Items of answers whose numbers are the same in every bit.
    equal_items: int = 0
    # Answers by feature that differs.
    differing: Counter[str] = field(default_factory=Counter)
    # Items that could not be rebuilt, by what was missing.
    not_rebuilt: Counter[str] = field(default_factory=Counter)


class Rebuilt(NamedTuple):
    """Numbers made again, of those items that could be."""

    numbers: LoggedNumbers
    # Which of the logged items they are.
    places: list[int]
    # What was missing, of how many items.
    missing: Counter[str]


def logged_answers(log: EventLog, start_ms: int | None = None, end_ms: int | None = None) -> Iterator[LoggedAnswer]:
    """Answers that logged their features, in event-time order; an unreadable message comes as an empty one."""
    rows = log.rows(IMPRESSIONS, start_ms, end_ms, ("user_id", "recommendation_id", "features"))
    there = pc.greater(pc.binary_length(pc.fill_null(rows["features"], b"")), 0)
    for batch in rows.filter(there).to_batches(max_chunksize=1024):
        for user_id, recommendation_id, raw in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            try:
                features = LoggedFeatures.FromString(raw)
            except DecodeError:
                features = LoggedFeatures()
            yield LoggedAnswer(user_id, recommendation_id, features)


def skew(
    log_root: str | Path, registry: Path, settings: Settings, answers_max: int, before_ms: int | None = None
) -> Comparison:
    """Compares the newest answers of a log; `before_ms` as of `Rebuilder`."""
    log = open_log(log_root)
    answers = list(deque(logged_answers(log), answers_max))
    return compare(answers, Rebuilder(log, registry, settings, answers, before_ms))


def compare(answers: Sequence[LoggedAnswer], rebuilder: "Rebuilder") -> Comparison:
    """Rebuilds each answer and compares it, bit by bit."""
    found = Comparison()
    for answer in answers:
        found.answers += 1
        try:
            logged = feature_log.read_numbers(answer.features)
            found.items += len(logged.candidates)
            rebuilt = rebuilder.rebuild(answer)
        except NotRebuiltError as error:
            found.not_rebuilt[str(error)] += len(logged.candidates)
            continue
        except MalformedEventError:
            found.unreadable_answers += 1
            continue
        logged = logged._replace(candidates=logged.candidates[rebuilt.places])
        differing = feature_log.differing(logged, rebuilt.numbers)
        found.differing.update(differing)
        found.not_rebuilt += rebuilt.missing
        found.equal_items += 0 if differing else len(rebuilt.places)
    return found


class Rebuilder:
    """Makes the features of some logged answers again.

    Args:
        log: what was imported and what came over the topics.
        registry: folder of the release bundles; their items count, where the bundle is still there.
        settings: as the features were made with.
        answers: whose features will be asked for; what they do not name is not kept.
        before_ms: imported events from then on were not in the online store (`headrace materialize --before`).
    """

    def __init__(
        self,
        log: UnerasedLog,
        registry: Path,
        settings: Settings,
        answers: Sequence[LoggedAnswer],
        before_ms: int | None = None,
    ) -> None:
        self._settings = settings.features
        self._events = _Played(answers)
        self._events.play(read_entries(ImportedLog(log.root), end_ms=before_ms), settings)
        self._events.play(_in_turn(log), settings)
        self._items = _Descriptions(log, registry, settings, answers)
        self._partials: dict[tuple[str, bytes], ItemPartial] = {}

    def rebuild(self, answer: LoggedAnswer) -> Rebuilt:
        """The numbers as the ranker must have read them.

        Raises:
            NotRebuiltError: the log lacks what all of them came from: erased since, past retention, never imported.
            MalformedEventError: the message is broken, or of another feature signature.
        """
        features = answer.features
        logged = feature_log.read_numbers(features)
        state = self._state(answer)
        catalog = Catalog(self._settings)
        for entry, digest in zip(state.history, features.history_digests, strict=True):
            self._describe(catalog, entry.item_id, digest)
        places, missing = self._put_items(catalog, features)
        # These came with the request; of the list as a whole only the user's numbers tell.
        candidates = logged.candidates[places]
        scores = candidates[:, _RETRIEVAL_SCORE]
        bits = (candidates[:, _FIRST_SOURCE:].astype(np.int32) << np.arange(len(SOURCES))).sum(axis=1)
        rows = catalog.rows(features.item_ids[place] for place in places)
        listed = Listed.of_features(logged.user, candidates)
        now_ms, bits = features.as_of_time_ms, bits.astype(np.int32)
        made = ranker_input(state, catalog, rows, scores, bits, now_ms, self._settings, listed)
        return Rebuilt(feature_log.numbers_of(made, len(state.history)), places, missing)

    def _state(self, answer: LoggedAnswer) -> UserState:
        features, state = answer.features, UserState()
        included = positions.of_entries(features.state_offsets)
        known = [event for event in self._events.of_user(answer.user_id) if _includes(included, event.position)]
        windows.apply(state, known, self._settings)
        windows.apply(state, map(windows.as_user_event, features.session_events), self._settings)
        if state.revision != features.state_revision or len(state.history) != len(features.history_digests):
            raise NotRebuiltError("events of the user")
        return state

    def _put_items(self, catalog: Catalog, features: LoggedFeatures) -> tuple[list[int], Counter[str]]:
        """The logged items as the replica had them: the places of those that could be made, and what others lack."""
        places: list[int] = []
        missing: Counter[str] = Counter()
        logged = zip(features.item_ids, features.item_digests, features.stats_revisions, strict=True)
        for place, (item_id, digest, raw) in enumerate(logged):
            try:
                partials = [(one.source_partition, self._partial(item_id, one)) for one in _parse(raw)]
                self._describe(catalog, item_id, digest)
            except NotRebuiltError as error:
                missing[str(error)] += 1
                continue
            for source_partition, partial in partials:
                catalog.put_partial(item_id, source_partition, partial)
            places.append(place)
        return places, missing

    def _describe(self, catalog: Catalog, item_id: str, digest: int) -> None:
        if digest:
            catalog.upsert(self._items.find(item_id, digest))

    def _partial(self, item_id: str, wanted: StatsRevision) -> ItemPartial:
        key = item_id, wanted.SerializeToString(deterministic=True)
        if key not in self._partials:
            self._partials[key] = self._count(item_id, wanted)
        return self._partials[key]

    def _count(self, item_id: str, wanted: StatsRevision) -> ItemPartial:
        events = self._events.of_item((item_id, wanted.source_partition))
        offsets = positions.of_entries(wanted.offsets)
        if offsets:
            chosen = [event for event in events if event.position and _includes(offsets, event.position)]
        else:
            # Of a bundle, or of what was imported: counted in event-time order up to some time.
            chosen = sorted(events, key=lambda event: event.time_ms)[: wanted.revision]
        partial = ItemPartial()
        for event in chosen:
            item_stats.apply(partial, event, self._settings)
        if (partial.revision, partial.watermark_ms) != (wanted.revision, wanted.watermark_ms):
            raise NotRebuiltError("events of an item")
        return partial


class _Played:
    """The events of the log that counted, of the users and items that some answers name, in the order applied."""

    def __init__(self, answers: Iterable[LoggedAnswer]) -> None:
        self._states: dict[str, UserState] = defaultdict(UserState)
        self._of_user: dict[str, list[UserEvent]] = {}
        self._of_item: dict[_RowKey, list[UserEvent]] = {}
        for answer in answers:
            self._of_user.setdefault(answer.user_id, [])
            with suppress(MalformedEventError):
                for item_id, raw in zip(answer.features.item_ids, answer.features.stats_revisions, strict=False):
                    for revision in _parse(raw):
                        self._of_item.setdefault((item_id, revision.source_partition), [])

    def of_user(self, user_id: str) -> list[UserEvent]:
        return self._of_user.get(user_id, [])

    def of_item(self, row: _RowKey) -> list[UserEvent]:
        return self._of_item.get(row, [])

    def play(self, entries: Iterable[Entry], settings: Settings) -> None:
        for entry in entries:
            event, items = (entry.event, entry.item_ids) if isinstance(entry, Shown) else (entry, (entry.item_id,))
            if event.user_id in self._of_user:
                # Duplicates, too: whether they are any is up to what came before them.
                self._of_user[event.user_id].append(event)
            (outcome,) = windows.apply(self._states[event.user_id], (event,), settings.features)
            if outcome is not Outcome.APPLIED:
                continue
            partition = LOG_PARTITION if event.position is None else event.position.partition
            for item_id in items:
                if (item_id, partition) in self._of_item:
                    self._of_item[item_id, partition].append(event._replace(item_id=item_id))


class _Descriptions:
    """Every description that the answers' items have had, by item and digest."""

    def __init__(self, log: EventLog, registry: Path, settings: Settings, answers: Sequence[LoggedAnswer]) -> None:
        self._found: dict[tuple[str, int], Item] = {}
        self._scratch = Catalog(settings.features)
        rows = log.read(ITEMS, log.files(ITEMS), ITEMS.read_schema.names)
        self._add(from_table(ITEMS, rows.filter(pc.invert(pc.fill_null(rows["deleted"], False)))))  # noqa: FBT003
        for version in sorted({answer.features.bundle_version for answer in answers}):
            try:
                self._add(open_bundle(registry / version).items())
            except ArtifactError:
                # Retired since: the log describes its items, too.
                continue

    def find(self, item_id: str, digest: int) -> Item:
        found = self._found.get((item_id, digest))
        if found is None and self._digest(bare := Item(item_id=item_id)) == digest:
            # Known from its statistics alone.
            return bare
        if found is None:
            raise NotRebuiltError("the description of an item")
        return found

    def _add(self, items: Iterable[Item]) -> None:
        for item in items:
            self._found[item.item_id, self._digest(item)] = item

    def _digest(self, item: Item) -> int:
        row = self._scratch.upsert(item)
        return self._scratch.digests(np.array([row], np.int32))[0]


def _in_turn(log: UnerasedLog) -> Iterator[Entry]:
    """What came over the topics, with its position: in the order of each partition, topics taking turns by time."""
    streams: list[Iterator[tuple[int, Entry]]] = []
    for table in (EVENTS, FEEDBACK, IMPRESSIONS):
        columns = SHOWN_COLUMNS if table is IMPRESSIONS else _EVENT_COLUMNS
        for source, rows in by_source(log, table, [*columns, *_PLACE]):
            if source is not None:
                streams.append(_timed(table, source, rows))
    return (entry for _, entry in merge(*streams, key=lambda pair: pair[0]))


def _timed(table: LogTable, source: int, rows: pa.Table) -> Iterator[tuple[int, Entry]]:
    """Entries of one topic, with a time that never runs backwards within a partition."""
    partition, offset, time_ms = (_int64(rows[name]) for name in _PLACE)
    order = np.lexsort((offset, partition))
    times = np.empty(len(order), np.int64)
    bounds = np.flatnonzero(np.diff(partition[order])) + 1
    for part in np.split(np.arange(len(order)), bounds):
        times[part] = np.maximum.accumulate(time_ms[order[part]])
    turn = np.argsort(times, kind="stable")
    rows = rows.take(pa.array(order[turn]))
    entries: Iterator[Entry] = shown(rows) if table is IMPRESSIONS else user_events(rows)
    places = zip(partition[order[turn]].tolist(), offset[order[turn]].tolist(), times[turn].tolist(), strict=True)
    for entry, (number, at, time) in zip(entries, places, strict=True):
        yield time, _placed(entry, Position(source, number, at))


def _placed(entry: Entry, position: Position) -> Entry:
    if isinstance(entry, Shown):
        return entry._replace(event=entry.event._replace(position=position))
    return entry._replace(position=position)


def _includes(offsets: Offsets, position: Position | None) -> bool:
    """Whether a row of these positions includes an event; what was imported is in all of them."""
    return position is None or position.offset <= offsets.get(position[:2], -1)


def _parse(raw: bytes) -> Sequence[StatsRevision]:
    try:
        return StatsRevisions.FromString(raw).revisions
    except DecodeError as error:
        raise MalformedEventError("features.stats_revisions", f"not encoded revisions ({error})") from error


def _int64(column: pa.ChunkedArray) -> Any:
    return pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
