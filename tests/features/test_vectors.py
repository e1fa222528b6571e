"""Features of a request: defined for every input, and about the right thing."""

import numpy as np
import pytest

from core.settings import load_settings
from features import item_stats, vectors, windows
from features.catalog import Catalog
from features.item_stats import ItemPartial
from features.vectors import CANDIDATE_FEATURES, SOURCES, USER_FEATURES, Listed, WholeList
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import Item

FEATURES = load_settings().features
NOW_MS = 1_700_000_000_000
HOUR_MS = 3_600_000


def catalog_of(*items: Item) -> Catalog:
    catalog = Catalog(FEATURES)
    for item in items:
        catalog.upsert(item)
    return catalog


def inputs(state: UserState, catalog: Catalog, ids: list[str], scores=None, bits=None) -> vectors.RankerInput:
    rows = catalog.rows(ids)
    return vectors.ranker_input(
        state,
        catalog,
        rows,
        np.zeros(len(ids), np.float32) if scores is None else np.array(scores, np.float32),
        np.zeros(len(ids), np.int32) if bits is None else np.array(bits, np.int32),
        NOW_MS,
        FEATURES,
    )


def clicked(*item_ids: str, categories: tuple[str, ...] = ()) -> UserState:
    state = UserState()
    windows.apply(
        state,
        [
            UserEvent("u", n + 1, item_id, "click", NOW_MS - (len(item_ids) - n) * 60_000, 1.0, 1.0, categories)
            for n, item_id in enumerate(item_ids)
        ],
        FEATURES,
    )
    return state


def column(features: vectors.RankerInput, name: str) -> np.ndarray:
    return features.candidates[:, CANDIDATE_FEATURES.index(name)]


def test_an_unknown_user_and_an_unknown_item_have_features() -> None:
    features = inputs(UserState(), catalog_of(Item(item_id="a")), ["a", "nobody-knows"])
    assert features.user.shape == (len(USER_FEATURES),)
    assert features.candidates.shape == (2, len(CANDIDATE_FEATURES))
    assert features.candidate_rows.tolist() == [0, -1]
    assert np.isfinite(features.candidates).all()
    assert not features.user.any()


def test_no_candidates_and_an_empty_catalogue_are_fine() -> None:
    features = inputs(clicked("x"), Catalog(FEATURES), [])
    assert features.candidates.shape == (0, len(CANDIDATE_FEATURES))
    assert features.history_rows[-1] == -1


def test_the_last_click_shows_in_history_session_and_affinity() -> None:
    catalog = catalog_of(Item(item_id="a", categories=["jazz"]), Item(item_id="b", categories=["rock"]))
    features = inputs(clicked("a", categories=("jazz",)), catalog, ["a", "b"])
    assert features.history_rows[-1] == 0
    assert column(features, "in_session").tolist() == [1, 0]
    assert column(features, "affinity_short")[0] > column(features, "affinity_short")[1]
    assert column(features, "shared_categories_with_last").tolist() == [1, 0]


def test_what_was_looked_at_last_is_the_most_recent() -> None:
    catalog = catalog_of(*(Item(item_id=name) for name in "abcd"))
    features = inputs(clicked("a", "b", "a", "c"), catalog, ["a", "b", "c", "d", "nobody-knows"])
    assert column(features, "recency_in_history").tolist() == pytest.approx([1 / 2, 1 / 3, 1, 0, 0])


def test_an_item_looked_at_often_is_one_step_back_for_the_others() -> None:
    catalog = catalog_of(*(Item(item_id=name) for name in "ab"))
    features = inputs(clicked("b", "a", "a", "a"), catalog, ["a", "b"])
    assert column(features, "recency_in_history").tolist() == [1, 0.5]
    assert column(features, "log_times_in_history").tolist() == pytest.approx([np.log1p(3), np.log1p(1)])


def test_freshness_of_a_touch_falls_with_time_and_never_touched_has_none() -> None:
    catalog = catalog_of(*(Item(item_id=name) for name in "abc"))
    last, before, never = column(inputs(clicked("a", "b"), catalog, ["b", "a", "c"]), "touch_freshness")
    assert last > before > never == 0
    assert last - before == pytest.approx(np.log1p(120) - np.log1p(60), rel=1e-5)


def test_prices_are_told_beside_the_list_and_what_was_looked_at() -> None:
    catalog = catalog_of(Item(item_id="a", price=9.0), Item(item_id="b", price=99.0), Item(item_id="free"))
    features = inputs(clicked("b", "free", "a"), catalog, ["a", "b", "free"])
    ten, hundred = np.log(10.0), np.log(100.0)
    mean = (ten + hundred) / 2
    assert features.user[USER_FEATURES.index("mean_log_price_of_list")] == pytest.approx(mean)
    assert column(features, "log_price_in_list").tolist() == pytest.approx([ten - mean, hundred - mean, 0], rel=1e-5)
    assert column(features, "log_price_from_last").tolist() == pytest.approx([0, hundred - ten, 0], rel=1e-5)
    assert column(features, "log_price_from_recent").tolist() == pytest.approx(
        [ten - mean, hundred - mean, 0], rel=1e-5
    )


