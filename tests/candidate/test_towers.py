"""Towers and encoder: new items by content, unknown items stepped over, versions that must agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from candidate.content import item_content, without_rare_words
from candidate.encoder import UserEncoder, encode_items
from candidate.towers import TOWERS, TOWERS_CONFIG, ContentTensors, Towers, load_towers, save_towers
from core.errors import ArtifactError
from features.catalog import Catalog
from features.windows import UserState
from headrace.v1.events_pb2 import Item

if TYPE_CHECKING:
    from conftest import World

GENRES = ("jazz", "metal", "folk", "techno")


def _catalog(music: World) -> Catalog:
    catalog = Catalog(music.settings.features)
    for item in music.items:
        catalog.upsert(item)
    return catalog


def _by_genre(music: World) -> dict[str, np.ndarray]:
    vectors = music.trained.item_vectors
    return {
        genre: vectors[[at for at, item in enumerate(music.items) if item.categories[0] == genre]] for genre in GENRES
    }


@pytest.mark.parametrize("genre", GENRES)
def test_a_new_item_lies_with_items_of_its_category(music: World, genre: str) -> None:
    vector = encode_items(music.trained.towers, [Item(item_id="never-seen", title="a record", categories=[genre])])[0]
    distance = {name: 1 - float((vectors @ vector).mean()) for name, vectors in _by_genre(music).items()}
    assert distance[genre] < 0.3 * min(value for name, value in distance.items() if name != genre)


def test_vectors_have_unit_length(music: World, state_of: Callable[..., UserState]) -> None:
    assert np.allclose(np.linalg.norm(music.trained.item_vectors, axis=1), 1, atol=1e-5)
    encoder = UserEncoder(music.trained.towers, music.settings.features)
    users, _ = encoder.encode(
        [state_of("jazz-1"), state_of("folk-1", "folk-2")], _catalog(music), music.trained.item_vectors
    )
    assert np.allclose(np.linalg.norm(users, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("genre", GENRES)
def test_a_user_lies_with_the_items_of_their_taste(
    music: World, state_of: Callable[..., UserState], genre: str
) -> None:
    encoder = UserEncoder(music.trained.towers, music.settings.features)
    state = state_of(*(f"{genre}-{n}" for n in range(4)))
    users, known = encoder.encode([state], _catalog(music), music.trained.item_vectors)
    scores = music.trained.item_vectors @ users[0]
    nearest = [music.items[row].categories[0] for row in np.argsort(-scores)[:10]]
    assert known[0]
    assert nearest.count(genre) >= 8


def test_unknown_items_of_a_history_are_stepped_over(music: World, state_of: Callable[..., UserState]) -> None:
    encoder = UserEncoder(music.trained.towers, music.settings.features)
    catalog, vectors = _catalog(music), music.trained.item_vectors
    states = [state_of("jazz-1", "gone", "jazz-2", "gone"), state_of("gone", "gone-too"), UserState()]
    users, known = encoder.encode(states, catalog, vectors)
    assert known.tolist() == [True, False, False]
    assert not users[1:].any()
    # The times differ, so the vectors are near, not equal.
    plain, _ = encoder.encode([state_of("jazz-1", "jazz-2")], catalog, vectors)
    assert float(users[0] @ plain[0]) > 0.95


def test_an_item_known_from_statistics_alone_is_stepped_over(music: World, state_of: Callable[..., UserState]) -> None:
    encoder = UserEncoder(music.trained.towers, music.settings.features)
    catalog = _catalog(music)
    catalog.put_stats(next(music.bundle.item_stats()).__class__(item_id="counted-only"))
    with_room = np.zeros((len(catalog) + 10, 32), np.float32)
    with_room[: len(music.items)] = music.trained.item_vectors
    for vectors in (music.trained.item_vectors, with_room):
        _, known = encoder.encode([state_of("counted-only")], catalog, vectors)
        assert not known[0]


def test_skips_and_low_ratings_are_no_steps(music: World, state_of: Callable[..., UserState]) -> None:
    encoder = UserEncoder(music.trained.towers, music.settings.features)
    _, known = encoder.encode([state_of("jazz-1", kind="skip")], _catalog(music), music.trained.item_vectors)
    assert not known[0]


def test_a_batch_gives_what_each_user_alone_gives(music: World, state_of: Callable[..., UserState]) -> None:
    encoder = UserEncoder(music.trained.towers, music.settings.features)
    catalog, vectors = _catalog(music), music.trained.item_vectors
    states = [
        state_of(*(f"{genre}-{n}" for n in range(length))) for genre, length in zip(GENRES, (1, 3, 9, 19), strict=True)
    ]
    together, _ = encoder.encode(states, catalog, vectors)
    alone = np.concatenate([encoder.encode([state], catalog, vectors)[0] for state in states])
    assert np.allclose(together, alone, atol=1e-5)


def test_saved_towers_come_back_equal(music: World, tmp_path: Path) -> None:
    save_towers(music.trained.towers, tmp_path)
    again = load_towers(tmp_path)
    assert again.embedding_version == music.trained.towers.embedding_version
    assert again.config == music.trained.towers.config
    assert np.allclose(encode_items(again, music.items), music.trained.item_vectors, atol=1e-6)


def test_towers_that_are_not_what_they_say_are_refused(music: World, tmp_path: Path) -> None:
    save_towers(music.trained.towers, tmp_path)
    whole = (tmp_path / TOWERS).read_bytes()
    (tmp_path / TOWERS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="headrace train"):
        load_towers(tmp_path)
    # Weights of other towers of the same shape.
    other = Towers(music.trained.towers.config)
    folder = tmp_path / "other"
    folder.mkdir()
    save_towers(other, folder)
    (tmp_path / TOWERS).write_bytes((folder / TOWERS).read_bytes())
    with pytest.raises(ArtifactError, match="version"):
        load_towers(tmp_path)
    (tmp_path / TOWERS_CONFIG).unlink()
    with pytest.raises(ArtifactError, match="headrace train"):
        load_towers(tmp_path)


def test_content_knows_categories_words_and_numbers() -> None:
    items = [
        Item(item_id="a", title="The Blue Train", categories=["jazz", "bop"], year=1957),
        Item(item_id="b"),
        Item(item_id="c", title="Blue", price=9.0),
    ]
    content = item_content(items)
    assert np.diff(content.categories.offsets).tolist() == [2, 0, 0]
    assert np.diff(content.words.offsets).tolist() == [3, 0, 1]
    assert np.isnan(content.numbers).tolist() == [[False, True], [True, True], [True, False]]
    assert content.words.buckets[3] in content.words.buckets[:3]
    common = without_rare_words(content, 2).words.weights
    assert (common > 0).sum() == 2
    swapped = content.take(np.array([2, 0]))
    assert np.diff(swapped.words.offsets).tolist() == [1, 3]
    assert swapped.words.buckets[0] == content.words.buckets[3]


def test_items_of_which_nothing_is_known_cost_one_row_and_change_no_vector(music: World) -> None:
    known = Item(item_id="jazz-1", title="a record", categories=["jazz"])
    items = [Item(item_id="jazz-2"), known, Item(item_id="never-seen"), Item(item_id="jazz-3"), known]
    content = ContentTensors.of(item_content(items))
    assert content.at.tolist() == [0, 1, 0, 0, 2]
    assert len(content.numbers) == 3
    together = encode_items(music.trained.towers, items)
    alone = np.concatenate([encode_items(music.trained.towers, [item]) for item in items])
    assert np.allclose(together, alone, atol=1e-6)


def test_large_batches_in_bfloat16_stay_near(
    music: World, state_of: Callable[..., UserState], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, vectors = _catalog(music), music.trained.item_vectors
    exact = UserEncoder(music.trained.towers, music.settings.features)
    low = UserEncoder(music.trained.towers, music.settings.features, bfloat16_from_users=2)
    states = [state_of(*(f"{genre}-{n}" for n in range(9))) for genre in GENRES]
    plain, rough = exact.encode(states, catalog, vectors)[0], low.encode(states, catalog, vectors)[0]
    assert low.uses_bfloat16
    assert not np.array_equal(plain, rough)
    assert (plain * rough).sum(axis=1).min() > 0.999
    assert np.array_equal(exact.encode(states[:1], catalog, vectors)[0], low.encode(states[:1], catalog, vectors)[0])
    monkeypatch.setattr("candidate.encoder.LEAST_COSINE", 1.1)
    refused = UserEncoder(music.trained.towers, music.settings.features, bfloat16_from_users=2)
    assert not refused.uses_bfloat16
    assert np.array_equal(plain, refused.encode(states, catalog, vectors)[0])
