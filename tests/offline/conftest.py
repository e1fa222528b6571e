"""A small simulated shop, one quick training of it, and a real Redis, for all offline tests."""

import logging
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from core.bundle import ReleaseBundle
from core.settings import Settings, load_settings
from devstack.redis_server import redis_binary, redis_problem
from features.stores.event_log import EventLog
from offline.data.simulator import SimulatorConfig, simulate

END_MS = 1_780_000_000_000
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