def test_how_many_of_the_list_are_cheaper_is_told() -> None:
    catalog = catalog_of(*(Item(item_id=name, price=price) for name, price in zip("abcd", (9, 3, 9, 0), strict=True)))
    features = inputs(clicked("b"), catalog, ["a", "b", "c", "d", "nobody-knows"])
    assert column(features, "log_price_place").tolist() == pytest.approx(np.log1p([1, 0, 1, 0, 0]))


def test_scores_and_places_are_told_beside_those_of_the_last_item_that_is_in_the_list() -> None:
    catalog = catalog_of(*(Item(item_id=name) for name in "abcd"))
    ids, scores = ["d", "a", "b"], [0.25, 0.75, 0.5]
    features = inputs(clicked("b", "c"), catalog, ids, scores=scores)
    assert column(features, "log_place").tolist() == pytest.approx(np.log1p([2, 0, 1]))
    assert column(features, "score_from_last").tolist() == [-0.25, 0.25, 0]
    assert column(features, "log_places_from_last").tolist() == pytest.approx([np.log(2), -np.log(2), 0])
    features = inputs(clicked("c"), catalog, ids, scores=scores)
    assert not column(features, "score_from_last").any()
    assert not column(features, "log_places_from_last").any()


def test_equal_scores_share_a_place() -> None:
    catalog = catalog_of(*(Item(item_id=name) for name in "abc"))
    features = inputs(clicked("b"), catalog, ["a", "b", "c"], scores=[0.5, 0.5, 0.25])
    assert column(features, "log_place").tolist() == pytest.approx(np.log1p([0, 0, 2]))


@pytest.mark.parametrize("known", ["the list", "its features"])
def test_a_part_of_a_list_has_the_features_it_had_in_the_whole(known) -> None:
    catalog = catalog_of(*(Item(item_id=name, price=n + 1.0) for n, name in enumerate("abcd")))
    state, ids, scores = clicked("b", "d"), ["a", "b", "c", "d"], np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    whole = inputs(state, catalog, ids, scores)
    listed = WholeList(catalog.rows(ids), scores)
    part_of = listed if known == "the list" else Listed.of_features(whole.user, whole.candidates[[2, 0]])
    part = vectors.ranker_input(
        state,
        catalog,
        catalog.rows(["c", "a"]),
        scores[[2, 0]],
        np.zeros(2, np.int32),
        NOW_MS,
        FEATURES,
        part_of,
    )
    assert part.candidates.tobytes() == whole.candidates[[2, 0]].tobytes()
    assert part.user.tobytes() == whole.user.tobytes()


def test_source_bits_and_scores_land_in_their_columns() -> None:
    catalog = catalog_of(Item(item_id="a"))
    trending = SOURCES.index("trending")
    features = inputs(UserState(), catalog, ["a"], scores=[0.25], bits=[1 << trending])
    assert column(features, "retrieval_score").tolist() == [0.25]
    assert [column(features, f"from_{source}")[0] for source in SOURCES] == [
        float(index == trending) for index in range(len(SOURCES))
    ]


def test_statistics_decay_with_the_time_of_the_request() -> None:
    catalog = catalog_of(Item(item_id="a"))
    partial = ItemPartial()
    for n in range(50):
        item_stats.apply(partial, UserEvent("u", n, "a", "click", NOW_MS - HOUR_MS), FEATURES)
    catalog.put_stats(item_stats.as_message("a", 0, partial, FEATURES))
    now = inputs(UserState(), catalog, ["a"])
    assert column(now, "log_clicks")[0] == np.float32(np.log1p(50))
    short, long = column(now, "log_popularity_short")[0], column(now, "log_popularity_long")[0]
    assert np.isclose(np.expm1(short), 25, rtol=1e-3)
    assert long > short


def test_partials_of_two_partitions_are_added_up_in_the_catalogue() -> None:
    catalog = catalog_of(Item(item_id="a"))
    for partition in (0, 1, 1):
        partial = ItemPartial()
        item_stats.apply(partial, UserEvent("u", 1, "a", "click", NOW_MS), FEATURES)
        catalog.put_stats(item_stats.as_message("a", partition, partial, FEATURES))
    assert catalog.column("clicks").tolist() == [2]


def test_a_removed_item_keeps_its_row_and_is_not_servable() -> None:
    catalog = catalog_of(Item(item_id="a"), Item(item_id="b"))
    assert catalog.remove("a") == 0
    assert catalog.remove("never-there") == -1
    assert catalog.servable(NOW_MS).tolist() == [False, True]
    catalog.upsert(Item(item_id="a"))
    assert catalog.row("a") == 0
    assert catalog.servable(NOW_MS).tolist() == [True, True]


def test_an_item_known_from_statistics_alone_is_not_servable() -> None:
    catalog = Catalog(FEATURES)
    catalog.put_stats(item_stats.as_message("ghost", 0, ItemPartial(), FEATURES))
    assert catalog.servable(NOW_MS).tolist() == [False]


def test_the_catalogue_grows() -> None:
    catalog = Catalog(FEATURES)
    for n in range(3000):
        catalog.upsert(Item(item_id=f"i{n}", year=2000))
    assert len(catalog) == 3000
    assert catalog.rows(["i0", "i2999", "no"]).tolist() == [0, 2999, -1]
    assert catalog.servable(NOW_MS).all()
