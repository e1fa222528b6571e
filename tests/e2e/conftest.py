"""One real stack for all end-to-end tests: simulated data, a small training, every process, real sockets."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.settings import load_settings
from devstack.backend import Backend, EventSender
from devstack.demo_data import DemoData, active_users, prepare
from devstack.stack import Stack
from features.stores.online import OnlineStore
from offline.materialize import materialize
from offline.train import train

# Enough to rank by, little enough for a minute.
QUICK_TRAINING = {"offline": {"max_epochs": 3, "ranker_epochs": 1, "ranker_max_rows": 20_000}}


@dataclass
class Running:
    """The stack, its data, and clients of it."""

    stack: Stack
    data: DemoData
    users: list[str]
    backend: Backend
    sender: EventSender

    def store(self) -> OnlineStore:
        settings = self.stack.settings
        return OnlineStore(settings.redis, settings.features.project)

    def await_until(self, condition, timeout_seconds: float = 20):
        """Asks again and again; returns the first true answer, fails in one line when there is none in time."""
        end = time.monotonic() + timeout_seconds
        while not (result := condition()):
            assert time.monotonic() < end, f"{condition} did not come true in {timeout_seconds} s"
            time.sleep(0.02)
        return result


@pytest.fixture(scope="session")
def running(tmp_path_factory) -> Iterator[Running]:
    home: Path = tmp_path_factory.mktemp("stack")
    os.environ.pop("HEADRACE_CONFIG", None)
    data = prepare("simulated", None, home / "dataset", users=300, items=300, seed=3)
    bundle = train(
        data.root, home / "bundles", load_settings(overrides=QUICK_TRAINING), before_ms=data.split_ms, progress=False
    )
    with Stack(home, bundles=home / "bundles") as stack:
        materialize(data.root, bundle, stack.settings, before_ms=data.split_ms, progress=False)
        sender = EventSender(stack.settings)
        backend = Backend(stack.address("serving"))
        users = active_users(data.log, data.split_ms, 60, 3)
        yield Running(stack, data, users, backend, sender)
        backend.close()
        sender.close()
