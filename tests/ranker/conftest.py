"""A small catalogue, states over it, and bundles with a ranker that was not trained (its shapes are the real ones)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from core import bundle as names
from core.bundle import Manifest, ReleaseBundle, publish, staging_folder, write_delimited
from core.settings import Settings, load_settings
from features import item_stats, windows
from features.catalog import Catalog
from features.item_stats import ItemPartial
from features.transforms import stable_hash
from features.vectors import SIGNATURE, RankerInput, ranker_input
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import Item, ItemStats
from ranker.calibration import Calibration, Platt, save_calibration
from ranker.model import RankerConfig, RankerModel, save_ranker
from ranker.scorer import Scorer

T0_MS = 1_700_000_000_000
DIMENSION, ITEMS = 16, 40
HEADS = ("click", "conversion", "value")


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings(
        None,
        {
            "kafka": {"bootstrap_servers": "127.0.0.1:1", "log_id": "test"},
            "ranker": {"port": 0, "admin_port": 0, "device": "cpu"},
        },
    )


def an_item(number: int) -> Item:
    return Item(item_id=f"item-{number}", title=f"Item {number}", categories=[f"taste-{number % 4}"], price=number)


def some_stats(number: int, settings: Settings) -> ItemStats:
    partial = ItemPartial()
    for count in range(number % 7):
        event = UserEvent("u", count, f"item-{number}", "click", T0_MS + count)
        item_stats.apply(partial, event, settings.features)
    return item_stats.as_message(f"item-{number}", -1, partial, settings.features)


def some_vectors() -> np.ndarray:
    vectors = np.random.default_rng(3).normal(size=(ITEMS, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def some_model(seed: int = 0) -> RankerModel:
    torch.manual_seed(seed)
    return RankerModel(RankerConfig(DIMENSION, trained_heads=HEADS)).eval()


@pytest.fixture
def catalog(settings: Settings) -> Catalog:
    catalog = Catalog(settings.features)
    for number in range(ITEMS):
        catalog.upsert(an_item(number))
        catalog.put_stats(some_stats(number, settings))
    return catalog


@pytest.fixture
def scorer(catalog: Catalog) -> Scorer:
    calibration = Calibration({"click": Platt(0.8, -1.0)}, "sampled")
    return Scorer(some_model(), some_vectors(), catalog.column("categories"), calibration)


@pytest.fixture(scope="session")
def state_of(settings: Settings) -> Callable[..., UserState]:
    """A state from the numbers of the items that a user clicked, oldest first, a minute apart."""

    def make(*numbers: int) -> UserState:
        state = UserState()
        for step, number in enumerate(numbers):
            event = UserEvent(
                "u",
                stable_hash(f"{number}/{step}"),
                f"item-{number}",
                "click",
                T0_MS + step * 60_000,
                categories=(f"taste-{number % 4}",),
            )
            windows.apply(state, [event], settings.features)
        return state

    return make


@pytest.fixture
def input_of(catalog: Catalog, settings: Settings) -> Callable[..., RankerInput]:
    """Model input of a state and candidates by number; a number that is no item's is unknown."""

    def make(state: UserState, *numbers: int) -> RankerInput:
        rows = catalog.rows(f"item-{number}" for number in numbers)
        scores = np.linspace(0.9, 0.1, len(rows), dtype=np.float32)
        bits = np.ones(len(rows), np.int32)
        return ranker_input(state, catalog, rows, scores, bits, T0_MS + 3_600_000, settings.features)

    return make


@pytest.fixture
def make_bundle(tmp_path: Path, settings: Settings) -> Callable[..., ReleaseBundle]:
    """Publishes a bundle into `tmp_path / "bundles"`; `change` may alter the files before they are sealed."""

    def make(
        version: str = "v1", *, seed: int = 0, promote: bool = True, change: Callable[[Path], None] | None = None
    ) -> ReleaseBundle:
        registry = tmp_path / "bundles"
        staged = staging_folder(registry, version)
        write_delimited(staged / names.ITEMS, [an_item(number) for number in range(ITEMS)])
        write_delimited(staged / names.ITEM_STATS, [some_stats(number, settings) for number in range(ITEMS)])
        save_file({"vectors": some_vectors()}, staged / names.ITEM_VECTORS)
        model = save_ranker(some_model(seed), staged)
        save_calibration(Calibration({"click": Platt()}, "sampled"), staged)
        if change is not None:
            change(staged)
        manifest = Manifest(
            bundle_version=version,
            embedding_version="e1",
            index_version="i1",
            model_version=model.config.model_version,
            feature_signature=SIGNATURE,
            created_time_ms=T0_MS,
            data_watermark_ms=T0_MS,
            dimension=DIMENSION,
            item_count=ITEMS,
            metrics={"ranker_auc": 0.75},
            log_id="test",
        )
        return publish(registry, staged, manifest, promote=promote)

    return make


@pytest.fixture
def registry_settings(tmp_path: Path, settings: Settings) -> Settings:
    """The settings, with the registry of `make_bundle`."""
    registry = {"path": str(tmp_path / "bundles"), "watch_interval_ms": 20}
    return load_settings(
        None,
        {
            "kafka": settings.kafka.model_dump(),
            "ranker": settings.ranker.model_dump(),
            "registry": registry,
        },
    )
