"""The index in a bundle: it answers as before, and what is broken or does not belong together is refused."""

from pathlib import Path

import numpy as np
import pytest

from candidate.index import ItemIndex, load_index, save_index
from core.errors import ArtifactError

D = 16


def unit(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("exact_max_items", [100_000, 500], ids=["exact", "lists"])
def test_saved_indexes_answer_as_before(exact_max_items: int, tmp_path: Path) -> None:
    vectors = unit(11, 2000)
    index = ItemIndex.build(vectors[:1990], np.arange(1990), exact_max_items, "e1")
    index.upsert_many([1995], vectors[1995:1996])
    index.remove_many([3])
    save_index(index, tmp_path / "index.faiss")
    again = load_index(tmp_path / "index.faiss", index.vectors)
    assert (len(again), again.info, again.delta_count) == (len(index), index.info, 0)
    for ours, theirs in zip(index.search(vectors[:5], 20), again.search(vectors[:5], 20), strict=True):
        assert (ours == theirs).all()
    again.upsert_many([1996], vectors[1996:1997])
    assert again.search(vectors[1996:1997], 1)[0].tolist() == [[1996]]


def test_an_empty_index_is_saved_and_loaded(tmp_path: Path) -> None:
    nothing = np.zeros((0, D), np.float32)
    save_index(ItemIndex.build(nothing, np.zeros(0, np.int64), 1000), tmp_path / "index.faiss")
    assert len(load_index(tmp_path / "index.faiss", nothing)) == 0


@pytest.mark.parametrize("exact_max_items", [100_000, 50], ids=["exact", "lists"])
def test_what_is_broken_or_does_not_belong_together_is_refused(exact_max_items: int, tmp_path: Path) -> None:
    path, vectors = tmp_path / "index.faiss", unit(12, 100)
    with pytest.raises(ArtifactError, match="headrace train"):
        load_index(path, vectors)
    save_index(ItemIndex.build(vectors, np.arange(100), exact_max_items), path)
    for others in (unit(13, 100), vectors[:90], vectors[:, :8], vectors[::-1]):
        with pytest.raises(ArtifactError, match="other vectors"):
            load_index(path, others)
    facts = path.with_name("index.faiss.json")
    whole, facts_whole = path.read_bytes(), facts.read_text()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match="headrace train"):
            load_index(path, vectors)
    path.write_bytes(whole)
    for broken in ("", "{}", "[]", facts_whole.replace('"items":100', '"items":99')):
        facts.write_text(broken)
        with pytest.raises(ArtifactError, match="headrace train"):
            load_index(path, vectors)
    save_index(ItemIndex.build(vectors[:, :8].copy(), np.arange(100), exact_max_items), tmp_path / "other")
    facts.write_text(facts_whole)
    path.write_bytes((tmp_path / "other").read_bytes())
    with pytest.raises(ArtifactError, match="describes"):
        load_index(path, vectors)
