"""The arithmetic of the re-ranker: what holds for any candidates, and what the parts do."""

from dataclasses import replace

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
from serving.rerank.diversity import category_vectors, diversify, diversify_by_dpp, item_vectors
from serving.rerank.exploration import explore
from serving.rerank.quotas import Bound, hold_quotas
from serving.rerank.rules import Rules, place_pins
from serving.shown import Shown
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


@pytest.mark.parametrize("method", [diversify, diversify_by_dpp])
@given(
    arrays.arrays(np.float64, 30, elements=st.floats(0, 1)),
    arrays.arrays(np.int32, (30, 4), elements=st.integers(0, 6)),
    st.floats(0, 1),
    st.integers(1, 40),
)
def test_diversity_gives_a_permutation_whose_values_fall(method, relevance, categories, diversity, places) -> None:
    order, penalties, scale = method(relevance, category_vectors(categories), diversity, places)
    assert sorted(order.tolist()) == list(range(30))
    values = (scale * relevance - penalties)[order]
    assert (np.diff(values) <= 1e-6).all()


@pytest.mark.parametrize("method", [diversify, diversify_by_dpp])
def test_without_diversity_the_order_is_that_of_the_relevance(method) -> None:
    relevance = np.array([0.2, 0.9, 0.2, 0.5])
    assert method(relevance, np.ones((4, 1), np.float32), 0.0, 4).order.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("method", [diversify, diversify_by_dpp])
def test_diversity_brings_another_category_forward(method) -> None:
    vectors = category_vectors(np.array([[1, 0], [1, 0], [2, 0]], np.int32))
    assert method(np.array([1.0, 0.9, 0.8]), vectors, 0.5, 3).order.tolist() == [0, 2, 1]


def test_a_dpp_places_what_makes_the_determinant_largest() -> None:
    random = np.random.default_rng(3)
    relevance, vectors = random.random(7), random.random((7, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    quality = np.exp(0.5 * relevance)
    kernel = quality[:, None] * (vectors @ vectors.T) * quality[None, :]
    order = diversify_by_dpp(relevance, vectors, 0.5, 3).order
    for place in range(3):
        chosen = list(order[:place])
        gains = [np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])]) if i not in chosen else -1 for i in range(7)]
        assert int(np.argmax(gains)) == order[place]


@given(
    st.permutations(range(14)),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9), st.integers(1, 9)), max_size=3),
    st.dictionaries(st.integers(0, 20), st.integers(0, 13), max_size=3),
)
def test_quotas_are_held_pins_stay_and_nothing_is_lost(order, raw, raw_pins) -> None:
    kinds = np.arange(14) % 4
    bounds = [Bound(kinds == kind, min(least, most, within), most, within) for kind, least, most, within in raw]
    index_at = {position: index for index, position in {i: p for p, i in raw_pins.items()}.items()}
    pins = [(index_at[position], position) for position in sorted(index_at)]
    placed = hold_quotas(np.array(order, np.intp), bounds, pins)
    assert sorted(placed.tolist()) == list(range(14))
    for index, position in pins:
        if position < 14:
            assert placed[position] == index
    for bound in bounds:
        first = placed[: bound.within]
        by_pins = sum(bool(bound.members[i]) for i, p in pins if p < bound.within)
        others = sum(not any(b.members[i] for b in bounds) for i in range(14) if i not in index_at.values())
        if others >= max(b.within for b in bounds):
            assert bound.members[first].sum() <= max(bound.at_most, by_pins)


def test_a_lower_bound_brings_its_items_up_and_an_upper_one_keeps_them_down() -> None:
    order, tea = np.arange(10), np.arange(10) >= 7
    assert hold_quotas(order, [Bound(tea, 2, 10, 5)], []).tolist() == [0, 1, 2, 7, 8, 3, 4, 5, 6, 9]
    soap = np.arange(10) < 4
    assert hold_quotas(order, [Bound(soap, 0, 1, 4)], []).tolist() == [0, 4, 5, 6, 1, 2, 3, 7, 8, 9]
    assert hold_quotas(order, [Bound(soap, 0, 1, 4)], [(3, 2)]).tolist() == [4, 5, 3, 6, 0, 1, 2, 7, 8, 9]


