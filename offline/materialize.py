"""Puts into the online store what the stream would have put there for imported events, so that serving starts warm.

Run before streaming begins: the demo, a first start. Invariant: nothing is counted twice. What the log has from the
topics is left out, since the stream counts it (in a lost Redis `rebuild` does); rows that the stream has written (they
carry offsets) stay as they are; the statistics go under source partition -1, beside the stream's own. What was imported
must not be sent to the topics as well.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from candidate.encoder import UserEncoder
from candidate.towers import load_towers
from core.bundle import BATCH_SCORES, ReleaseBundle
from core.settings import Settings
from features import positions, windows
from features.catalog import Catalog
from features.definitions import (
    ITEM_PROFILE,
    ITEM_STATS,
    POPULARITY,
    USER_EMBEDDING,
    USER_PROFILE,
    USER_STATE,
    ColumnType,
)
from features.positions import Offsets
from features.stores.definition import check_definition
from features.stores.erasures import UnerasedLog
from features.stores.layout import Cell, encode_cell
from features.stores.online import ABSENT, OnlineStore, Write, read_offsets
from features.windows import UserState
from headrace.v1.events_pb2 import Item, ItemStats, User
from offline.batch_scores import read_batch_scores, store_batch_scores
from offline.logs import ImportedLog, read_items
from offline.models import read_item_vectors
from offline.popularity import popularity_lists
from offline.replay import Replay, read_entries
from offline.reporting import Reporter

_ROWS_PER_WRITE = 500
_USERS_PER_ENCODING = 256
# The segment of everybody, in the popularity view.
EVERYBODY = "all"


@dataclass(frozen=True)
class MaterializeSummary:
    """Rows written per view, and rows that were left to the stream."""

    users: int
    user_embeddings: int
    user_profiles: int
    batch_scores: int
    items: int
    item_stats: int
    popularity_lists: int
    left_to_stream: int
    watermark_ms: int
    seconds: float


@dataclass(frozen=True)
class Origins:
    """Source positions that the rows of a log include. Without any, rows are written beside the stream's."""

    users: Mapping[str, Offsets] = field(default_factory=dict)
    profiles: Mapping[str, Offsets] = field(default_factory=dict)
    items: Mapping[str, Offsets] = field(default_factory=dict)
    # Statistics per source partition; None = those of the replay, as a whole.
    stats: Sequence[ItemStats] | None = None
    # Users who must not come back.
    erased: frozenset[str] = frozenset()


NOWHERE = Origins()


def materialize(
    log_root: str | Path,
    bundle: ReleaseBundle | None,
    settings: Settings,
    *,
    before_ms: int | None = None,
    progress: bool = True,
) -> MaterializeSummary:
    """Replays what was imported into a log and writes its rows; items and users as the log knows them, however.

    Args:
        log_root: folder or URL of the event log.
        bundle: whose batch scores and user vectors to write; None = neither.
        settings: where Redis is, and what is kept of users and items.
        before_ms: only events before this time.
        progress: show a progress bar.

    Raises:
        StageError: Redis does not answer.
        ConfigError, ArtifactError: a log or bundle that cannot be read; rows of another feature definition.
    """
    started = time.monotonic()
    log = UnerasedLog(log_root)
    users = list(log.users())
    replay = Replay(read_items(log), settings.features)
    replay.advance(read_entries(ImportedLog(log_root), end_ms=before_ms))
    store = OnlineStore(settings.redis, settings.features.project)
    try:
        check_definition(store, settings.features)
        written = write_all(store, replay, users, bundle, settings, Reporter(shown=progress))
    finally:
        store.close()
    return MaterializeSummary(**written, watermark_ms=replay.watermark_ms, seconds=time.monotonic() - started)


def write_all(
    store: OnlineStore,
    replay: Replay,
    users: Sequence[User],
    bundle: ReleaseBundle | None,
    settings: Settings,
    reporter: Reporter,
    origins: Origins = NOWHERE,
) -> dict[str, int]:
    """Writes the rows of every view; returns how many of each."""
    items = replay.catalog.items
    popular = popularity_lists(replay, replay.watermark_ms, settings)
    lists = {EVERYBODY: popular["all"], **popular["segments"]}
    stats = list(replay.item_stats()) if origins.stats is None else origins.stats
    total = 2 * len(replay.states) + len(items) + len(stats) + len(users) + len(lists)
    written: dict[str, int] = {}
    with reporter.bar("online store", total) as advance:
        writer = _Writer(store, advance)
        written["users"] = writer.write(
            state_write(user, state, origins.users.get(user)) for user, state in replay.states.items()
        )
        written["item_stats"] = writer.write(map(_stats_write, stats))
        written["items"] = writer.write(item_write(item, origins.items.get(item.item_id)) for item in items)
        written["user_profiles"] = writer.write(
            profile_write(user, origins.profiles.get(user.user_id)) for user in users
        )
        written["popularity_lists"] = writer.write(
            _popularity_write(name, ranked, replay.watermark_ms) for name, ranked in lists.items()
        )
        # Where the stream owns the state, it owns the vector too.
        ours = {user_id: state for user_id, state in replay.states.items() if (user_id,) not in writer.refused}
        vectors = _embedding_writes(ours, bundle, settings) if bundle is not None else iter(())
        written["user_embeddings"] = writer.write(vectors)
    written["batch_scores"] = 0
    if bundle is not None and bundle.has(BATCH_SCORES):
        rows = (row for row in read_batch_scores(bundle.file(BATCH_SCORES)) if row.user_id not in origins.erased)
        written["batch_scores"] = store_batch_scores(rows, bundle.version, store)
    return written | {"left_to_stream": len(writer.refused)}


