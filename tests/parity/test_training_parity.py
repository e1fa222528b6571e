"""No skew: the features of a training row equal those of a request, bit by bit.

One side replays the log, as training does. The other decodes the user's row from a real Redis and loads the
catalogue from a bundle's files, as ranker and candidate do.
"""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from core import bundle as names
from core.bundle import open_bundle, write_delimited
from core.settings import Settings, load_settings
from devstack.redis_server import redis_binary, redis_problem
from features import windows
from features.catalog import Catalog
from features.definitions import ITEM_STATS, USER_STATE
from features.stores.event_log import EventLog
from features.stores.online import OnlineStore
from features.vectors import SOURCES, ranker_input
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import ItemStats
from offline.data.simulator import SimulatorConfig, simulate
from offline.logs import read_items
from offline.materialize import materialize
from offline.replay import Replay, read_entries
from offline.train import train

END_MS = 1_780_000_000_000
TINY = {"offline": {"dimension": 8, "max_epochs": 1, "ranker_epochs": 1, "ranker_max_rows": 1000}}
HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    folder = tmp_path_factory.mktemp("redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([str(redis_binary()), *arguments], stdout=subprocess.DEVNULL) as server:
        while redis_problem(port) is not None:
            assert server.poll() is None
        yield load_settings(overrides={**TINY, "redis": {"url": f"redis://127.0.0.1:{port}/0"}})
        server.terminate()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    root = tmp_path_factory.mktemp("data") / "shop"
    simulate(SimulatorConfig(users=80, items=120, days=4, seed=5, end_time_ms=END_MS), root)
    return EventLog(root)


@pytest.fixture(scope="module")
def replay(log: EventLog, settings: Settings) -> Replay:
    """As training sees the log at its end."""
    replay = Replay(read_items(log), settings.features)
    replay.advance(read_entries(log))
    return replay


def loaded(items, stats, settings: Settings) -> Catalog:
    """As every service loads a bundle."""
    catalog = Catalog(settings.features)
    for item in items:
        catalog.upsert(item)
    for one in stats:
        catalog.put_stats(one)
    return catalog


def from_store(users: list[str], settings: Settings) -> list[UserState]:
    """As a request gets the states."""
    store = OnlineStore(settings.redis, settings.features.project)
    rows = store.read(USER_STATE, [(user,) for user in users])
    store.close()
    return [windows.decode(row.cells["state"]) for row in rows]


def assert_same_features(
    training: tuple[Catalog, UserState], request: tuple[Catalog, UserState], now_ms, settings, rng
):
    rows = rng.permutation(len(training[0]))[:60].astype(np.int32)
    rows[-1] = -1
    scores = rng.random(60).astype(np.float32)
    bits = rng.integers(0, 1 << len(SOURCES), 60).astype(np.int32)
    one, two = (
        ranker_input(state, catalog, rows, scores, bits, now_ms, settings.features)
        for catalog, state in (training, request)
    )
    for field in one.__slots__:
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field), err_msg=field)
    return one


def test_a_training_row_equals_a_request_from_redis_and_a_bundle(log, settings, replay, tmp_path):
    bundle = train(log.root, tmp_path / "bundles", settings, device="cpu", progress=False)
    materialize(log.root, bundle, settings, progress=False)
    opened = open_bundle(bundle.path)
    catalog = loaded(opened.items(), opened.item_stats(), settings)
    assert catalog.item_ids == replay.catalog.item_ids
    rng = np.random.default_rng(3)
    users = sorted(replay.states)
    for user, state in zip(users, from_store(users, settings), strict=True):
        for hours in (0, 1, 30):
            now_ms = replay.watermark_ms + hours * HOUR_MS
            made = assert_same_features((replay.catalog, replay.states[user]), (catalog, state), now_ms, settings, rng)
            assert np.isfinite(made.candidates).all()
    assert len(users) > 50


def test_the_statistics_in_the_store_give_the_same_catalogue(log, settings, replay):
    materialize(log.root, None, settings, progress=False)
    store = OnlineStore(settings.redis, settings.features.project)
    rows = store.read(ITEM_STATS, [(item_id, "-1") for item_id in replay.catalog.item_ids])
    store.close()
    stats = [ItemStats.FromString(row.cells["stats"]) for row in rows if row.cells]
    catalog = loaded(read_items(log), stats, settings)
    for name in ("impressions", "clicks", "log2_popularity", "stats_revision"):
        np.testing.assert_array_equal(catalog.column(name), replay.catalog.column(name), err_msg=name)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_it_holds_in_the_middle_of_the_log_too(log, settings, tmp_path: Path, share: float):
    """Training reads its rows from a replay that goes on; a request sees the store as it was at that time."""
    entries = list(read_entries(log))
    asked = [entry.time_ms for entry in entries if isinstance(entry, UserEvent)]
    before_ms = asked[int(len(asked) * share)]
    with redis.Redis.from_url(settings.redis.url.get_secret_value()) as client:
        client.flushall()
    materialize(log.root, None, settings, before_ms=before_ms, progress=False)
    running = Replay(read_items(log), settings.features)
    groups = running.groups(entries)
    group = next(group for group in groups if group.time_ms >= before_ms)
    write_delimited(tmp_path / names.ITEM_STATS, running.item_stats())
    catalog = loaded(read_items(log), names.read_delimited(tmp_path / names.ITEM_STATS, ItemStats), settings)
    users = sorted(running.states)
    rng = np.random.default_rng(4)
    for user, state in zip(users, from_store(users, settings), strict=True):
        assert_same_features((running.catalog, running.state(user)), (catalog, state), group.time_ms, settings, rng)
