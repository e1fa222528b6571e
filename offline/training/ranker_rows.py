"""Training rows of the ranker: each question with its candidates and the features as of its moment.

Candidates are retrieved first (users encoded in batches from their histories), then the log is played for features.
Invariant: features come from the state and the statistics just before the question's time, through
`features.vectors.ranker_input`, the very function that the request uses.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.settings import Settings
from features import windows
from features.catalog import Catalog, Floats, Rows
from features.vectors import RankerInput, WholeList, ranker_input
from features.windows import UserState
from headrace.v1.events_pb2 import Item
from offline.co_visitation import PairsTimeline
from offline.replay import Entry, Replay
from offline.training.ranker_candidates import CandidateSources, Moment, Pool, draw
from offline.training.ranker_questions import Question
from offline.training.ranker_timeline import Timeline

# Answered items of one question that are kept: more would crowd out the other candidates.
_MOST_ANSWERED = 8
# Of a list that nobody was shown so many times more candidates are drawn: it has no refused ones of its own.
_DRAWN = 4
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
    # How many candidates of the list each stands for: 1, or more for one that was drawn from many. [C]
    weights: Floats
    # Items that the user clicked and that no source had brought (only where a whole pool was asked for).
    missed_count: int


class _Chosen(NamedTuple):
    rows: Rows
    scores: Floats
    source_bits: Rows
    user_vector: Floats | None
    answered: Rows
    weights: Floats
    missed_count: int
    # What would have been ranked, where these are a part of it.
    whole: WholeList | None = None


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
        # Names of the rows, without statistics.
        self._names = Catalog.of_items(items, settings.features)

    def make(self, questions: Sequence[Question], whole_pool: Sequence[bool], advance: Advance) -> list[Row | None]:
        """Rows in the order of the questions; None for a question without any candidate.

        Args:
            questions: in event-time order.
            whole_pool: per question: True = all that would be retrieved (as served, to measure the order), False =
                the answered items and some drawn negatives (to train).
            advance: called with the number of questions done (each counts twice).
        """
        chosen = self._choose_all(questions, whole_pool, advance)
        rows: list[Row | None] = [None] * len(questions)
        for index, replay in self._at(questions):
            if len(chosen[index].rows):
                rows[index] = self._row(questions[index], chosen[index], replay)
            advance(1)
        return rows

    def _choose_all(self, questions: Sequence[Question], whole_pool: Sequence[bool], advance: Advance) -> list[_Chosen]:
        """Retrieves and draws for all questions; what could be recommended is looked up once a batch."""
        rng = np.random.default_rng(self._settings.offline.seed)
        timeline = Timeline(self._entries, self._names, self._settings.features)
        pairs = PairsTimeline(self._entries, self._settings)
        chosen: list[_Chosen] = []
        for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
            batch = questions[start : start + _QUESTIONS_AT_ONCE]
            states = [UserState(history=timeline.history_before(q.user_id, q.time_ms)) for q in batch]
            first_ms, count = batch[0].time_ms, self._sources.item_count
            publish_ms = self._names.column("publish_ms")[:count]
            known, popularity = timeline.known(first_ms)[:count], timeline.popularity(first_ms)[:count]
            moment = Moment(known, popularity, publish_ms, pairs.before(first_ms), first_ms)
            for state, pool in zip(states, self._sources.pools(states, self._names, moment), strict=True):
                at = len(chosen)
                seen = self._rows_of(windows.recent_items(state, self._excluding), count)
                choose = self._whole if whole_pool[at] else self._drawn
                chosen.append(choose(questions[at], pool, moment, seen, rng))
            advance(len(batch))
        return chosen

    def _at(self, questions: Sequence[Question]) -> Iterator[tuple[int, Replay]]:
        """Plays the log and stops just before the time of each question."""
        replay = Replay(self._items, self._settings.features)
        index = 0
        for time_ms, entries in groupby(self._entries, key=attrgetter("time_ms")):
            while index < len(questions) and questions[index].time_ms <= time_ms:
                yield index, replay
                index += 1
            if index == len(questions):
                return
            replay.advance(entries)

    def _rows_of(self, item_ids: Iterable[str], count: int) -> Rows:
        rows = self._names.rows(item_ids)
        return rows[(rows >= 0) & (rows < count)]

    def _answered(self, question: Question, moment: Moment) -> Rows:
        rows = self._rows_of(question.click, len(moment.known))
        # A list that was shown is a fact; other items must have been there to be recommended.
        return rows if question.shown else rows[moment.known[rows]]

    def _whole(self, question: Question, pool: Pool, moment: Moment, seen: Rows, _: np.random.Generator) -> _Chosen:
        """All that would be retrieved."""
        answered = self._answered(question, moment)
        fresh = ~np.isin(pool.rows, seen)
        rows = pool.rows[fresh]
        clicked = self._rows_of((item for item, label in question.click.items() if label > 0), len(moment.known))
        wanted = np.intersect1d(clicked, answered)
        missed = int((~np.isin(wanted, rows)).sum())
        bits, weights = pool.source_bits[fresh], np.ones(len(rows), np.float32)
        return _Chosen(rows, pool.scores[fresh], bits, pool.user_vector, answered, weights, missed)

    def _drawn(self, question: Question, pool: Pool, moment: Moment, seen: Rows, rng: np.random.Generator) -> _Chosen:
        """The answered items and some negatives; of events that no list led to, only items that were retrieved."""
        answered = self._answered(question, moment)
        avoid = np.concatenate([seen, self._rows_of(question.click, len(moment.known))])
        count = self._settings.offline.ranker_negatives
        if not question.shown:
            count *= _DRAWN
            answered = answered[np.isin(answered, pool.rows)]
            answered = rng.permutation(answered)[:_MOST_ANSWERED]
        others, weights = draw(pool, self._sources.by_vector(pool), avoid, count, rng)
        rows = np.concatenate([answered, others]) if len(answered) else answered
        scores, bits = self._sources.provenance(pool, rows)
        weights = np.concatenate([np.ones(len(answered), np.float32), weights])[: len(rows)]
        fresh = ~np.isin(pool.rows, seen)
        whole = WholeList(pool.rows[fresh], pool.scores[fresh])
        return _Chosen(rows, scores, bits, pool.user_vector, answered, weights, 0, whole)

    def _row(self, question: Question, chosen: _Chosen, replay: Replay) -> Row:
        now_ms, features = question.time_ms, self._settings.features
        state, catalog = replay.state(question.user_id), replay.catalog
        made = ranker_input(
            state, catalog, chosen.rows, chosen.scores, chosen.source_bits, now_ms, features, chosen.whole
        )
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
        return Row(question.shown, made, chosen.user_vector, labels, positions, chosen.weights, chosen.missed_count)
