"""Training rows of the ranker: each question with its candidates and the features as of its moment.

The log is played twice: once to retrieve for each question (encoding users in batches), once to take the features.
Invariant: features come from the state and the statistics just before the question's time, through
`features.vectors.ranker_input`, the very function that the request uses.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.settings import Settings
from features import windows
from features.catalog import Catalog, Floats, Rows
from features.vectors import RankerInput, ranker_input
from features.windows import UserState
from headrace.v1.events_pb2 import Item
from offline.replay import Entry, Replay
from offline.training.ranker_candidates import CandidateSources, Moment, Pool, draw
from offline.training.ranker_questions import Question

# Answered items of one question that are kept: more would crowd out the other candidates.
_MOST_ANSWERED = 8
_QUESTIONS_AT_ONCE = 128

Labels = npt.NDArray[np.float32]
Advance = Callable[[int], None]


class Row(NamedTuple):
    """One question ready for the model, with C candidates."""

    shown: bool
    features: RankerInput
    user_vector: Floats | None
    # click, conversion, value; NaN = not known. [C, 3]
    labels: Labels
    # Where each candidate was shown, 0 = first, -1 = it was not. [C]
    positions: Rows
    # Items that the user clicked and that no source had brought (only where a whole pool was asked for).
    missed_count: int


class _Chosen(NamedTuple):
    rows: Rows
    scores: Floats
    source_bits: Rows
    user_vector: Floats | None
    answered: Rows
    missed_count: int


class RowMaker:
    """Turns questions into rows by playing the log.

    Args:
        entries: the log in event-time order, up to the newest question.
        items: the catalogue, in the order of the item vectors.
        sources: what retrieves.
        settings: of features, candidates and training.
    """

    def __init__(
        self, entries: Sequence[Entry], items: Sequence[Item], sources: CandidateSources, settings: Settings
    ) -> None:
        self._entries, self._items, self._sources, self._settings = entries, items, sources, settings
        self._excluding = frozenset(settings.serving.exclude_seen_kinds)

    def make(self, questions: Sequence[Question], whole_pool: Sequence[bool], advance: Advance) -> list[Row | None]:
        """Rows in the order of the questions; None for a question without any candidate.

        Args:
            questions: in event-time order.
            whole_pool: per question: True = all that would be retrieved (as served, to measure the order), False =
                the answered items and some drawn negatives (to train).
            advance: called with the number of questions done (each counts twice).
        """
        rng = np.random.default_rng(self._settings.offline.seed)
        chosen: list[_Chosen] = []
        batch: list[tuple[int, UserState, Moment, Rows]] = []
        for index, state, catalog in self._at(questions):
            now_ms = questions[index].time_ms
            # The state goes on changing; of it the encoder reads the history.
            snapshot = UserState(history=list(state.history))
            seen = catalog.rows(windows.recent_items(state, self._excluding))
            batch.append((index, snapshot, self._moment(catalog, now_ms), seen))
            if len(batch) == _QUESTIONS_AT_ONCE or index == len(questions) - 1:
                pools = self._sources.pools([part[1] for part in batch], catalog, [part[2] for part in batch])
                for (at, _, moment, seen_rows), pool in zip(batch, pools, strict=True):
                    part = self._choose(questions[at], pool, moment, seen_rows, catalog, whole_pool[at], rng)
                    chosen.append(part)
                advance(len(batch))
                batch = []
        rows: list[Row | None] = [None] * len(questions)
        for index, state, catalog in self._at(questions):
            if len(chosen[index].rows):
                rows[index] = self._row(questions[index], chosen[index], state, catalog)
            advance(1)
        return rows

    def _at(self, questions: Sequence[Question]) -> Iterator[tuple[int, UserState, Catalog]]:
        """Plays the log and stops just before the time of each question."""
        replay = Replay(self._items, self._settings.features)
        index = 0
        for time_ms, entries in groupby(self._entries, key=attrgetter("time_ms")):
            while index < len(questions) and questions[index].time_ms <= time_ms:
                yield index, replay.state(questions[index].user_id), replay.catalog
                index += 1
            if index == len(questions):
                return
            replay.advance(entries)

    def _moment(self, catalog: Catalog, now_ms: int) -> Moment:
        """What could be recommended: published by then, or (where that is not said) seen in an event by then."""
        count = self._sources.item_count
        publish_ms = catalog.column("publish_ms")[:count]
        known = catalog.servable(now_ms)[:count] & ((publish_ms > 0) | (catalog.column("stats_revision")[:count] > 0))
        return Moment(known, catalog.popularity(now_ms, 0)[:count], publish_ms)

    def _choose(
        self,
        question: Question,
        pool: Pool,
        moment: Moment,
        seen: Rows,
        catalog: Catalog,
        whole: bool,
        rng: np.random.Generator,
    ) -> _Chosen:
        answered = catalog.rows(question.click)
        usable = (answered >= 0) & (answered < len(moment.known))
        if not question.shown:
            # A list that was shown is a fact; other items must have been there to be recommended.
            usable &= np.append(moment.known, np.False_)[np.where(usable, answered, -1)]
        answered = answered[usable]
        if whole:
            fresh = ~np.isin(pool.rows, seen)
            rows = pool.rows[fresh]
            clicked = catalog.rows(item_id for item_id, label in question.click.items() if label > 0)
            missed = int((~np.isin(clicked[np.isin(clicked, answered)], rows)).sum())
            return _Chosen(rows, pool.scores[fresh], pool.source_bits[fresh], pool.user_vector, answered, missed)
        if not question.shown and len(answered) > _MOST_ANSWERED:
            answered = rng.choice(answered, _MOST_ANSWERED, replace=False)
        count = self._settings.offline.ranker_negatives
        if question.shown:
            # The list has its own negatives; a few more stand for the rest of what is retrieved.
            count = max(2, count // 4)
        avoid = np.concatenate([seen, catalog.rows(question.click)])
        negatives = draw(pool, moment, avoid, count, rng) if len(answered) else np.zeros(0, np.int32)
        rows = np.concatenate([answered, negatives]).astype(np.int32)
        scores, bits = self._sources.provenance(pool, rows)
        return _Chosen(rows, scores, bits, pool.user_vector, answered, 0)

    def _row(self, question: Question, chosen: _Chosen, state: UserState, catalog: Catalog) -> Row:
        now_ms, features = question.time_ms, self._settings.features
        made = ranker_input(state, catalog, chosen.rows, chosen.scores, chosen.source_bits, now_ms, features)
        labels = np.zeros((len(chosen.rows), 3), np.float32)
        labels[:, 2] = np.nan
        positions = np.full(len(chosen.rows), -1, np.int32)
        shown_at = {item_id: position for position, item_id in enumerate(question.click)} if question.shown else {}
        answered = set(chosen.answered.tolist())
        for index, row in enumerate(chosen.rows.tolist()):
            if row in answered:
                item_id = catalog.item_ids[row]
                labels[index] = (
                    question.click.get(item_id, 0.0),
                    question.conversion.get(item_id, 0.0),
                    question.value.get(item_id, np.nan),
                )
                positions[index] = shown_at.get(item_id, -1)
        return Row(question.shown, made, chosen.user_vector, labels, positions, chosen.missed_count)
