"""Erasures: what a user's tombstone leaves behind, so that what was removed does not come back.

    ROOT/_erased/<source>-p<partition>-<offset>.json    one small record per tombstone, beside the event log
    ROOT/_erased/<source>-p<partition>-<offset>.done    its files were rewritten, too

The stream's users agent makes the records; the reader applies them again wherever it starts, and whoever reads the log
leaves out what they name, from the moment that they are there (`UnerasedLog`). `headrace erase` takes it out of the
files, of one user or of all whose tombstones came. The rule: a tombstone erases what Kafka held of the user when a
worker got to it. These positions are the *cut*. The user's row becomes an empty state that includes the cut, so to the
row rules every older event is a replay. Invariant: the record is there before the row is erased, and a row that
includes a tombstone is never erased by it again, so a user who comes back keeps what is new.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import StageError
from features import positions, windows
from features.definitions import USER_PROFILE, USER_STATE
from features.positions import Offsets
from features.stores.event_log import EventLog
from features.stores.event_rows import ITEMS, USERS, LogTable
from features.stores.layout import Cell
from features.stores.log_positions import source_of
from features.stores.online import ABSENT, OnlineStore, Row, Write, read_offsets
from features.windows import Position, UserState

FOLDER = "_erased"
_ATTEMPTS = 50


@dataclass(frozen=True, slots=True)
class Erasure:
    """One tombstone of a user. `cut` names the newest positions of the user-keyed topics that it erases."""

    user_id: str
    tombstone: Position
    cut: Offsets = field(default_factory=dict)
    time_ms: int = 0

    def erases(self, source: int | None, partition: int | None, offset: int | None, ingest_ms: int | None) -> bool:
        """Whether a message of the user, at this position of a user-keyed topic, is from before the tombstone.

        A topic of another life (made anew since, or before) has no position in the cut: there the time decides. What
        was imported (no position) is erased, whenever it was imported.
        """
        if source is None or partition is None or offset is None:
            return True
        if (source, partition) in self.cut:
            return offset <= self.cut[source, partition]
        return ingest_ms is None or ingest_ms <= self.time_ms

    def erases_profile(
        self, source: int | None, partition: int | None, offset: int | None, ingest_ms: int | None
    ) -> bool:
        """The same for a message of the users topic; the tombstone is one of them."""
        where = (self.tombstone.source, self.tombstone.partition)
        if offset is not None and (source, partition) == where:
            return offset <= self.tombstone.offset
        return ingest_ms is None or ingest_ms <= self.time_ms


class Erasures:
    """The records beside one event log. Each is read once."""

    def __init__(self, log_root: str) -> None:
        self._root = log_root.rstrip("/")
        self._files, path = fsspec.core.url_to_fs(self._root)
        self._folder = f"{path.rstrip('/')}/{FOLDER}"
        self._known: dict[str, Erasure] = {}

    def add(self, erasure: Erasure) -> Erasure:
        """Keeps a record and returns it; where the same tombstone has one already, that. Raises StageError."""
        path = self._path(erasure, "json")
        content = {
            "user_id": erasure.user_id,
            "tombstone": list(erasure.tombstone),
            "cut": [[*where, position] for where, position in sorted(erasure.cut.items())],
            "time_ms": erasure.time_ms,
        }
        try:
            if self._files.exists(path):
                return _parse(self._files.cat_file(path))
            self._files.makedirs(self._folder, exist_ok=True)
            unfinished = f"{path}.tmp"
            self._files.pipe_file(unfinished, json.dumps(content).encode())
            self._files.mv(unfinished, path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._failed(error) from error
        return erasure

    def all(self) -> list[Erasure]:
        """Every record, in the order of their names. Raises StageError."""
        try:
            self._files.invalidate_cache()
            names = sorted(str(path) for path in self._files.glob(f"{self._folder}/*.json"))
            for name in names:
                if name not in self._known:
                    self._known[name] = _parse(self._files.cat_file(name))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._failed(error) from error
        return [self._known[name] for name in names]

    def unfinished(self) -> list[Erasure]:
        """Records whose files nobody has rewritten yet. Raises StageError."""
        found = self.all()
        try:
            done = {str(path).removesuffix(".done") for path in self._files.glob(f"{self._folder}/*.done")}
        except OSError as error:
            raise self._failed(error) from error
        return [erasure for erasure in found if self._path(erasure, "json").removesuffix(".json") not in done]

    def finish(self, erasures: Iterable[Erasure], time: str) -> None:
        """Notes that the files are rewritten. Raises StageError."""
        try:
            for erasure in erasures:
                self._files.pipe_file(self._path(erasure, "done"), time.encode())
        except OSError as error:
            raise self._failed(error) from error

    def of(self, user_id: str) -> list[Erasure]:
        return [erasure for erasure in self.all() if erasure.user_id == user_id]

    def _path(self, erasure: Erasure, ending: str) -> str:
        source, partition, offset = erasure.tombstone
        return f"{self._folder}/{source:016x}-p{partition}-{offset:020d}.{ending}"

    def _failed(self, error: Exception) -> StageError:
        return StageError("event-log", f"{self._root}/{FOLDER}: {' '.join(str(error).split())[:300]}; is it writable?")


def apply(store: OnlineStore, erasures: Sequence[Erasure]) -> list[str]:
    """Erases rows that do not include their tombstone yet; returns whose they were.

    All that the online store keeps of the user goes (state, vector, batch scores, profile); positions stay.

    Raises:
        StageError: the store did not take it.
    """
    erased: list[str] = []
    # One after the other where a user has several.
    for erasure in erasures:
        for _ in range(_ATTEMPTS):
            done = _apply_one(store, erasure)
            if done is not None:
                erased += [erasure.user_id] if done else []
                break
        else:
            raise StageError("redis", f"the row of an erased user was changed {_ATTEMPTS} times; going back")
    return erased


def pending(store: OnlineStore, erasures: Sequence[Erasure]) -> list[Erasure]:
    """Those whose rows do not include them; one round trip."""
    if not erasures:
        return []
    rows = store.read(USER_PROFILE, [(erasure.user_id,) for erasure in erasures], ("profile_offsets",))
    return [erasure for erasure, row in zip(erasures, rows, strict=True) if not _includes(row, erasure)]


def erase_again(store: OnlineStore, erasures: Erasures) -> list[str]:
    """Before reading from a marker: a store that lost rows, or came back older, must not bring erased users back."""
    return apply(store, pending(store, erasures.all()))


def tombstone_writes(user_id: str, offsets: Mapping[tuple[int, int], int], profile: Offsets) -> list[Write]:
    """The row of an erased user: an empty state, and the positions that it includes."""
    state = UserState(offsets=dict(offsets))
    cells: dict[str, Cell] = {"state": windows.encode(state), "offsets": positions.encode(state.offsets)}
    return [
        Write(USER_STATE, (user_id,), cells, "offsets"),
        Write(USER_PROFILE, (user_id,), {"profile_offsets": positions.encode(profile)}),
    ]


def surviving(
    rows: pa.Table, source: int | None, erasures: Iterable[Erasure], *, profiles: bool = False
) -> npt.NDArray[np.bool_]:
    """Which rows of the event log are not erased.

    Args:
        rows: of one source, with the columns user_id, partition, offset, ingest_time.
        source: the topic's identity; None for imported rows.
        erasures: records, of any users.
        profiles: the rows are of the users topic.
    """
    by_user: dict[str, list[Erasure]] = {}
    for erasure in erasures:
        by_user.setdefault(erasure.user_id, []).append(erasure)
    kept = np.ones(rows.num_rows, bool)
    if not by_user or not rows.num_rows:
        return kept
    ids = rows["user_id"].cast(pa.string())
    hits = np.flatnonzero(pc.is_in(ids, pa.array(list(by_user), pa.string())).to_numpy())
    named = rows.select(["partition", "offset", "ingest_time"]).take(pa.array(hits))
    places = zip(
        hits.tolist(),
        ids.take(pa.array(hits)).to_pylist(),
        named["partition"].to_pylist(),
        named["offset"].to_pylist(),
        named["ingest_time"].cast(pa.int64()).to_pylist(),
        strict=True,
    )
    for index, user_id, *place in places:
        kept[index] = not any(
            one.erases_profile(source, *place) if profiles else one.erases(source, *place) for one in by_user[user_id]
        )
    return kept


def apply_anew(store: OnlineStore, erasure: Erasure) -> bool:
    """Erases what came into an erased row without an event of the user. False: the row was changed meanwhile."""
    return bool(_apply_one(store, erasure, anew=True))


def _apply_one(store: OnlineStore, erasure: Erasure, *, anew: bool = False) -> bool | None:
    """True = erased, False = it was erased already, None = the row was changed meanwhile."""
    (profile,) = store.read(USER_PROFILE, [(erasure.user_id,)], ("profile_offsets",))
    if _includes(profile, erasure) and not anew:
        return False
    (state,) = store.read(USER_STATE, [(erasure.user_id,)], ("offsets",))
    raw = state.raw.get("offsets", ABSENT)
    offsets = _later(read_offsets(raw), erasure.cut)
    source, partition, offset = erasure.tombstone
    held = _later(read_offsets(profile.raw.get("profile_offsets", ABSENT)), {(source, partition): offset})
    # With the tombstone's own position the row differs from any that a worker may still have in memory.
    first, second = tombstone_writes(erasure.user_id, {**offsets, (source, partition): offset}, held)
    return True if store.replace([Write(first.view, first.key, first.cells, "offsets", raw), second]) else None


def _includes(row: Row, erasure: Erasure) -> bool:
    source, partition, offset = erasure.tombstone
    return read_offsets(row.raw.get("profile_offsets", ABSENT)).get((source, partition), -1) >= offset


def _later(one: Offsets, other: Offsets) -> Offsets:
    return {where: max(one.get(where, -1), other.get(where, -1)) for where in {**one, **other}}


def _parse(raw: bytes) -> Erasure:
    record = json.loads(raw)
    cut = {(source, partition): offset for source, partition, offset in record["cut"]}
    return Erasure(record["user_id"], Position(*record["tombstone"]), cut, record["time_ms"])


class UnerasedLog(EventLog):
    """A log as it reads without what tombstones erased and nobody has rewritten yet: for training and scoring."""

    def __init__(self, root: str | Path) -> None:
        """Raises StageError where the records cannot be read."""
        super().__init__(root)
        self._records = Erasures(self.root).all()

    def read(self, table: LogTable, paths: list[str], columns: list[str], condition: Any = None) -> pa.Table:
        if not self._records or table is ITEMS or not paths:
            return super().read(table, paths, columns, condition)
        needed = list(dict.fromkeys([*columns, "user_id", "partition", "offset", "ingest_time"]))
        by_source: dict[int | None, list[str]] = {}
        for path in paths:
            by_source.setdefault(source_of(path), []).append(path)
        parts = []
        for source, files in by_source.items():
            rows = super().read(table, files, needed, condition)
            kept = surviving(rows, source, self._records, profiles=table is USERS)
            parts.append(rows.filter(pa.array(kept)).select(columns))
        return pa.concat_tables(parts).unify_dictionaries().combine_chunks()
