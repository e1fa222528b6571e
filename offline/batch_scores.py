"""Batch scores: the top items of every user, encoded, retrieved and ranked in batches.

A part of the release bundle, and of the online store, where serving blends them with fresh signals and falls back on
them when the ranker is away. Invariant: a file of a part appears whole, so an interrupted run goes on after its last
part; scores are 0..1, best first, and never of items that the user has dealt with.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.bundle import BATCH_SCORES, open_current
from core.errors import ArtifactError
from core.settings import Settings
from features.catalog import Catalog
from features.definitions import USER_BATCH_SCORES
from features.stores.layout import Cell
from features.stores.online import OnlineStore, Write
from features.windows import UserState, recent_items
from offline.logs import log_fingerprint, open_log, with_new_items
from offline.models import Models
from offline.replay import Replay, read_entries
from offline.reporting import Reporter

SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_ids", pa.list_(pa.string()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
    ]
)
_PART_USERS = 2000
_BATCH_USERS = 64
_WRITE_ROWS = 500


class BatchScore(NamedTuple):
    """The top items of one user, best first, and their scores 0..1."""

    user_id: str
    item_ids: list[str]
    scores: list[float]


def score_users(
    models: Models, catalog: Catalog, states: Mapping[str, UserState], now_ms: int
) -> Iterator[list[BatchScore]]:
    """Scores users, one batch after the other, in the order of `states`.

    Args:
        models: what encodes, retrieves and ranks.
        catalog: items and statistics as of `now_ms`.
        states: user_id -> state; a user without events is left out.
        now_ms: features are as of this time.
    """
    settings = models.settings
    moment = models.moment(catalog, catalog.servable(now_ms), now_ms)
    users = [user_id for user_id, state in states.items() if state.revision]
    excluded_kinds = frozenset(settings.serving.exclude_seen_kinds)
    wanted = settings.offline.batch_scores_per_user
    for start in range(0, len(users), _BATCH_USERS):
        names = users[start : start + _BATCH_USERS]
        batch = [states[name] for name in names]
        seen = [catalog.rows(recent_items(state, excluded_kinds)) for state in batch]
        # Twice what is wanted leaves the ranker a choice.
        pools = models.pools(batch, catalog, moment, seen, 2 * wanted)
        scored = models.rank(batch, catalog, pools, now_ms)
        yield [
            _top(name, catalog, pool.rows, scores, wanted)
            for name, pool, scores in zip(names, pools, scored, strict=True)
        ]


def write_batch_scores(
    models: Models,
    catalog: Catalog,
    states: Mapping[str, UserState],
    now_ms: int,
    parts: Path,
    target: Path,
    reporter: Reporter,
) -> int:
    """Scores all users into one Parquet file; returns how many rows it has.

    Args:
        models: what encodes, retrieves and ranks.
        catalog: items and statistics as of `now_ms`.
        states: user_id -> state.
        now_ms: features are as of this time.
        parts: folder for finished parts; those that lie there from an interrupted run are used.
        target: the file.
        reporter: shows the progress.
    """
    parts.mkdir(parents=True, exist_ok=True)
    users = sorted(states)
    with reporter.bar("batch scores", len(users)) as advance:
        for start in range(0, len(users), _PART_USERS):
            names = users[start : start + _PART_USERS]
            part = parts / f"part-{start:09d}.parquet"
            if not part.is_file():
                chosen = {name: states[name] for name in names}
                scored = [row for batch in score_users(models, catalog, chosen, now_ms) for row in batch]
                _write(part, [scored])
            advance(len(names))
    files = sorted(parts.glob("part-*.parquet"))
    return _write(target, (list(_rows(file)) for file in files))


def read_batch_scores(path: Path) -> Iterator[BatchScore]:
    """Rows of a batch score file. Raises ArtifactError where it is missing or broken."""
    try:
        yield from _rows(path)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); train again with `headrace train`") from error


def store_batch_scores(rows: Iterator[BatchScore], version: str, store: OnlineStore) -> int:
    """Writes rows into the online store; returns how many. `version` is that of the bundle that scored them."""
    count = 0
    for batch in in_batches(rows, _WRITE_ROWS):
        store.write([_row_write(row, version) for row in batch])
        count += len(batch)
    return count


@dataclass(frozen=True)
class ScoreSummary:
    """What `score` wrote into the online store."""

    bundle_version: str
    users: int
    watermark_ms: int
    seconds: float


def score(
    log_root: str | Path, registry: Path, settings: Settings, *, device: str = "auto", progress: bool = True
) -> ScoreSummary:
    """Scores all users of a log anew with the current bundle and writes them into the online store.

    Args:
        log_root: folder or URL of the event log.
        registry: where bundles live; finished parts of an interrupted run are kept in it.
        settings: of features and candidates, and where Redis is.
        device: where the ranker runs: auto, cpu or cuda.
        progress: say on stderr what is going on.

    Raises:
        ConfigError, ArtifactError: no log or no bundle; says what to do.
        StageError: Redis does not answer.
    """
    started = time.monotonic()
    reporter = Reporter(shown=progress)
    log = open_log(log_root)
    bundle = open_current(registry)
    work = registry / ".scoring" / f"{bundle.version}-{log_fingerprint(log)[:16]}"
    replay = Replay(with_new_items(bundle.items(), log), settings.features)
    replay.advance(read_entries(log))
    models = Models.load(bundle.path, replay.catalog, settings, device)
    target = work / BATCH_SCORES
    reporter.say(f"scoring {len(replay.states):,} users with bundle {bundle.version}")
    store = OnlineStore(settings.redis, settings.features.project)
    try:
        # Before the work, not after it.
        store.ping()
        write_batch_scores(models, replay.catalog, replay.states, replay.watermark_ms, work / "parts", target, reporter)
        users = store_batch_scores(read_batch_scores(target), bundle.version, store)
    finally:
        store.close()
    shutil.rmtree(work, ignore_errors=True)
    return ScoreSummary(bundle.version, users, replay.watermark_ms, time.monotonic() - started)


def in_batches(rows: Iterator[BatchScore], size: int) -> Iterator[list[BatchScore]]:
    batch: list[BatchScore] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _row_write(row: BatchScore, version: str) -> Write:
    cells: dict[str, Cell] = {
        "batch_item_ids": row.item_ids,
        "batch_scores": row.scores,
        "batch_bundle_version": version,
    }
    return Write(USER_BATCH_SCORES, (row.user_id,), cells)


def _top(user_id: str, catalog: Catalog, rows: np.ndarray, scores: np.ndarray, count: int) -> BatchScore:
    best = np.argsort(-scores, kind="stable")[:count]
    return BatchScore(user_id, [catalog.item_ids[rows[index]] for index in best], scores[best].tolist())


def _write(path: Path, batches: Sequence[list[BatchScore]] | Iterator[list[BatchScore]]) -> int:
    count = 0
    unfinished = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer:
        for rows in batches:
            columns = zip(*rows, strict=True) if rows else ((), (), ())
            writer.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA))
            count += len(rows)
    unfinished.replace(path)
    return count


def _rows(path: Path) -> Iterator[BatchScore]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=2048):
            yield from map(BatchScore._make, zip(*(column.to_pylist() for column in batch.columns), strict=True))
