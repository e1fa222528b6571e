"""The arithmetic of the re-ranker: what holds for any candidates, and what the parts do."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from core.bundle import Manifest
from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import ArtifactError
from core.settings import load_settings
from features.catalog import Catalog
from headrace.v1.events_pb2 import Item
from headrace.v1.recommender_service_pb2 import RecommendRequest
from serving.budget import Budget
from serving.popular import PopularLists
from serving.query import SOURCE_BIT, Candidates, Query, UserFeatures
from serving.release import Release
from serving.rerank.blend import blend, scaled
from serving.rerank.diversity import category_vectors, diversify
from serving.rerank.exploration import explore
from serving.rerank.rules import Rules, place_pins
from serving.stages.rerank import BlendingReRanker
from serving.trace import Trace

SETTINGS = load_settings()
COUNT = 40
NOW_MS = 1_700_000_000_000

finite = st.floats(-1e6, 1e6, width=32)
any_float = st.floats(width=32)


def vectors_of(elements):
    return arrays.arrays(np.float32, st.integers(1, 60), elements=elements)


@given(vectors_of(any_float))
def test_scaled_parts_lie_between_0_and_1_whatever_comes_in(values) -> None:
    result = scaled(values)
    assert result.shape == values.shape
    assert ((result >= 0) & (result <= 1)).all()


@given(vectors_of(finite))
def test_scaling_keeps_the_order(values) -> None:
    result = scaled(values)
    assert (np.diff(result[np.argsort(values, kind="stable")]) >= 0).all()


def test_a_part_that_says_the_same_of_all_adds_nothing() -> None:
    blended = blend({"ranker": np.array([0.1, 0.9]), "batch": np.array([7.0, 7.0])}, {"ranker": 1.0, "batch": 1.0})
    assert blended.scores.tolist() == [0.0, 0.5]
    assert blended.contributions.tolist() == [[0.0, 0.5], [0.0, 0.0]]


def test_parts_without_a_weight_do_not_count_and_none_at_all_is_no_error() -> None:
    parts = {"ranker": np.array([0.1, 0.9]), "odd": np.array([5.0, 1.0])}
    assert blend(parts, {"ranker": 2.0}).parts == ("ranker",)
    assert blend(parts, {}).scores.tolist() == [0.0, 0.0]


@given(
    arrays.arrays(np.float64, 30, elements=st.floats(0, 1)),
    arrays.arrays(np.int32, (30, 4), elements=st.integers(0, 6)),
    st.floats(0, 1),
    st.integers(1, 40),
)
def test_diversity_gives_a_permutation_whose_values_fall(relevance, categories, diversity, places) -> None:
    order, penalties = diversify(relevance, category_vectors(categories), diversity, places)
    assert sorted(order.tolist()) == list(range(30))
    values = ((1 - diversity) * relevance - penalties)[order]
    assert (np.diff(values) <= 1e-6).all()


def test_without_diversity_the_order_is_that_of_the_relevance() -> None:
    relevance = np.array([0.2, 0.9, 0.2, 0.5])
    assert diversify(relevance, np.ones((4, 1), np.float32), 0.0, 4).order.tolist() == [1, 3, 0, 2]


def test_diversity_brings_another_category_forward() -> None:
    vectors = category_vectors(np.array([[1, 0], [1, 0], [2, 0]], np.int32))
    assert diversify(np.array([1.0, 0.9, 0.8]), vectors, 0.5, 3).order.tolist() == [0, 2, 1]


def test_500_candidates_are_diversified_within_a_millisecond() -> None:
    random = np.random.default_rng(0)
    relevance, categories = random.random(500), random.integers(0, 40, (500, 4)).astype(np.int32)
    best = min(_seconds(lambda: diversify(relevance, category_vectors(categories), 0.1, 20)) for _ in range(20))
    assert best < 0.001


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@given(st.permutations(range(12)), st.dictionaries(st.integers(0, 11), st.integers(0, 30), max_size=5))
def test_pins_are_where_they_were_asked_and_nothing_is_lost(order, wanted) -> None:
    # One pin a position, as Rules.pins gives them.
    pins = sorted({position: index for index, position in wanted.items()}.items())
    placed = place_pins(np.array(order, np.intp), [(index, position) for position, index in pins])
    assert sorted(placed.tolist()) == list(range(12))
    for position, index in pins:
        if position + len(pins) <= 12:
            assert placed[position] == index


@given(st.floats(0, 1, exclude_max=True), st.floats(0.01, 1), st.integers(2, 10))
def test_exploration_changes_one_place_at_most_and_says_how_likely_that_was(draw, rate, shown) -> None:
    order, pool = np.arange(20), np.array([3, 15, 16, 17, 18])
    explored = explore(order, shown, pool, rate, frozenset({shown // 2} if shown > 4 else ()), draw)
    assert sorted(explored.order.tolist()) == list(range(20))
    changed = np.flatnonzero(explored.order[:shown] != order[:shown])
    assert len(changed) == (1 if draw < rate else 0)
    drawn = np.flatnonzero(explored.propensities != 1) if rate < 1 or len(changed) else []
    assert len(drawn) <= 1
    for place in changed:
        outside = [index for index in pool if index >= shown]
        assert explored.order[place] in outside
        assert explored.propensities[place] == pytest.approx(rate / len(outside))


def test_exploration_tries_all_alike() -> None:
    pool = np.array([10, 11, 12, 13])
    draws = np.arange(0, 1, 0.001)
    tried = [explore(np.arange(20), 5, pool, 0.4, frozenset(), float(draw)).order[2] for draw in draws]
    counts = {index: tried.count(index) for index in (2, 10, 11, 12, 13)}
    assert counts[2] == pytest.approx(600, abs=2)
    assert all(counts[index] == pytest.approx(100, abs=2) for index in pool.tolist())


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"pin": [{"item_id": "a", "position": 500}]}, "pin.0.position"),
        ({"boost": [{"item_id": "a", "category": "b"}]}, "boost.0"),
        ({"boost": [{"item_id": "a", "amount": float("nan")}]}, "boost.0.amount"),
        ({"lists": [{"item_ids": []}]}, "lists.0.item_ids"),
        ({"pins": []}, "pins"),
        ([], "the file"),
    ],
)
def test_a_mistake_in_the_rules_is_named(raw, said) -> None:
    with pytest.raises(ArtifactError, match=said):
        Rules.parse(raw)


def test_rules_hold_where_they_say() -> None:
    rules = Rules.parse(
        {
            "pin": [
                {"item_id": "a", "position": 3, "surface": "home"},
                {"item_id": "b", "position": 0},
                {"item_id": "c", "position": 0},
                {"item_id": "b", "position": 1},
            ],
            "lists": [{"item_ids": ["x"]}, {"item_ids": ["y"], "segment": "s"}, {"item_ids": ["z"], "surface": "home"}],
        }
    )
    assert [(pin.item_id, pin.position) for pin in rules.pins("home", "")] == [("b", 0), ("a", 3)]
    assert [pin.item_id for pin in rules.pins("mail", "")] == ["b"]
    assert [rules.fixed_list(*where) for where in [("home", "s"), ("mail", "s"), ("mail", "")]] == [
        ("z",),
        ("y",),
        ("x",),
    ]


def release_of(rules) -> Release:
    catalog = Catalog(SETTINGS.features)
    for n in range(COUNT):
        catalog.upsert(Item(item_id=f"i{(n * 7) % COUNT:02}", categories=[f"c{n % 5}"]))
    manifest = Manifest("v", "", "", "", "", 0, 0, 0, COUNT)
    lists = PopularLists(catalog, {"all": [], "segments": {}})
    return Release(manifest, catalog, lists, dict(SETTINGS.serving.blend_weights), Rules.parse(rules))


PINNED = {"pin": [{"item_id": "i05", "position": 0}, {"item_id": "i06", "position": 4}], "bury": [{"category": "c1"}]}
RELEASES = {"plain": release_of({}), "pinned": release_of(PINNED)}


def query_of(release, rate_off=False) -> Query:
    clock = SystemClock()
    request = RecommendRequest(user_id="u", num_items=10, disable_exploration=rate_off)
    budget = Budget(Deadline.after_ms(250), SETTINGS.serving.stage_budget_ms)
    return Query(request, "recommendation", 10, NOW_MS, release, budget, Trace(clock), 500)


@settings(max_examples=60)
@given(st.sampled_from(["plain", "pinned"]), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_the_order_is_a_permutation_independent_of_the_order_it_came_in(name, seed, is_ranked, ties) -> None:
    release, random = RELEASES[name], np.random.default_rng(seed)
    count = int(random.integers(1, COUNT + 1))
    rows = random.permutation(COUNT)[:count].astype(np.int32)
    values = [random.integers(0, 2 if ties else 1000, count).astype(np.float32) for _ in range(4)]
    bits = random.choice([SOURCE_BIT["ann"], SOURCE_BIT["new"]], count).astype(np.int32)
    candidates = Candidates(rows, values[0], values[1], values[2], bits, values[3] if is_ranked else None)
    reranker = BlendingReRanker(SETTINGS.serving, SETTINGS.features)
    ranking = reranker.rerank(query_of(release), UserFeatures("u"), candidates)
    shuffled = reranker.rerank(query_of(release), UserFeatures("u"), candidates.take(random.permutation(count)))
    assert ranking.candidates.rows.tolist() == shuffled.candidates.rows.tolist()
    assert sorted(ranking.candidates.rows.tolist()) == sorted(rows.tolist())
    assert np.allclose(ranking.contributions.sum(axis=0), ranking.scores)
    ids = [release.catalog.item_ids[row] for row in ranking.candidates.rows]
    pinned = [name for name in ("i05", "i06") if name in ids]
    if name == "pinned" and pinned:
        assert ids.index(pinned[0]) == 0 if pinned[0] == "i05" else ids.index("i06") <= 4
    if name == "pinned" and len(pinned) == 2 and count > 5:
        assert ids[4] == "i06"


def test_ties_go_to_the_smaller_item_id() -> None:
    release = RELEASES["plain"]
    candidates = Candidates.of_rows(np.arange(COUNT, dtype=np.int32))
    plain = SETTINGS.serving.model_copy(update={"diversity": 0.0})
    ranking = BlendingReRanker(plain, SETTINGS.features).rerank(
        query_of(release, rate_off=True), UserFeatures("u"), candidates
    )
    ids = [release.catalog.item_ids[row] for row in ranking.candidates.rows]
    assert ids == sorted(ids)
