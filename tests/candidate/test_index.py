"""The index against brute force: exact, filtered, changed while it is searched, saved and loaded."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from candidate import index as index_module
from candidate.index import ItemIndex
from core.errors import ArtifactError

D = 16


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, rows: np.ndarray, query: np.ndarray, k: int) -> np.ndarray:
    scores = vectors @ query
    return rows[np.argsort(-scores, kind="stable")[:k]]


def test_small_indexes_are_exact() -> None:
    rng = np.random.default_rng(1)
    vectors, rows = unit(rng, 500), rng.permutation(2000)[:500]
    index = ItemIndex.build(vectors, rows, 1000)
    assert index.info.kind == "Flat"
    queries = unit(rng, 10)
    found, scores = index.search(queries, 50)
    for query, ours, score in zip(queries, found, scores, strict=True):
        assert ours.tolist() == brute_force(vectors, rows, query, 50).tolist()
        assert (np.diff(score) <= 0).all()


@pytest.mark.parametrize("share", [0.9, 0.3, 0.01])
@pytest.mark.parametrize("exact_max_items", [100_000, 1000], ids=["exact", "ivf"])
def test_a_filter_acts_inside_the_search_and_still_gives_k(share: float, exact_max_items: int) -> None:
    rng = np.random.default_rng(2)
    vectors = unit(rng, 10_000)
    index = ItemIndex.build(vectors, np.arange(10_000), exact_max_items)
    allowed = rng.random(10_000) < share
    queries = unit(rng, 5)
    found, _ = index.search(queries, 50, allowed)
    assert (found >= 0).all()
    assert allowed[found].all()
    where = np.flatnonzero(allowed)
    recall = np.mean(
        [
            len(np.intersect1d(f, brute_force(vectors[where], where, q, 50))) / 50
            for f, q in zip(found, queries, strict=True)
        ]
    )
    assert recall >= (1.0 if exact_max_items > 10_000 else 0.9)


def test_a_filter_far_from_the_query_still_gives_k() -> None:
    rng = np.random.default_rng(3)
    near, far = unit(rng, 5000), unit(rng, 5000)
    near[:, 0], far[:, 0] = 5, -5
    vectors = np.concatenate([near, far])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ItemIndex.build(vectors, np.arange(10_000), 1000)
    assert index.info.kind.startswith("IVF")
    allowed = np.arange(10_000) >= 5000
    found, _ = index.search(vectors[:3], 100, allowed)
    assert (found >= 5000).all()


def test_recall_is_measured_and_kept() -> None:
    index = ItemIndex.build(unit(np.random.default_rng(4), 5000), np.arange(5000), 1000)
    assert index.info.probes > 0
    assert index.info.recall >= 0.98


def test_nothing_allowed_gives_padding() -> None:
    index = ItemIndex.build(unit(np.random.default_rng(5), 50), np.arange(50), 1000)
    rows, scores = index.search(unit(np.random.default_rng(6), 2), 7, np.zeros(50, np.bool_))
    assert rows.tolist() == [[-1] * 7] * 2
    assert np.isneginf(scores).all()


def test_an_empty_index_answers() -> None:
    index = ItemIndex.build(np.zeros((0, D), np.float32), np.zeros(0, np.int64), 1000)
    assert index.search(unit(np.random.default_rng(0), 1), 3)[0].tolist() == [[-1, -1, -1]]
    index.upsert(4, unit(np.random.default_rng(0), 1)[0])
    assert index.search(unit(np.random.default_rng(0), 1), 3)[0].tolist() == [[4, -1, -1]]


Change = tuple[str, int, int]


@given(
    st.lists(
        st.tuples(st.sampled_from(["upsert", "upsert", "remove", "rebuild"]), st.integers(0, 40), st.integers(0, 99)),
        max_size=30,
    )
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_changes_give_what_a_fresh_index_gives(changes: list[Change]) -> None:
    """Main, delta and tombstones together are the live vectors, whatever the history."""
    pool = unit(np.random.default_rng(7), 100)
    live = {row: pool[row] for row in range(30)}
    index = ItemIndex.build(pool[:30], np.arange(30), 1000)
    for change, row, vector in changes:
        if change == "upsert":
            live[row] = pool[vector]
            index.upsert(row, pool[vector])
        elif change == "remove":
            live.pop(row, None)
            index.remove(row)
        else:
            index.rebuild()
    assert len(index) == len(live)
    query = unit(np.random.default_rng(8), 1)
    rows, scores = index.search(query, 50)
    found = dict(zip(rows[0].tolist(), scores[0].tolist(), strict=True))
    found.pop(-1, None)
    expected = {row: float(vector @ query[0]) for row, vector in live.items()}
    assert found == pytest.approx(expected, abs=1e-6)


def test_searches_run_beside_writes_and_rebuilds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "DELTA_MAX_ITEMS", 50)
    rng = np.random.default_rng(9)
    vectors = unit(rng, 3000)
    index = ItemIndex.build(vectors[:2000], np.arange(2000), 10_000)
    done, problems = threading.Event(), []

    def search() -> None:
        while not done.is_set():
            rows, _ = index.search(vectors[:4], 10)
            # An item that nobody touches is its own nearest neighbour, always.
            if rows[:, 0].tolist() != [0, 1, 2, 3]:
                problems.append(rows)

    searchers = [threading.Thread(target=search) for _ in range(2)]
    for thread in searchers:
        thread.start()
    for row in range(2000, 3000):
        index.upsert(row, vectors[row])
        assert row in index.search(vectors[row][None], 1)[0]
        index.remove(row - 1000)
        assert row - 1000 not in index.search(vectors[row - 1000][None], 5)[0]
        if index.wants_rebuild():
            index.rebuild()
    done.set()
    for thread in searchers:
        thread.join()
    assert not problems
    assert len(index) == 2000


def test_writes_during_a_rebuild_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(10), 200)
    index = ItemIndex.build(vectors[:100], np.arange(100), 1000)
    index.upsert(100, vectors[100])
    build = index_module._build

    def slow_build(*arguments: object) -> object:
        built = build(*arguments)  # type: ignore[arg-type]
        index.upsert(101, vectors[101])
        index.upsert(5, vectors[150])
        index.remove(6)
        index.remove(100)
        return built

    monkeypatch.setattr(index_module, "_build", slow_build)
    index.rebuild()
    rows, _ = index.search(vectors[[101, 150, 6, 100, 7]], 1)
    assert rows[:2, 0].tolist() == [101, 5]
    assert rows[4, 0] == 7
    everything = set(index.search(vectors[:1], 200)[0][0].tolist())
    assert everything == {-1, *range(100), 101} - {6}


@pytest.mark.parametrize("exact_max_items", [100_000, 500], ids=["exact", "ivf"])
def test_saved_indexes_answer_as_before(exact_max_items: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    vectors = unit(rng, 2000)
    index = ItemIndex.build(vectors[:1990], np.arange(1990), exact_max_items, "e1")
    index.upsert(1995, vectors[1995])
    index.remove(3)
    index.save(tmp_path / "index.faiss")
    again = ItemIndex.load(tmp_path / "index.faiss")
    assert (len(again), again.info.embedding_version, again.delta_count) == (len(index), "e1", 0)
    queries = unit(rng, 5)
    for ours, theirs in zip(index.search(queries, 20)[0], again.search(queries, 20)[0], strict=True):
        assert len(np.intersect1d(ours, theirs)) >= (20 if exact_max_items > 2000 else 17)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    with pytest.raises(ArtifactError, match="headrace train"):
        ItemIndex.load(path)
    index = ItemIndex.build(unit(np.random.default_rng(12), 100), np.arange(100), 1000)
    index.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(ArtifactError, match="headrace train"):
        ItemIndex.load(path)
    other = ItemIndex.build(unit(np.random.default_rng(12), 90), np.arange(90), 1000)
    other.save(tmp_path / "other.faiss")
    path.write_bytes((tmp_path / "other.faiss").read_bytes())
    with pytest.raises(ArtifactError, match="describes"):
        ItemIndex.load(path)
