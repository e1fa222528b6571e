"""A release of made-up items for benchmarks of the candidate service: of any size, within seconds, without training.

Called by benchmarks/retrieve.py. The vectors lie in clusters, as learned ones do; the towers are of the serving size
and untrained, which costs the same. Invariant: the bundle is written and read by the code that writes and reads real
ones, so what is measured is what serves.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from candidate.co_visitation import CoVisitation
from candidate.history import kind_names
from candidate.index import ItemIndex, save_index
from candidate.towers import Towers, TowersConfig, save_towers
from core import bundle as names
from core.bundle import Manifest, ReleaseBundle, publish, staging_folder, write_delimited
from core.codec import from_ms
from core.settings import Settings
from features import item_stats, windows
from features.item_stats import ItemPartial
from features.transforms import stable_hash
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import Item

NOW_MS = 1_780_000_000_000
_CLUSTERS, _SPREAD = 256, 0.5
_CATEGORIES = 40
# Of the items, those that were ever clicked, and those that were published of late.
_CLICKED_SHARE, _NEW_SHARE = 0.3, 0.02
_CLICKS, _CLICKS_PER_USER = 100_000, 20
_MINUTE_MS, _DAY_MS = 60_000, 86_400_000

Floats = npt.NDArray[np.float32]


def clustered_vectors(count: int, dimension: int, rng: np.random.Generator) -> Floats:
    """Unit vectors [count, dimension] around some centres, which differ in size."""
    centres = rng.standard_normal((_CLUSTERS, dimension))
    sizes = 1 / np.arange(1, _CLUSTERS + 1) ** 0.5
    of = rng.choice(_CLUSTERS, count, p=sizes / sizes.sum())
    vectors = centres[of] + _SPREAD * rng.standard_normal((count, dimension)) * np.sqrt(2)
    units: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return units


def publish_world(registry: Path, count: int, settings: Settings, seed: int = 0) -> ReleaseBundle:
    """Makes and promotes a bundle of `count` items."""
    rng = np.random.default_rng(seed)
    vectors = clustered_vectors(count, settings.offline.dimension, rng)
    version = f"made-up-{count}"
    staged = staging_folder(registry, version)
    towers = _towers(settings, seed)
    save_towers(towers, staged)
    whose = {names.VECTORS_VERSION: towers.embedding_version}
    save_file({"vectors": vectors}, staged / names.ITEM_VECTORS, metadata=whose)
    write_delimited(staged / names.ITEMS, _items(count, rng))
    write_delimited(
        staged / names.ITEM_STATS,
        (
            item_stats.as_message(item_id(row), -1, partial, settings.features)
            for row, partial in _partials(count, settings, rng)
        ),
    )
    index = ItemIndex.build(vectors, np.arange(count), settings.candidate.exact_max_items, towers.embedding_version)
    save_index(index, staged / names.INDEX)
    _pairs(count, settings, rng).save(staged)
    manifest = Manifest(
        version, towers.embedding_version, f"i-{version}", "", "", NOW_MS, NOW_MS, vectors.shape[1], count
    )
    return publish(registry, staged, replace(manifest, log_id=settings.kafka.log_id))


def item_id(row: int) -> str:
    return f"item-{row:07d}"


def user_states(users: int, events: int, items: int, settings: Settings, seed: int = 1) -> list[UserState]:
    """States of `users` users with `events` clicks each on any of the items."""
    rng = np.random.default_rng(seed)
    states = []
    for user in range(users):
        state = UserState()
        for step, row in enumerate(rng.integers(0, items, events).tolist()):
            time_ms = NOW_MS - (events - step) * _MINUTE_MS
            event = UserEvent("", stable_hash(f"{user}/{step}"), item_id(row), "click", time_ms)
            windows.apply(state, [event], settings.features)
        states.append(state)
    return states


def _pairs(count: int, settings: Settings, rng: np.random.Generator) -> CoVisitation:
    """Co-visitation of users who click some items in a row."""
    pairs = CoVisitation(settings.candidate.co_visitation, settings.features)
    rows = rng.integers(0, count, _CLICKS).tolist()
    pairs.apply(
        UserEvent(f"user-{number // _CLICKS_PER_USER}", number, item_id(row), "click", NOW_MS - _DAY_MS + number)
        for number, row in enumerate(rows)
    )
    return pairs


def _towers(settings: Settings, seed: int) -> Towers:
    own = settings.offline
    torch.manual_seed(seed)
    config = TowersConfig(
        dimension=own.dimension,
        blocks=own.blocks,
        heads=own.heads,
        history_length=settings.features.history_length,
        kinds=kind_names(settings.features),
        item_ids=(),
    )
    return Towers(config).eval()


def _items(count: int, rng: np.random.Generator) -> Iterator[Item]:
    categories = rng.integers(0, _CATEGORIES, count).tolist()
    ages = (rng.random(count) * 1000 * _DAY_MS).astype(np.int64).tolist()
    is_new = (rng.random(count) < _NEW_SHARE).tolist()
    for row in range(count):
        yield Item(
            item_id=item_id(row),
            title=f"item {row}",
            categories=[f"category-{categories[row]}"],
            price=float(row % 500),
            labels={"brand": f"brand-{row % 97}"},
            publish_time=from_ms(NOW_MS - ages[row] // 100) if is_new[row] else None,
        )


def _partials(count: int, settings: Settings, rng: np.random.Generator) -> Iterator[tuple[int, ItemPartial]]:
    rows = rng.choice(count, int(_CLICKED_SHARE * count), replace=False)
    for row, age in zip(rows.tolist(), (rng.random(len(rows)) * 30 * _DAY_MS).astype(np.int64).tolist(), strict=True):
        partial = ItemPartial()
        item_stats.apply(partial, UserEvent("", 0, item_id(row), "click", NOW_MS - age), settings.features)
        yield row, partial
