"""Popular items from memory, and what the ladder remembers."""

import numpy as np
import pytest

from core.bundle import Manifest
from core.clock import ManualClock
from core.errors import ArtifactError
from core.settings import load_settings
from features import item_stats
from features.catalog import Catalog
from features.windows import UserEvent
from headrace.v1.events_pb2 import Item
from headrace.v1.recommender_service_pb2 import RecommendRequest
from serving.ladder import LastGood
from serving.popular import PopularLists
from serving.query import FIRST_PAGE, Candidates, Ranking
from serving.release import Release
from serving.rerank.rules import Rules

FEATURES = load_settings().features
YEARS_AGO_MS = 900_000_000_000


@pytest.fixture
def catalog():
    catalog = Catalog(FEATURES)
    for n in range(10):
        catalog.upsert(Item(item_id=f"i{n}"))
    return catalog


def like(catalog, item_id, times, time_ms=YEARS_AGO_MS, segment="") -> None:
    partial = item_stats.ItemPartial()
    for n in range(times):
        item_stats.apply(partial, UserEvent("u", n, item_id, "click", time_ms, segment=segment), FEATURES)
    catalog.put_stats(item_stats.as_message(item_id, 0, partial, FEATURES))


def order(lists) -> list[int]:
    return lists.everybody().rows.tolist()


def test_what_is_liked_comes_first_then_the_snapshot_then_all_others_newest_first(catalog) -> None:
    like(catalog, "i3", 2)
    like(catalog, "i7", 5)
    lists = PopularLists(catalog, {"all": [["i1", 9.0], ["i3", 4.0], ["gone", 2.0], ["i0", 1.0]], "segments": {}})
    assert order(lists) == [7, 3, 1, 0, 9, 8, 6, 5, 4, 2]
    scores = lists.everybody().scores
    assert scores[0] == 1
    assert (np.diff(scores) <= 0).all()


def test_the_order_holds_where_all_popularity_has_decayed_below_any_number(catalog) -> None:
    like(catalog, "i3", 2, YEARS_AGO_MS)
    like(catalog, "i7", 1, YEARS_AGO_MS)
    assert catalog.popularity(4_000_000_000_000).sum() == 0
    assert order(PopularLists(catalog, {"all": [], "segments": {}}))[:2] == [3, 7]


def test_a_refresh_takes_in_what_the_catalogue_has_learned(catalog) -> None:
    lists = PopularLists(catalog, {"all": [["i1", 1.0]], "segments": {"s": [["i2", 2.0], ["i4", 1.0]]}})
    assert order(lists)[0] == 1
    like(catalog, "i5", 1)
    catalog.upsert(Item(item_id="i10"))
    lists.refresh()
    assert order(lists)[:3] == [5, 1, 10]
    segment = lists.segment("s")
    assert segment is not None
    assert (segment.rows.tolist(), segment.scores.tolist()) == ([2, 4], [1.0, 0.5])
    assert lists.segment("none") is None


def test_a_segments_list_is_what_its_users_did_lately_then_the_bundles(catalog) -> None:
    lists = PopularLists(catalog, {"all": [["i1", 1.0]], "segments": {"s": [["i2", 2.0], ["i4", 1.0]]}})
    like(catalog, "i4", 2, segment="s")
    like(catalog, "i6", 1, segment="s")
    like(catalog, "i9", 5, segment="t")
    lists.refresh()
    segment, new = lists.segment("s"), lists.segment("t")
    assert segment is not None
    assert new is not None
    assert (segment.rows.tolist(), segment.scores.tolist()) == ([4, 6, 2], [1.0, 0.5, 0.0])
    assert new.rows.tolist() == [9]


@pytest.mark.parametrize("raw", [{}, [], {"all": [["i1"]], "segments": {}}, {"all": [], "segments": []}, {"all": 3}])
def test_a_broken_snapshot_is_refused(catalog, raw) -> None:
    with pytest.raises(ArtifactError, match="train again"):
        PopularLists(catalog, raw)


def test_last_good_answers_are_bounded_and_age(catalog) -> None:
    class Of:
        """What `remember` reads of a query."""

        def __init__(self, user_id) -> None:
            self.user_id, self.request, self.page = user_id, RecommendRequest(), FIRST_PAGE
            lists = PopularLists(catalog, {"all": [], "segments": {}})
            self.release = Release(Manifest("v", "", "", "", "", 0, 0, 0, 0), catalog, lists, {}, Rules())

    clock = ManualClock(1)
    last_good = LastGood(2, 60, clock)
    ranking = Ranking(Candidates.of_rows(np.array([4, 2], np.int32)), np.array([0.9, 0.1]), 1, np.ones(2))
    for user_id in ("a", "b", "a", "c"):
        last_good.remember(Of(user_id), ranking)
    assert last_good.recall("b") is None
    remembered = last_good.recall("a")
    assert remembered is not None
    assert remembered.item_ids == ("i4", "i2")
    narrow = Of("d")
    narrow.request.filter.categories_any.append("x")
    last_good.remember(narrow, ranking)
    assert last_good.recall("d") is None
    clock.advance(60_001)
    assert last_good.recall("a") is None
