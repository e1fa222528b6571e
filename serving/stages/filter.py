"""Filter: what may not be shown is taken out: unavailable, seen, excluded, unwanted. Back-fill where little is left.

Third stage; the ladder's lists pass through it too. Invariant: nothing leaves this stage that the request excludes or
that may not be recommended at the request's time.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from features.catalog import Rows
from headrace.v1.events_pb2 import Item
from headrace.v1.types_pb2 import ItemFilter
from serving.popular import PopularList
from serving.query import SOURCE_BIT, Candidates, Query, Staged, UserFeatures, places_of
from serving.trace import Removed

Mask = npt.NDArray[np.bool_]
# Popular items are looked at in steps of this size until enough pass.
_STEP = 512
# Below so many candidates the ranker has little to choose from: popular items fill up to here.
_ENOUGH = 100


class CandidateFilter(Protocol):
    """Takes out what may not be shown."""

    def filter(self, query: Query, user: UserFeatures, candidates: Candidates) -> Staged: ...


class EligibilityFilter:
    """The rules of the catalogue, of the user's history and of the request."""

    def filter(self, query: Query, user: UserFeatures, candidates: Candidates) -> Staged:
        """Takes out what may not be shown, and fills up from the popular items where few candidates are left."""
        rules = self.eligibility(query, user)
        kept_mask, removed = rules.check(candidates.rows)
        kept = candidates if kept_mask.all() else candidates.take(kept_mask)
        wanted = max(_ENOUGH, query.num_items)
        # A later page has its candidates; with others among them the list would not end.
        if len(kept) < wanted and query.page.snapshot is None:
            more = eligible_of(query.release.popular.everybody(), rules, wanted, skip=kept.rows)
            kept = kept.with_more(Candidates.of_rows(more.rows, SOURCE_BIT["trending"]))
        return Staged(kept, removed)

    def eligibility(self, query: Query, user: UserFeatures, *, with_seen: bool = False) -> "Eligibility":
        """The rules of one request. `with_seen`: seen items may come back (better than nothing at all)."""
        return Eligibility(query, user, frozenset() if with_seen else query.on.exclude_seen_kinds)


class Eligibility:
    """Decides which catalogue rows may be shown to one user in one request."""

    def __init__(self, query: Query, user: UserFeatures, seen_kinds: frozenset[str]) -> None:
        self._catalog = catalog = query.release.catalog
        self._now_ms = query.now_ms
        seen = (entry.item_id for entry in user.state.history if entry.kind in seen_kinds)
        self._seen = catalog.rows(seen)
        self._excluded = catalog.rows(query.request.filter.exclude_item_ids)
        self._shown = catalog.rows(query.page.shown_item_ids)
        never = {p.category for p in user.profile.preferences if p.weight <= -1} if user.profile else set()
        self._checks = _item_checks(query.request.filter, never)

    def check(self, rows: Rows) -> tuple[Mask, tuple[Removed, ...]]:
        """Which rows may be shown, and those that may not by the first reason that speaks against them."""
        kept = np.ones(len(rows), np.bool_)
        removed: list[Removed] = []

        def drop(reason: str, bad: Mask) -> None:
            bad = bad & kept
            if bad.any():
                kept[bad] = False
                removed.append(Removed(reason, rows[bad]))

        column = self._catalog.column
        drop("not available", ~column("available")[rows])
        drop("not published yet", column("publish_ms")[rows] > self._now_ms)
        drop("expired", column("expire_ms")[rows] <= self._now_ms)
        if len(self._excluded):
            drop("excluded by the request", places_of(rows, self._excluded) >= 0)
        if len(self._shown):
            drop("shown on a page before", places_of(rows, self._shown) >= 0)
        if len(self._seen):
            drop("seen by the user", places_of(rows, self._seen) >= 0)
        for reason, passes in self._checks:
            items = self._catalog.items
            bad = np.fromiter((ok and not passes(items[row]) for ok, row in zip(kept, rows, strict=True)), np.bool_)
            drop(reason, bad)
        return kept, tuple(removed)


def eligible_of(popular: PopularList, rules: Eligibility, count: int, skip: Rows) -> PopularList:
    """The first entries of a list that may be shown, at most `count - len(skip)`, none of `skip`."""
    found: list[int] = []
    missing = count - len(skip)
    for start in range(0, len(popular.rows), _STEP):
        if len(found) >= missing:
            break
        rows = popular.rows[start : start + _STEP]
        passing = rules.check(rows)[0] & (places_of(rows, skip) < 0)
        found.extend((start + np.flatnonzero(passing)).tolist())
    index = np.array(found[: max(missing, 0)], np.intp)
    return PopularList(popular.rows[index], popular.scores[index])


def _item_checks(item_filter: ItemFilter, never: set[str]) -> list[tuple[str, Callable[[Item], bool]]]:
    """Checks that need the whole item; a request without such a filter has none."""
    checks: list[tuple[str, Callable[[Item], bool]]] = []
    if item_filter.categories_any:
        wanted = set(item_filter.categories_any)
        checks.append(("in none of the asked categories", lambda item: not wanted.isdisjoint(item.categories)))
    if item_filter.categories_none:
        unwanted = set(item_filter.categories_none)
        checks.append(("in an excluded category", lambda item: unwanted.isdisjoint(item.categories)))
    if never:
        checks.append(("in a category that the user never wants", lambda item: never.isdisjoint(item.categories)))
    for bounds in item_filter.ranges:
        low = bounds.min if bounds.HasField("min") else -np.inf
        high = bounds.max if bounds.HasField("max") else np.inf
        checks.append((f"{bounds.name} out of range", _in_range(bounds.name, low, high)))
    labels = ((match.name, frozenset(match.values)) for match in item_filter.labels)
    checks.extend((f"{name} does not match", _has_label(name, values)) for name, values in labels)
    return checks


def _in_range(name: str, low: float, high: float) -> Callable[[Item], bool]:
    def passes(item: Item) -> bool:
        number = _number(item, name)
        return number is not None and low <= number <= high

    return passes


def _number(item: Item, name: str) -> float | None:
    if name == "price":
        return item.price if item.HasField("price") else None
    if name == "year":
        return float(item.year) if item.HasField("year") else None
    return item.numbers.get(name)


def _has_label(name: str, values: frozenset[str]) -> Callable[[Item], bool]:
    return lambda item: name in item.labels and item.labels[name] in values
