"""A tiny world with four tastes, and a bundle of it made by the real trainer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from candidate.index import ItemIndex, save_index
from core import bundle as names
from core.bundle import Manifest, ReleaseBundle, publish, staging_folder, write_delimited
from core.codec import from_ms
from core.settings import Settings, load_settings
from features import item_stats, windows
from features.item_stats import ItemPartial
from features.stores.erasures import UnerasedLog
from features.stores.event_log import user_events
from features.stores.event_rows import EVENTS, ITEMS, to_table
from features.transforms import stable_hash
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import Event, Item
from offline.co_visitation import learn_co_visitation
from offline.training.towers import TrainedTowers, train_towers

T0_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
GENRES = ("jazz", "metal", "folk", "techno")
ITEMS_PER_GENRE, USERS, EVENTS_PER_USER = 20, 160, 24


def genre_item(item_id: str, genre: str, **more: object) -> Item:
    return Item(item_id=item_id, title=f"{genre} record {item_id}", categories=[genre], **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class World:
    settings: Settings
    log: UnerasedLog
    items: list[Item]
    trained: TrainedTowers
    bundle: ReleaseBundle

    @property
    def registry(self) -> Path:
        return self.bundle.path.parent


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings(
        None,
        {
            "offline": {"dimension": 32, "max_epochs": 6, "batch_size": 32},
            "kafka": {"bootstrap_servers": "127.0.0.1:1", "log_id": "test"},
            "candidate": {"port": 0, "admin_port": 0},
        },
    )


@pytest.fixture(scope="session")
def music(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> World:
    """Users who like one genre each, 10% of the time another; a trained and published bundle."""
    root = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(5)
    items = [
        genre_item(
            f"{genre}-{n}",
            genre,
            year=1980 + n,
            price=5.0 + n,
            labels={"label": f"label-{n % 2}"},
            publish_time=from_ms(T0_MS + n * HOUR_MS) if n >= ITEMS_PER_GENRE - 3 else None,
        )
        for genre in GENRES
        for n in range(ITEMS_PER_GENRE)
    ]
    events = []
    for user in range(USERS):
        for step in range(EVENTS_PER_USER):
            genre = GENRES[user % 4] if rng.random() < 0.9 else GENRES[int(rng.integers(4))]
            events.append(
                Event(
                    event_id=f"{user}-{step}",
                    user_id=f"user-{user}",
                    item_id=f"{genre}-{int(rng.integers(ITEMS_PER_GENRE))}",
                    kind="click",
                    event_time=from_ms(T0_MS + step * HOUR_MS + user * 1000),
                    categories=[genre],
                )
            )
    log = UnerasedLog(root / "log")
    log.write(ITEMS, to_table(ITEMS, items), "items")
    log.write(EVENTS, to_table(EVENTS, events), "events")
    items = list(log.items())
    trained = train_towers(log, items, settings, root / "work", progress=False)
    bundle = publish_bundle(root / "bundles", "v1", root / "work", items, trained, log, settings)
    return World(settings, log, items, trained, bundle)


def publish_bundle(
    registry: Path,
    version: str,
    work: Path,
    items: list[Item],
    trained: TrainedTowers,
    log: UnerasedLog,
    settings: Settings,
) -> ReleaseBundle:
    staged = staging_folder(registry, version)
    for name in (names.TOWERS, names.TOWERS_CONFIG, names.ITEM_VECTORS):
        (staged / name).write_bytes((work / name).read_bytes())
    write_delimited(staged / names.ITEMS, items)
    partials: dict[str, ItemPartial] = {}
    for event in user_events(log.events()):
        item_stats.apply(partials.setdefault(event.item_id, ItemPartial()), event, settings.features)
    stats = [item_stats.as_message(item_id, -1, partial, settings.features) for item_id, partial in partials.items()]
    write_delimited(staged / names.ITEM_STATS, stats)
    embedding_version = trained.towers.embedding_version
    index = ItemIndex.build(trained.item_vectors, np.arange(len(items)), 1000, embedding_version)
    save_index(index, staged / names.INDEX)
    learn_co_visitation(log, settings, T0_MS + EVENTS_PER_USER * HOUR_MS).save(staged)
    dimension = trained.item_vectors.shape[1]
    manifest = Manifest(version, embedding_version, f"i-{version}", "", "", T0_MS, T0_MS, dimension, len(items))
    return publish(registry, staged, replace(manifest, log_id="test"))


@pytest.fixture(scope="session")
def state_of(settings: Settings) -> Callable[..., UserState]:
    """A state from the items that a user clicked, oldest first."""

    def make(*item_ids: str, kind: str = "click") -> UserState:
        state = UserState()
        for step, item_id in enumerate(item_ids):
            event = UserEvent("u", stable_hash(f"{item_id}/{step}"), item_id, kind, T0_MS + step * 60_000)
            windows.apply(state, [event], settings.features)
        return state

    return make
