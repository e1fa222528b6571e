"""A small simulated shop, one quick training of it, a world of tastes, and a real Redis, for all offline tests."""

import logging
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import structlog

from core.bundle import ReleaseBundle
from core.codec import from_ms
from core.settings import Settings, load_settings
from devstack.redis_server import redis_binary, redis_problem
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, IMPRESSIONS, ITEMS, to_table
from headrace.v1.events_pb2 import Event, Impression, ImpressionList, Item
from offline.data.simulator import SimulatorConfig, simulate

if TYPE_CHECKING:
    from offline.training.towers import TrainedTowers

END_MS = 1_780_000_000_000
# Of the world of tastes.
T0_MS, HOUR_MS = 1_700_000_000_000, 3_600_000
TASTES, ITEMS_PER_TASTE, DIMENSION = 4, 15, 16
QUICK = {
    "offline": {
        "dimension": 16,
        "max_epochs": 2,
        "ranker_epochs": 1,
        "ranker_max_rows": 4000,
        "batch_scores_per_user": 10,
        "popularity_items": 20,
    }
}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("HEADRACE_") or name in ("REDIS_URL", "KAFKA_BOOTSTRAP_SERVERS"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command sends all logs to its own stderr, which is closed when it is done."""
    before = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = before
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings(overrides=QUICK)


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    root = tmp_path_factory.mktemp("data") / "shop"
    simulate(SimulatorConfig(users=120, items=150, days=6, seed=11, end_time_ms=END_MS), root)
    return EventLog(root)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def bundle(shop: EventLog, settings: Settings, registry: Path) -> ReleaseBundle:
    from offline.train import train

    return train(shop.root, registry, settings, device="cpu", progress=False)


@pytest.fixture(scope="session")
def small() -> Settings:
    """Settings for a quick training of the ranker."""
    return load_settings(overrides={"offline": {"seed": 3, "ranker_epochs": 6, "ranker_max_rows": 20_000}})


@pytest.fixture(scope="session")
def tastes(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """A world with a planted preference: everybody clicks items of one taste.

    Vectors of items say the taste, the user tower knows nothing (its weights are random): `untrained_towers`.
    """
    log = EventLog(tmp_path_factory.mktemp("tastes"))
    rng = np.random.default_rng(2)
    items = [
        Item(item_id=f"{taste}-{number}", categories=[f"taste {taste}"], publish_time=from_ms(T0_MS - HOUR_MS))
        for taste in range(TASTES)
        for number in range(ITEMS_PER_TASTE)
    ]
    events, lists = [], []
    for user in range(120):
        taste, left = user % TASTES, rng.permutation(ITEMS_PER_TASTE).tolist()
        for step in range(10):
            time_ms = T0_MS + step * 5 * HOUR_MS + user * 1000
            liked = f"{taste}-{left.pop()}"
            others = [f"{int(rng.integers(TASTES))}-{int(rng.integers(ITEMS_PER_TASTE))}" for _ in range(7)]
            listed = list(dict.fromkeys(rng.permutation([liked, *others]).tolist()))
            if user % 2:
                impressions = [Impression(item_id=item, position=at, propensity=1) for at, item in enumerate(listed)]
                lists.append(
                    ImpressionList(
                        event_id=f"l{user}-{step}",
                        user_id=f"user-{user}",
                        event_time=from_ms(time_ms),
                        impressions=impressions,
                    )
                )
            clicked = [liked] if rng.random() < 0.9 else [others[0]]
            events.extend(
                Event(
                    event_id=f"e{user}-{step}",
                    user_id=f"user-{user}",
                    item_id=item_id,
                    kind="click",
                    event_time=from_ms(time_ms + 30_000),
                    categories=[f"taste {item_id.split('-')[0]}"],
                )
                for item_id in clicked
            )
    log.write(ITEMS, to_table(ITEMS, items), "items")
    log.write(EVENTS, to_table(EVENTS, events), "events")
    log.write(IMPRESSIONS, to_table(IMPRESSIONS, lists), "lists")
    return log


def untrained_towers(items: Sequence[Item], settings: Settings) -> "TrainedTowers":
    """Of the items of `tastes`."""
    import torch

    from candidate.history import kind_names
    from candidate.towers import Towers, TowersConfig
    from offline.training.towers import TrainedTowers

    torch.manual_seed(0)
    kinds = kind_names(settings.features)
    ids = tuple(item.item_id for item in items)
    towers = Towers(TowersConfig(DIMENSION, 1, 2, settings.features.history_length, kinds, ids)).eval()
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(TASTES, DIMENSION))
    vectors = np.array([centres[int(item.item_id[0])] + 0.5 * rng.normal(size=DIMENSION) for item in items], np.float32)
    return TrainedTowers(towers, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), {})


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([str(redis_binary()), *arguments], stdout=subprocess.DEVNULL) as server:
        while redis_problem(port) is not None:
            assert server.poll() is None
        yield f"redis://127.0.0.1:{port}/0"
        server.terminate()


@pytest.fixture
def online(redis_server: str) -> Settings:
    """Settings that name an empty Redis."""
    import redis

    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return load_settings(overrides={**QUICK, "redis": {"url": redis_server}})