class _Writer:
    """Writes rows in batches, and remembers the keys of those that the stream owns."""

    def __init__(self, store: OnlineStore, advance: Callable[[int], None]) -> None:
        self._store, self._advance = store, advance
        self.refused: set[tuple[str, ...]] = set()

    def write(self, writes: Iterable[Write]) -> int:
        remaining, done = iter(writes), 0
        while batch := list(islice(remaining, _ROWS_PER_WRITE)):
            taken = self._store.write(self._over_older(batch))
            done += sum(taken)
            self.refused.update(row.key for row, took in zip(batch, taken, strict=True) if not took)
            self._advance(len(batch))
        return done

    def _over_older(self, batch: Sequence[Write]) -> list[Write]:
        """Rows with positions replace what they include; the others take effect where no row has any."""
        placed = [row for row in batch if row.guard and row.guard in row.cells]
        if not placed:
            return list(batch)
        view, guard = placed[0].view, placed[0].guard
        stored = self._store.read(view, [row.key for row in placed], (guard,))
        expected: dict[tuple[str, ...], bytes] = {}
        for row, old in zip(placed, stored, strict=True):
            raw = old.raw.get(guard, ABSENT)
            ours = read_offsets(encode_cell(ColumnType.BYTES, row.cells[guard]))
            if all(offset <= ours.get(where, -1) for where, offset in read_offsets(raw).items()):
                expected[row.key] = raw
        return [row._replace(expected=expected.get(row.key, row.expected)) for row in batch]


def state_write(user_id: str, state: UserState, offsets: Offsets | None = None) -> Write:
    """The user's row. Without offsets it takes effect only where the stream has not been yet."""
    state.offsets = dict(offsets or state.offsets)
    cells: dict[str, Cell] = {
        "state": windows.encode(state),
        "revision": state.revision,
        "watermark_ms": state.watermark_ms,
    }
    return _placed(Write(USER_STATE, (user_id,), cells, guard="offsets"), offsets)


def item_write(item: Item, offsets: Offsets | None = None) -> Write:
    cells: dict[str, Cell] = {"item": item.SerializeToString(deterministic=True), "title": item.title}
    return _placed(Write(ITEM_PROFILE, (item.item_id,), cells, guard="item_offsets"), offsets)


def profile_write(user: User, offsets: Offsets | None = None) -> Write:
    cells: dict[str, Cell] = {"profile": user.SerializeToString(deterministic=True), "profile_segment": user.segment}
    return _placed(Write(USER_PROFILE, (user.user_id,), cells, guard="profile_offsets"), offsets)


def _placed(write: Write, offsets: Offsets | None) -> Write:
    if not offsets:
        return write
    return write._replace(cells={**write.cells, write.guard: positions.encode(offsets)})


def _stats_write(stats: ItemStats) -> Write:
    cells: dict[str, Cell] = {"stats": stats.SerializeToString(deterministic=True), "revision": stats.revision}
    key = (stats.item_id, str(stats.source_partition))
    if not stats.offsets:
        return Write(ITEM_STATS, key, cells)
    return _placed(Write(ITEM_STATS, key, cells, guard="offsets"), positions.of_entries(stats.offsets))


def _popularity_write(segment: str, ranked: Sequence[tuple[str, float]], watermark_ms: int) -> Write:
    cells: dict[str, Cell] = {
        "popular_item_ids": [item_id for item_id, _ in ranked],
        "popular_scores": [score for _, score in ranked],
        "popular_watermark_ms": watermark_ms,
    }
    return Write(POPULARITY, (segment,), cells)


def _embedding_writes(states: Mapping[str, UserState], bundle: ReleaseBundle, settings: Settings) -> Iterator[Write]:
    encoder = UserEncoder(load_towers(bundle.path), settings.features)
    # Vectors go by the bundle's own rows; the log may know more items by now.
    catalog = Catalog.of_items(bundle.items(), settings.features)
    item_vectors = read_item_vectors(bundle.path)
    version = bundle.manifest.embedding_version
    users = iter(states.items())
    while batch := list(islice(users, _USERS_PER_ENCODING)):
        vectors, known = encoder.encode([state for _, state in batch], catalog, item_vectors)
        for (user_id, state), vector, has_vector in zip(batch, vectors, known, strict=True):
            if has_vector:
                cells: dict[str, Cell] = {
                    "vector": vector.tolist(),
                    "embedding_version": version,
                    "embedding_revision": state.revision,
                }
                yield Write(USER_EMBEDDING, (user_id,), cells)
