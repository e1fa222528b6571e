"""The ladder below the pipeline: what is shown when nothing personal can be made.

Rungs in the order of `serving.ladder`: the user's last good answer, the rules file's lists, popular in the segment,
popular overall. Invariant: the last rung needs nothing but this process's memory, and every list passes the same
filter as everything else.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from core.clock import Clock
from core.settings import ServingSettings
from headrace.v1 import types_pb2 as types
from serving.popular import PopularList
from serving.query import SOURCE_BIT, Candidates, Query, Ranking, Tier, UserFeatures
from serving.stages.filter import Eligibility, EligibilityFilter, eligible_of

# So much of an answer's order is kept: what is no longer available or wanted later on must leave enough.
_KEPT_DEPTH = 100


class Remembered(NamedTuple):
    """The order of a good answer, by item_id: rows belong to one release, answers outlive it."""

    item_ids: tuple[str, ...]
    scores: tuple[float, ...]
    at: float


class LastGood:
    """The last good answer of the users who asked last."""

    def __init__(self, users: int, max_age_seconds: float, clock: Clock) -> None:
        self._users = users
        self._max_age_seconds = max_age_seconds
        self._clock = clock
        self._answers: OrderedDict[str, Remembered] = OrderedDict()
        self._erased: OrderedDict[str, None] = OrderedDict()

    def remember(self, query: Query, ranking: Ranking) -> None:
        """Keeps a ranking, unless the request's own filter or page made it too narrow for others."""
        if query.request.filter.ByteSize() or query.page.offset or query.user_id in self._erased:
            return
        self._answers[query.user_id] = Remembered(
            tuple(query.release.ids(ranking.candidates.rows[:_KEPT_DEPTH])),
            tuple(ranking.scores[:_KEPT_DEPTH].tolist()),
            self._clock.monotonic(),
        )
        self._answers.move_to_end(query.user_id)
        if len(self._answers) > self._users:
            self._answers.popitem(last=False)

    def forget(self, user_ids: Iterable[str]) -> None:
        """These users were erased. Nothing of theirs is kept again: a request may still be using the old row."""
        for user_id in user_ids:
            self._answers.pop(user_id, None)
            self._erased[user_id] = None
            if len(self._erased) > self._users:
                self._erased.popitem(last=False)

    def recall(self, user_id: str) -> Remembered | None:
        found = self._answers.get(user_id)
        if found is None or self._clock.monotonic() - found.at > self._max_age_seconds:
            return None
        return found


class _Rung(NamedTuple):
    tier: Tier
    # The rung's list for a request; None or nothing in it = the next rung.
    find: Callable[[Query, UserFeatures], PopularList | None]
    # Source that its items are said to come from.
    source_bit: int = 0


class Ladder:
    """Answers from the best rung that has something to show."""

    def __init__(self, settings: ServingSettings, filters: EligibilityFilter, last_good: LastGood) -> None:
        self._filters = filters
        self._last_good = last_good
        trending = SOURCE_BIT["trending"]
        rungs = {
            "last_good": _Rung(types.SERVING_TIER_LAST_GOOD, self._from_last_good),
            "rules": _Rung(types.SERVING_TIER_RULES, _from_rules),
            "popular_segment": _Rung(types.SERVING_TIER_POPULAR_SEGMENT, _from_segment, trending),
            "popular": _Rung(types.SERVING_TIER_POPULAR, lambda query, _: query.release.popular.everybody(), trending),
        }
        self._rungs = [rungs[name] for name in settings.ladder if name in rungs]

    def descend(self, query: Query, user: UserFeatures) -> Ranking:
        """The list of the first rung that has anything to show, filled up with popular items.

        Only where the filters leave nothing at all, items that the user has seen come back.
        """
        for with_seen in (False, True):
            rules = self._filters.eligibility(query, user, with_seen=with_seen)
            for rung in self._rungs:
                listed = rung.find(query, user)
                if listed is not None and (ranking := _ranking(query, rung, listed, rules)) is not None:
                    return ranking
        # Nothing in the whole catalogue may be shown.
        nothing = Candidates.of_rows(np.empty(0, np.int32))
        return Ranking(nothing, np.empty(0), types.SERVING_TIER_POPULAR, np.empty(0))

    def _from_last_good(self, query: Query, user: UserFeatures) -> PopularList | None:
        remembered = self._last_good.recall(user.user_id)
        if remembered is None:
            return None
        rows = query.release.catalog.rows(remembered.item_ids)
        scores = np.array(remembered.scores, np.float32)
        return PopularList(rows[rows >= 0], scores[rows >= 0])


def _from_rules(query: Query, user: UserFeatures) -> PopularList | None:
    item_ids = query.release.rules.fixed_list(query.surface, user.segment)
    rows = query.release.catalog.rows(dict.fromkeys(item_ids))
    rows = rows[rows >= 0]
    return PopularList(rows, np.linspace(1, 0, len(rows), endpoint=False, dtype=np.float32))


def _from_segment(query: Query, user: UserFeatures) -> PopularList | None:
    return query.release.popular.segment(user.segment) if user.segment else None


def _ranking(query: Query, rung: _Rung, listed: PopularList, rules: Eligibility) -> Ranking | None:
    nothing = np.empty(0, np.int32)
    found = eligible_of(listed, rules, query.num_items, skip=nothing)
    if not len(found.rows):
        return None
    rows, scores = found.rows, found.scores
    bits = np.full(len(rows), rung.source_bit, np.int32)
    if len(rows) < query.num_items:
        more = eligible_of(query.release.popular.everybody(), rules, query.num_items, skip=rows)
        # Below everything that the rung itself brought.
        rows, scores = np.concatenate((rows, more.rows)), np.concatenate((scores, np.zeros(len(more.rows), np.float32)))
        bits = np.concatenate((bits, np.full(len(more.rows), SOURCE_BIT["trending"], np.int32)))
    candidates = Candidates.of_rows(rows)
    candidates = Candidates(rows, candidates.retrieval, candidates.fused, candidates.batch, bits)
    return Ranking(candidates, scores.astype(np.float64), rung.tier, np.ones(len(rows)))