def test_what_was_shown_and_let_pass_tires_and_recovers() -> None:
    shown = Shown(users=2, half_life_seconds=100)
    for _ in range(3):
        shown.note("u", ["a", "b"], 0)
    assert shown.fatigue("u", frozenset({"b"}), 0) == {"a": 1 - 0.5**3}
    assert shown.fatigue("u", frozenset({"b"}), 100_000) == {"a": pytest.approx(1 - 0.5**1.5)}
    assert shown.fatigue("stranger", frozenset(), 0) == {}
    shown.forget(["u"])
    shown.note("u", ["a"], 0)
    assert shown.fatigue("u", frozenset(), 0) == {}


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
        ({"quota": [{"category": "tea", "within": 3}]}, "quota.0"),
        ({"quota": [{"category": "tea", "within": 3, "at_least": 4}]}, "quota.0"),
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


def release_of(rules, step=7) -> Release:
    catalog = Catalog(SETTINGS.features)
    for n in range(COUNT):
        catalog.upsert(Item(item_id=f"i{(n * step) % COUNT:02}", categories=[f"c{(n * step) % COUNT % 5}"]))
    manifest = Manifest("v", "", "", "", "", 0, 0, 0, COUNT)
    lists = PopularLists(catalog, {"all": [], "segments": {}})
    return Release(manifest, catalog, lists, dict(SETTINGS.serving.blend_weights), Rules.parse(rules))


PINNED = {"pin": [{"item_id": "i05", "position": 0}, {"item_id": "i06", "position": 4}], "bury": [{"category": "c1"}]}
RELEASES = {"plain": release_of({}), "pinned": release_of(PINNED)}


def query_of(release, rate_off=False, on=None) -> Query:
    clock = SystemClock()
    request = RecommendRequest(user_id="u", num_items=10, disable_exploration=rate_off)
    budget = Budget(Deadline.after_ms(250), SETTINGS.serving.stage_budget_ms)
    return Query(
        request, "recommendation", 10, NOW_MS, release, budget, Trace(clock), 500, (on or SETTINGS.serving).on("")
    )


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


def test_by_vectors_what_is_alike_is_spread_and_a_newer_item_is_like_no_other() -> None:
    # 0 and 1 point the same way, 2 another one; 3 came after the bundle.
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    taken = item_vectors(vectors, np.array([1, 3, 0, 2], np.int32))
    assert taken.tolist() == [[1, 0], [0, 0], [1, 0], [0, 1]]
    for method in (diversify, diversify_by_dpp):
        assert method(np.array([1.0, 0.7, 0.9, 0.8]), taken, 0.5, 4).order.tolist()[:3] == [0, 3, 1]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 40), st.sampled_from(["mmr", "dpp"]))
def test_any_vectors_give_a_permutation_whose_values_fall(seed, diversity, places, name) -> None:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(30, 8)).astype(np.float32)
    vectors[:20] /= np.linalg.norm(vectors[:20], axis=1, keepdims=True)
    vectors[20:] = 0
    relevance = random.random(30)
    method = diversify if name == "mmr" else diversify_by_dpp
    order, penalties, scale = method(relevance, vectors, diversity, places)
    assert sorted(order.tolist()) == list(range(30))
    assert (np.diff((scale * relevance - penalties)[order]) <= 1e-6).all()


def test_a_release_with_vectors_is_spread_by_them() -> None:
    # All items share their categories' likeness; by the vectors, the second of the order is the first once more.
    release = RELEASES["plain"]
    rows = np.arange(COUNT, dtype=np.int32)
    ranked = np.linspace(1, 0, COUNT).astype(np.float32)
    zeros = np.zeros(COUNT, np.float32)
    candidates = Candidates(rows, zeros, zeros, zeros, np.full(COUNT, SOURCE_BIT["ann"], np.int32), ranked)
    vectors = np.eye(COUNT, dtype=np.float32)
    vectors[1] = vectors[0]
    values = SETTINGS.serving.model_copy(update={"diversity": 0.9, "blend_weights": {"ranker": 1.0}})
    reranker = BlendingReRanker(values, SETTINGS.features)
    alike = replace(release, vectors=vectors, blend_weights={"ranker": 1.0})
    order = reranker.rerank(query_of(alike, rate_off=True, on=values), UserFeatures("u"), candidates).candidates.rows
    assert order.tolist()[:3] == [0, 2, 3]


def test_ties_go_the_same_way_whatever_the_rows_are() -> None:
    # The same items came in another order: another replica, say.
    orders = [_tied(RELEASES["plain"]), _tied(release_of({}, step=11))]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == [f"i{n:02}" for n in range(COUNT)]


def _tied(release) -> list[str]:
    candidates = Candidates.of_rows(np.arange(COUNT, dtype=np.int32))
    plain = SETTINGS.serving.model_copy(update={"diversity": 0.0})
    ranking = BlendingReRanker(plain, SETTINGS.features).rerank(
        query_of(release, rate_off=True, on=plain), UserFeatures("u"), candidates
    )
    return release.ids(ranking.candidates.rows)
