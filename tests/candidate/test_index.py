"""The index beside brute force: exact, approximate, filtered; and what it says to bad input."""

import threading

import faiss
import numpy as np
import pytest

from candidate.index import ItemIndex
from candidate.index.exact import on_one_core
from candidate.index.item_index import MAX_K
from core.errors import InvalidRequestError

D = 16
KINDS = pytest.mark.parametrize("exact_max_items", [100_000, 1000], ids=["exact", "lists"])


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, rows: np.ndarray, query: np.ndarray, k: int) -> np.ndarray:
    return rows[np.argsort(-(vectors @ query), kind="stable")[:k]]


def mean_recall(found: np.ndarray, vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> float:
    k = found.shape[1]
    shares = [len(np.intersect1d(f, brute_force(vectors, rows, q, k))) / k for f, q in zip(found, queries, strict=True)]
    return float(np.mean(shares))


def test_small_indexes_are_exact() -> None:
    rng = np.random.default_rng(1)
    vectors, rows = unit(rng, 500), rng.permutation(2000)[:500]
    index = ItemIndex.build(vectors, rows, 1000)
    assert (index.info.kind, index.info.recall) == ("Flat", 1.0)
    queries = unit(rng, 10)
    found, scores = index.search(queries, 50)
    for query, ours, score in zip(queries, found, scores, strict=True):
        assert ours.tolist() == brute_force(vectors, rows, query, 50).tolist()
        assert score == pytest.approx(np.sort(vectors @ query)[::-1][:50], abs=1e-6)


def test_larger_indexes_find_what_was_promised_and_tell_how_much_it_was() -> None:
    rng = np.random.default_rng(4)
    vectors = unit(rng, 20_000)
    index = ItemIndex.build(vectors, np.arange(20_000), 1000)
    assert index.info.kind.startswith("IVF")
    assert index.info.recall >= 0.98
    assert index.info.probes > 0
    queries = unit(rng, 50)
    found, scores = index.search(queries, 500)
    assert mean_recall(found, vectors, np.arange(20_000), queries) >= 0.97
    assert scores == pytest.approx(np.einsum("bkd,bd->bk", vectors[found], queries), abs=2e-3)
    assert (np.diff(scores) <= 0).all()


def test_probes_are_tuned_by_what_users_ask() -> None:
    rng = np.random.default_rng(5)
    # Eight topics: who asks within one needs its lists alone.
    topics = unit(rng, 8)
    vectors = np.repeat(topics, 1000, axis=0) + 0.1 * rng.normal(size=(8000, D)).astype(np.float32)
    near = ItemIndex.build(vectors, np.arange(8000), 1000, queries=np.repeat(topics, 32, axis=0))
    far = ItemIndex.build(vectors, np.arange(8000), 1000, queries=unit(rng, 256))
    assert near.info.recall >= 0.98
    assert far.info.recall >= 0.98
    assert near.info.probes < far.info.probes


@pytest.mark.parametrize("share", [0.9, 0.3, 0.1, 0.01])
@KINDS
def test_a_filter_acts_inside_the_search_and_still_gives_k(share: float, exact_max_items: int) -> None:
    rng = np.random.default_rng(2)
    vectors = unit(rng, 10_000)
    index = ItemIndex.build(vectors, np.arange(10_000), exact_max_items)
    allowed = rng.random(10_000) < share
    queries = unit(rng, 20)
    found, _ = index.search(queries, 50, allowed)
    assert (found >= 0).all()
    assert allowed[found].all()
    recall = mean_recall(found, vectors[allowed], np.flatnonzero(allowed), queries)
    assert recall >= (0.97 if exact_max_items == 1000 and share > 0.05 else 1.0)


def test_thousands_of_excluded_items_cost_no_place() -> None:
    rng = np.random.default_rng(13)
    vectors = unit(rng, 10_000)
    index = ItemIndex.build(vectors, np.arange(10_000), 1000)
    best, _ = index.search(vectors[:1], 3000)
    allowed = np.ones(10_000, np.bool_)
    allowed[best[0]] = False
    found, _ = index.search(vectors[:1], 500, allowed)
    assert (found >= 0).all()
    assert allowed[found].all()


def test_a_filter_far_from_the_query_still_gives_k() -> None:
    rng = np.random.default_rng(3)
    near, far = unit(rng, 5000), unit(rng, 5000)
    near[:, 0], far[:, 0] = 5, -5
    vectors = np.concatenate([near, far])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ItemIndex.build(vectors, np.arange(10_000), 1000)
    allowed = np.arange(10_000) >= 5000
    found, _ = index.search(vectors[:3], 100, allowed)
    assert (found >= 5000).all()


@KINDS
def test_where_few_are_allowed_the_rest_is_padding(exact_max_items: int) -> None:
    vectors = unit(np.random.default_rng(6), 2000)
    index = ItemIndex.build(vectors, np.arange(2000), exact_max_items)
    for passing in (0, 3):
        allowed = np.arange(2000) < passing
        rows, scores = index.search(vectors[:2], 7, allowed)
        assert [sorted(found) for found in rows.tolist()] == [[-1] * (7 - passing) + list(range(passing))] * 2
        assert (np.isneginf(scores) == (rows == -1)).all()
        assert rows[:, passing:].tolist() == [[-1] * (7 - passing)] * 2


def test_a_filter_made_before_an_item_came_does_not_allow_it() -> None:
    vectors = unit(np.random.default_rng(7), 2001)
    for exact_max_items in (100_000, 1000):
        index = ItemIndex.build(vectors[:2000], np.arange(2000), exact_max_items)
        index.upsert_many([2000], vectors[2000:])
        assert index.search(vectors[2000:], 1)[0].tolist() == [[2000]]
        assert index.search(vectors[2000:], 1, np.ones(2000, np.bool_))[0][0, 0] < 2000
        assert index.search(vectors[2000:], 1, np.ones(2001, np.bool_))[0].tolist() == [[2000]]


def test_an_empty_index_answers() -> None:
    query = unit(np.random.default_rng(0), 1)
    index = ItemIndex.build(np.zeros((0, D), np.float32), np.zeros(0, np.int64), 1000)
    assert index.search(query, 3)[0].tolist() == [[-1, -1, -1]]
    assert index.search(query, 3, np.ones(10, np.bool_))[0].tolist() == [[-1, -1, -1]]
    index.upsert_many([4], query)
    assert index.search(query, 3)[0].tolist() == [[4, -1, -1]]
    index.remove_many([4])
    assert index.search(query, 3)[0].tolist() == [[-1, -1, -1]]


@KINDS
def test_bad_input_is_refused_by_name(exact_max_items: int) -> None:
    vectors = unit(np.random.default_rng(8), 2000)
    index = ItemIndex.build(vectors, np.arange(2000), exact_max_items)
    not_numbers = np.where(np.arange(D) == 3, np.nan, vectors[:1]).astype(np.float32)
    with pytest.raises(InvalidRequestError, match=f"embedding: vectors of {D} numbers are needed"):
        index.search(vectors[:1, :-1], 5)
    with pytest.raises(InvalidRequestError, match="finite"):
        index.search(not_numbers, 5)
    with pytest.raises(InvalidRequestError, match=f"k: must be in 0..{MAX_K}, not 1000000"):
        index.search(vectors[:1], 1_000_000)
    with pytest.raises(InvalidRequestError, match="k: must be"):
        index.search(vectors[:1], -1)
    with pytest.raises(InvalidRequestError, match="finite"):
        index.upsert_many([3], not_numbers)
    with pytest.raises(InvalidRequestError, match="numbers are needed"):
        index.upsert_many([3], vectors[:1, :-1])
    with pytest.raises(InvalidRequestError, match="rows"):
        index.upsert_many([-1], vectors[:1])
    with pytest.raises(InvalidRequestError, match="finite"):
        ItemIndex.build(not_numbers, np.arange(1), exact_max_items)
    assert index.search(vectors[:2], 0)[0].shape == (2, 0)
    assert index.search(vectors[:0], 5)[0].shape == (0, 5)
    assert index.search(vectors[3:4], MAX_K)[0][0, 0] == 3
    assert len(index) == 2000


def test_searches_stay_on_the_thread_that_asks() -> None:
    seen: list[int] = []

    def search() -> None:
        faiss.omp_set_num_threads(2)
        on_one_core()
        seen.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert seen == [1]


def test_a_filter_of_a_users_own_corner_costs_no_recall() -> None:
    """The items nearest to a user are those that the user knows: what is left lies in a shell around them."""
    rng = np.random.default_rng(14)
    topics = unit(rng, 200)
    vectors = topics[rng.integers(200, size=30_000)] + 0.15 * rng.normal(size=(30_000, D)).astype(np.float32)
    index = ItemIndex.build(vectors, np.arange(30_000), 1000)
    queries = topics[:40] + 0.1 * rng.normal(size=(40, D)).astype(np.float32)
    known = index.search_exact(queries, 3000)
    recalls = []
    for query, rows in zip(queries, known, strict=True):
        allowed = np.ones(30_000, np.bool_)
        allowed[rows] = False
        found, _ = index.search(query[None], 500, allowed)
        recalls.append(mean_recall(found, vectors[allowed], np.flatnonzero(allowed), query[None]))
    assert np.mean(recalls) >= 0.96
