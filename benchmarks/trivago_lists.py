"""The lists of the Trivago sample with the signals as of a delay, as model inputs: for benchmarks/rank_quality.py.

One list a clickout: the hotels shown, their prices, the one clicked. Invariant: an input with a delay of d knows no
event of the last d before the click (with an infinite delay none of its session), neither of the user nor of others.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from core.settings import Settings
from features import windows
from features.catalog import Catalog, Floats, Rows
from features.stores.event_log import EventLog, user_events
from features.stores.event_rows import IMPRESSIONS
from features.vectors import RankerInput, ranker_input
from features.windows import UserEvent, UserState
from offline.logs import read_items
from offline.replay import Replay, read_entries

DELAYS_SECONDS = (0.0, 10.0, 60.0, 300.0, 1800.0, float("inf"))
TRAIN_SHARE = 0.7
# The bit of the source that brought the list: what was shown came from one place.
_SHOWN_BIT = 1


class ClickedList(NamedTuple):
    """One list that was clicked."""

    user_id: str
    session_id: str
    time_ms: int
    session_start_ms: int
    # How many of the user's events came before the click.
    events_before: int
    item_ids: tuple[str, ...]
    prices: Floats
    clicked: int
    is_last: bool


class Signals(NamedTuple):
    """What was known of a list at a delay."""

    features: RankerInput
    # Items of the session that were touched, latest first.
    touched: tuple[str, ...]


class Lists:
    """All lists of a log, split by the time of their sessions."""

    def __init__(self, log: EventLog, settings: Settings) -> None:
        self._log, self._settings = log, settings
        self.items = read_items(log)
        self._events: dict[str, list[UserEvent]] = defaultdict(list)
        self.train: list[ClickedList] = []
        self.test: list[ClickedList] = []
        self._read()

    def catalog(self) -> Catalog:
        return Catalog.of_items(self.items, self._settings.features)

    def signals(self, lists: Sequence[ClickedList], delay_seconds: float) -> list[Signals]:
        """The inputs of some lists, in their order, with everything as of the delay."""
        features = self._settings.features
        cutoffs = [_cutoff_ms(one, delay_seconds) for one in lists]
        entries = read_entries(self._log)
        replay, waiting = Replay(self.items, features), next(entries, None)
        made: list[Signals | None] = [None] * len(lists)
        for index in np.argsort(cutoffs, kind="stable").tolist():
            one, cutoff_ms = lists[index], cutoffs[index]
            while waiting is not None and waiting.time_ms < cutoff_ms:
                replay.advance([waiting])
                waiting = next(entries, None)
            known = self._before(one, cutoff_ms)
            state = UserState()
            windows.apply(state, known, features)
            made[index] = Signals(self._input(one, state, replay.catalog), self._touched(one, known))
        return [signals for signals in made if signals is not None]

    def _before(self, one: ClickedList, cutoff_ms: int) -> list[UserEvent]:
        return [event for event in self._events[one.user_id][: one.events_before] if event.time_ms <= cutoff_ms]

    def _touched(self, one: ClickedList, known: Sequence[UserEvent]) -> tuple[str, ...]:
        session = [event.item_id for event in known if event.time_ms >= one.session_start_ms]
        return tuple(dict.fromkeys(reversed(session)))

    def _input(self, one: ClickedList, state: UserState, catalog: Catalog) -> RankerInput:
        count = len(one.item_ids)
        # The list as shown is what retrieval brought: the higher, the better.
        scores = (1 / np.log2(np.arange(count) + 2)).astype(np.float32)
        bits: Rows = np.full(count, _SHOWN_BIT, np.int32)
        rows = catalog.rows(one.item_ids)
        # The price of this very list; the catalogue has the median over all time.
        prices = np.log1p(one.prices)
        features = self._settings.features
        return ranker_input(state, catalog, rows, scores, bits, one.time_ms, features, log_prices=prices)

    def _read(self) -> None:
        events = self._log.events()
        sessions = events["session_id"].to_pylist()
        ids = events["event_id"].to_pylist()
        in_order = list(zip(user_events(events), sessions, ids, strict=True))
        # Of equal times the ids have the order of the steps.
        in_order.sort(key=lambda one: (one[0].time_ms, one[2]))
        bounds: dict[str, tuple[int, int]] = {}
        clicks: dict[str, tuple[UserEvent, int, str]] = {}
        for event, session, event_id in in_order:
            first, _ = bounds.get(session, (event.time_ms, 0))
            bounds[session] = (first, event.time_ms)
            mine = self._events[event.user_id]
            if event.kind == "click":
                clicks[event_id] = (event, len(mine), session)
            mine.append(event)
        made = self._lists(clicks, bounds)
        ends = sorted(end for _, end in bounds.values())
        split_ms = ends[int(TRAIN_SHARE * len(ends)) - 1]
        self.train = [one for one in made if bounds[one.session_id][1] <= split_ms]
        self.test = [one for one in made if one.is_last and one.session_start_ms > split_ms]

    def _lists(
        self, clicks: dict[str, tuple[UserEvent, int, str]], bounds: dict[str, tuple[int, int]]
    ) -> list[ClickedList]:
        rows = self._log.rows(IMPRESSIONS)
        made: list[ClickedList] = []
        last: dict[str, tuple[int, str]] = {}
        for event_id, (event, _, session) in clicks.items():
            last[session] = max(last.get(session, (0, "")), (event.time_ms, event_id))
        columns = (rows[name].to_pylist() for name in ("recommendation_id", "impressions", "tags"))
        for event_id, shown, tags in zip(*columns, strict=True):
            event, before, session = clicks[event_id]
            item_ids = tuple(one["item_id"] for one in shown)
            if event.item_id not in item_ids:
                continue
            prices = np.array(dict(tags)["prices"].split("|"), np.float32)
            made.append(
                ClickedList(
                    event.user_id,
                    session,
                    event.time_ms,
                    bounds[session][0],
                    before,
                    item_ids,
                    prices,
                    item_ids.index(event.item_id),
                    last[session][1] == event_id,
                )
            )
        return sorted(made, key=lambda one: (one.time_ms, one.user_id))


def rule_scores(one: ClickedList, touched: Sequence[str]) -> Floats:
    """Items that the session touched, latest first, then the order shown. [C], higher is better."""
    scores = -np.arange(len(one.item_ids), dtype=np.float32)
    for place, item_id in enumerate(touched):
        if item_id in one.item_ids:
            scores[one.item_ids.index(item_id)] = 1000.0 - place
    return scores


def hand_made_features(one: ClickedList, signals: Signals) -> Floats:
    """What a LambdaRank reads, [C, 21 + the session's]: position, price, session counts and recency, distances."""
    count = len(one.item_ids)
    place_of = {item_id: place for place, item_id in enumerate(signals.touched)}
    touched = np.array([place_of.get(item_id, -1) for item_id in one.item_ids], np.float32)
    position = np.arange(count, dtype=np.float32)
    last = next((one.item_ids.index(item_id) for item_id in signals.touched if item_id in one.item_ids), None)
    distance = position - last if last is not None else np.full(count, np.nan, np.float32)
    columns = [
        position,
        one.prices,
        one.prices.argsort(kind="stable").argsort(kind="stable").astype(np.float32),
        one.prices / max(1.0, float(one.prices.mean())),
        np.full(count, count, np.float32),
        touched,
        (touched >= 0).astype(np.float32),
        np.full(count, len(signals.touched), np.float32),
        distance,
        np.abs(distance),
    ]
    return np.concatenate([np.stack(columns, 1), signals.features.candidates], 1).astype(np.float32)


def reciprocal_ranks(lists: Sequence[ClickedList], scores: Sequence[Floats]) -> Floats:
    """1 over the rank of the clicked item in each list, [n]; a tie counts as a loss."""
    ranks = [int((one >= one[listed.clicked]).sum()) for listed, one in zip(lists, scores, strict=True)]
    return (1 / np.array(ranks)).astype(np.float32)


def _cutoff_ms(one: ClickedList, delay_seconds: float) -> int:
    if delay_seconds == float("inf"):
        return one.session_start_ms - 1
    return one.time_ms - round(delay_seconds * 1000)
