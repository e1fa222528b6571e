"""The recall that users get: measured on their searches, told, and mended."""

import threading

import numpy as np
import pytest

from candidate.index import ItemIndex, item_index, recall
from candidate.index.recall import RecallMonitor

D = 16


def topics(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def centres() -> np.ndarray:
    return topics(np.random.default_rng(1), 8)


@pytest.fixture(scope="module")
def vectors(centres: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.repeat(centres, 1000, axis=0) + 0.1 * rng.normal(size=(8000, D)).astype(np.float32)


def test_it_tells_the_mean_over_searches_that_took_place(vectors: np.ndarray) -> None:
    told: list[float] = []
    index = ItemIndex.build(vectors, np.arange(8000), 10_000)
    monitor = RecallMonitor(lambda: index, told.append)
    assert monitor.measure_one() is None
    index.search(vectors[:1], 10, np.arange(8000) % 2 == 0)
    index.search(vectors[1:2], 10)
    assert monitor.measure_one() == 1.0
    # One at a time: the second came while the first was waiting.
    assert monitor.measure_one() is None
    assert told == [1.0]


def test_an_index_tuned_for_other_users_is_tuned_again(
    vectors: np.ndarray, centres: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "_ENOUGH", 60)
    monkeypatch.setattr(item_index, "RECALL_QUERIES", 100)
    index = ItemIndex.build(vectors, np.arange(8000), 1000, queries=np.repeat(centres, 32, axis=0))
    narrow = index.info.probes
    told: list[float] = []
    monitor = RecallMonitor(lambda: index, told.append)
    monitor.measure_one()
    for query in topics(np.random.default_rng(3), 60):
        assert not index.wants_rebuild()
        index.search(query[None], 500)
        monitor.measure_one()
    assert told[-1] < recall.LOW_RECALL
    assert index.wants_rebuild()
    index.rebuild()
    assert index.info.probes > narrow
    assert not index.wants_rebuild()
    found = []
    for query in topics(np.random.default_rng(4), 40):
        index.search(query[None], 500)
        monitor.measure_one()
        found.append(told[-1])
    assert found[-1] >= 0.97


def test_it_follows_the_index_that_serves_and_lets_go_of_it(vectors: np.ndarray) -> None:
    indexes = [ItemIndex.build(vectors, np.arange(8000), 10_000) for _ in range(2)]
    serving = indexes[:1]
    heard = threading.Event()
    monitor = RecallMonitor(lambda: serving[0], lambda _recall: heard.set(), interval_seconds=0.005)
    monitor.start()
    try:
        for index in indexes:
            serving[0] = index
            heard.clear()
            while not heard.wait(0.005):
                index.search(vectors[:1], 5)
    finally:
        monitor.stop()
    assert [index.listener for index in indexes] == [None, None]
