"""Lists on a GPU: what is around the GPU itself, with a CPU index in its place; no GPU is needed or used."""

from dataclasses import replace

import faiss
import numpy as np
import pytest

from candidate.index import bits, gpu, lists
from candidate.index.gpu import GpuLists, on_gpu
from candidate.index.lists import Lists

D, COUNT = 16, 4000


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    drawn = np.random.default_rng(1).normal(size=(COUNT, D)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def made(vectors: np.ndarray) -> Lists:
    return lists.train(vectors, bits.pack(np.ones(COUNT, np.bool_), COUNT))


class Device:
    """Stands for the index on the GPU: no filters, and it counts what it is asked."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index
        self.asked: list[int] = []

    def search(self, queries: np.ndarray, k: int, params: faiss.SearchParametersIVF) -> tuple[np.ndarray, np.ndarray]:
        assert params.sel is None
        self.asked.append(k)
        return self._index.search(queries, k, params=params)  # type: ignore[no-any-return]


def test_without_a_gpu_there_is_none_and_no_error(made: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    assert on_gpu(made.index) is None
    monkeypatch.delattr(faiss, "get_num_gpus")
    assert on_gpu(made.index) is None


def test_a_gpu_that_does_not_take_the_index_is_left_alone(made: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", full, raising=False)
    assert on_gpu(made.index) is None


@pytest.mark.parametrize(("share", "uses_it"), [(1.0, True), (0.9, True), (0.2, False)])
def test_filters_are_applied_to_what_the_gpu_finds(
    share: float, uses_it: bool, made: Lists, vectors: np.ndarray
) -> None:
    allowed = np.random.default_rng(2).random(COUNT) < share
    passing, left = (bits.pack(allowed, COUNT), int(allowed.sum())) if share < 1 else (None, COUNT)
    device = Device(made.index)
    with_gpu = replace(made, gpu=GpuLists(device))
    rows, scores = with_gpu.search(vectors[:20], 500, passing, COUNT - left)
    expected, expected_scores = made.search(vectors[:20], 500, passing, COUNT - left)
    assert allowed[rows].all()
    assert (np.diff(scores) <= 0).all()
    assert lists.share_found(rows, expected) >= 0.97
    assert scores[:, 0] == pytest.approx(expected_scores[:, 0], abs=1e-5)
    # Deeper than a GPU answers: by the CPU.
    assert bool(device.asked) is uses_it
    assert all(500 <= k <= gpu.MAX_K for k in device.asked)


def test_where_too_few_pass_the_cpu_is_asked(made: Lists, vectors: np.ndarray) -> None:
    device = Device(made.index)
    passing = bits.pack(np.arange(COUNT) % 2 == 0, COUNT)
    assert GpuLists(device).search(vectors[:3], 400, 500, 8, passing) is None
    assert device.asked == [500]
