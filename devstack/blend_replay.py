"""A log played in event time as serving would have answered it: batch scores of each day, fresh signals of the moment.

For `headrace tune` and the hybrid benchmark. Invariant: batch scores are of the midnight before, fresh signals of a
given delay before, and nothing that is predicted from has happened at, or after, the time of what is predicted.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from candidate.co_visitation import CoVisitation
from core.settings import Settings
from features.catalog import Floats, Rows
from features.stores.event_log import EventLog
from features.windows import UserState
from headrace.v1.events_pb2 import Item
from offline.batch_scores import score_users
from offline.co_visitation import PairsTimeline
from offline.models import Models
from offline.replay import Entry, Group, Replay, read_entries
from serving.query import SOURCE_BIT
from serving.stages.rank import as_trained
from serving.stages.rerank import affinity, recency, trending_lift
from serving.stages.retrieve import FUSION

DAY_MS = 86_400_000
# Length of the lists of popular items.
_POPULAR = 100
# Score parts of a moment, by the names of the blend weights.
PARTS = ("ranker", "batch", "retrieval", "affinity", "trending", "recency")


class Moment(NamedTuple):
    """One prediction: candidates with their score parts, and what the user then chose."""

    user_id: str
    time_ms: int
    # Whether the last batch run knew the user, and whether anything at all is known: else the ladder answers.
    warm: bool
    known: bool
    # Catalogue rows that may be shown. [C]
    rows: Rows
    # Part -> raw values. [C] each
    parts: dict[str, npt.NDArray[np.floating]]
    # The most popular rows that may be shown, best first, as of the batch run and as of the fresh signals.
    popular: Rows
    popular_now: Rows
    # Candidates that the batch scores brought. [C]
    from_batch: npt.NDArray[np.bool_]
    # Rows that the user chose for the first time.
    targets: npt.NDArray[np.int64]
    # How late the fresh signals were.
    delay_ms: int = 0

    @property
    def places(self) -> list[int]:
        """Where the chosen ones are among the candidates; those that are not are left out."""
        at = np.searchsorted(self.rows, self.targets)
        inside = at < len(self.rows)
        return [
            int(place) for place, row in zip(at[inside], self.targets[inside], strict=True) if self.rows[place] == row
        ]


@dataclass(frozen=True)
class Plan:
    """What is predicted."""

    start_ms: int
    end_ms: int | None = None
    # Each moment comes once for each of these.
    delays_ms: tuple[int, ...] = (0,)
    # One moment in so many.
    every: int = 1


class BlendReplay:
    """Plays a log and stops at moments with something to predict."""

    def __init__(self, log: EventLog, items: Sequence[Item], models: Models, settings: Settings) -> None:
        self._log, self._models, self._settings = log, models, settings
        self._count = len(items)
        self._row_of = {item.item_id: row for row, item in enumerate(items)}
        self._items = items
        self._positive = frozenset(settings.features.positive_kinds)

    def moments(self, plan: Plan) -> Iterator[Moment]:
        """Moments of `plan`, in event time."""
        entries = list(read_entries(self._log, end_ms=plan.end_ms))
        start = bisect_left(entries, plan.start_ms, key=attrgetter("time_ms"))
        now = Replay(self._items, self._settings.features)
        seen: dict[str, set[int]] = {}
        for group in now.groups(entries[:start]):
            self._note(group, seen)
        behind = [_Behind(entries, self._items, self._settings, delay_ms) for delay_ms in plan.delays_ms]
        batch = _Batches(self._models, self._count, PairsTimeline(entries, self._settings))
        number = 0
        pending: list[Group] = []
        for group in now.groups(entries[start:]):
            if pending and pending[0].time_ms < group.time_ms:
                for earlier in pending:
                    self._note(earlier, seen)
                pending.clear()
            pending.append(group)
            batch.renew(group.time_ms, now)
            targets = self._targets(group, seen)
            if not len(targets):
                continue
            number += 1
            if number % plan.every == 0:
                known = seen.get(group.user_id, set())
                for one in behind:
                    yield self._moment(group, targets, one, now, batch, known)

    def _moment(
        self,
        group: Group,
        targets: npt.NDArray[np.int64],
        behind: "_Behind",
        now: Replay,
        batch: "_Batches",
        seen: set[int],
    ) -> Moment:
        now_ms = group.time_ms
        fresh, pairs = behind.at(now_ms)
        catalog, state = fresh.catalog, fresh.state(group.user_id)
        known = (now.known_items(now_ms) & now.catalog.servable(now_ms))[: self._count]
        moment = self._models.moment(catalog, known, now_ms)._replace(pairs=pairs)
        excluded = np.fromiter(seen, np.int32, len(seen))
        allowed = known.copy()
        allowed[excluded] = False
        (pool,) = self._models.pools([state], catalog, moment, [excluded])
        scores = batch.of(group.user_id)
        from_batch = np.array([row for row in scores if allowed[row]], np.int32)
        rows = np.unique(np.concatenate((pool.rows.astype(np.int32), from_batch)))
        place = {row: at for at, row in enumerate(pool.rows.tolist())}
        # -1, what the pool does not have, is the appended zero.
        at = np.array([place.get(row, -1) for row in rows.tolist()], np.intp)
        retrieval = np.append(pool.scores, 0.0).astype(np.float32)[at]
        bits = np.append(pool.source_bits, 0).astype(np.int32)[at] | SOURCE_BIT["batch"] * np.isin(rows, from_batch)
        asked = pool._replace(rows=rows, scores=retrieval, source_bits=as_trained(bits))
        (ranked,) = self._models.rank([state], catalog, [asked], now_ms)
        features = self._settings.features
        parts: dict[str, npt.NDArray[np.floating]] = {
            "ranker": ranked,
            "batch": np.array([scores.get(row, 0.0) for row in rows.tolist()], np.float32),
            "retrieval": _fused((*pool.lists, from_batch), len(known))[rows],
            "affinity": affinity(state, catalog, rows, now_ms, features),
            "trending": trending_lift(catalog, rows, now_ms, features),
            "recency": recency(catalog, rows, now_ms),
        }
        return Moment(
            group.user_id,
            now_ms,
            bool(scores),
            bool(scores or state.history),
            rows,
            parts,
            _most(batch.popularity, allowed),
            _most(catalog.popularity(now_ms)[: self._count], allowed),
            np.isin(rows, from_batch),
            targets,
            behind.delay_ms,
        )

    def _targets(self, group: Group, seen: dict[str, set[int]]) -> npt.NDArray[np.int64]:
        chosen = dict.fromkeys(event.item_id for event in group.events if event.kind in self._positive)
        rows = (self._row_of.get(item_id, -1) for item_id in chosen)
        known = seen.get(group.user_id, set())
        return np.array([row for row in rows if row >= 0 and row not in known], np.int64)

    def _note(self, group: Group, seen: dict[str, set[int]]) -> None:
        rows = (self._row_of.get(event.item_id, -1) for event in group.events if event.kind in self._positive)
        seen.setdefault(group.user_id, set()).update(row for row in rows if row >= 0)


def _most(values: Floats, allowed: npt.NDArray[np.bool_]) -> Rows:
    """The rows that may be shown with the largest values, best first."""
    order = np.argsort(-np.where(allowed, values, -np.inf), kind="stable")[:_POPULAR].astype(np.int32)
    return order[allowed[order]]


def _fused(lists: Sequence[Rows], count: int) -> Floats:
    """Agreement of the sources, as the front door works it out. Shape [count]."""
    fused = np.zeros(count, np.float32)
    for rows in lists:
        fused[rows] += 1.0 / (FUSION + np.arange(len(rows)))
    return fused


class _Behind:
    """States, statistics and pairs that are a fixed time behind."""

    def __init__(self, entries: Sequence[Entry], items: Sequence[Item], settings: Settings, delay_ms: int) -> None:
        self._replay = Replay(items, settings.features)
        self._pairs = PairsTimeline(entries, settings)
        self._entries, self._next = entries, 0
        self.delay_ms = delay_ms

    def at(self, now_ms: int) -> tuple[Replay, CoVisitation]:
        """As of `delay_ms` before."""
        until = now_ms - self.delay_ms
        end = bisect_left(self._entries, until, self._next, key=attrgetter("time_ms"))
        self._replay.advance(self._entries[self._next : end])
        self._next = end
        return self._replay, self._pairs.before(until)


class _Batches:
    """Batch scores, made again at each midnight that the log passes, for the users with events since."""

    def __init__(self, models: Models, count: int, pairs: PairsTimeline) -> None:
        self._models = models
        self._pairs = pairs
        self._day = -1
        self._count = count
        self._revisions: dict[str, int] = {}
        self._scores: dict[str, dict[int, float]] = {}
        self.popularity: Floats = np.zeros(count, np.float32)

    def of(self, user_id: str) -> dict[int, float]:
        """Row -> score; nothing of a user whom the last run did not know."""
        return self._scores.get(user_id, {})

    def renew(self, now_ms: int, replay: Replay) -> None:
        """Runs the batch where a midnight has passed since the last one."""
        day = now_ms // DAY_MS
        if day == self._day:
            return
        self._day = day
        catalog = replay.catalog
        self.popularity = catalog.popularity(now_ms)[: self._count]
        # Whoever did nothing since has the scores of the last run.
        changed: dict[str, UserState] = {
            user_id: state
            for user_id, state in replay.states.items()
            if state.revision != self._revisions.get(user_id, 0)
        }
        models = replace(self._models, pairs=self._pairs.before(now_ms))
        for rows in score_users(models, catalog, changed, now_ms):
            for row in rows:
                places = catalog.rows(row.item_ids).tolist()
                self._scores[row.user_id] = dict(zip(places, row.scores, strict=True))
        self._revisions.update({user_id: state.revision for user_id, state in changed.items()})
