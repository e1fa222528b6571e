"""Factories of tiny real processes, and a scrubbed environment."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from devstack.ports import Ports
from devstack.processes import ProcessSpec

TINY = Path(__file__).with_name("tiny_process.py")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("HEADRACE_") or name in ("REDIS_URL", "KAFKA_BOOTSTRAP_SERVERS"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    """Whatever a test does, nothing that it started is there afterwards."""
    me = psutil.Process()
    before = {child.pid for child in me.children(recursive=True)}
    yield
    left = [child for child in me.children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=5)
    for child in alive:
        child.kill()
    assert not alive, [child.cmdline() for child in alive if child.is_running()]


@pytest.fixture
def ports() -> Iterator[Ports]:
    held = Ports()
    yield held
    held.close()


@pytest.fixture
def tiny(ports: Ports) -> Callable[..., ProcessSpec]:
    def make(name: str, *arguments: str, **fields: Any) -> ProcessSpec:
        port = ports.take(name)
        command = (sys.executable, str(TINY), "--port", str(port), "--name", name, *arguments)
        return ProcessSpec(name, command, admin_port=port, **fields)

    return make


@pytest.fixture
def news() -> list[tuple[str, str]]:
    return []
