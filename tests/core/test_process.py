"""What freezing hides from the cyclic collector is found in an idle moment."""

import asyncio
import subprocess
import sys
from contextlib import suppress

import pytest

from core import process

# In a process of its own: it changes how Python collects.
_LEAK = """
import asyncio, gc, weakref
from core.process import collect_when_idle, freeze_survivors

class Node:
    pass

freeze_survivors(1000)
node = Node()
node.itself = node
gone = weakref.ref(node)
gc.collect(0)  # it outlives its first look
del node
gc.collect()
assert gone() is not None, "nothing to mend: the collector finds it by itself"
frozen = gc.get_freeze_count()

async def main():
    keeper = asyncio.create_task(collect_when_idle(lambda: True, every_seconds=0, look_seconds=0.01))
    while gone() is not None:
        await asyncio.sleep(0.01)
    keeper.cancel()

asyncio.run(asyncio.wait_for(main(), 20))
assert gc.get_freeze_count() >= frozen // 2, "the rest is frozen again"
"""


def test_a_cycle_that_was_frozen_before_it_lost_its_owner_goes() -> None:
    subprocess.run([sys.executable, "-c", _LEAK], check=True, timeout=60)


@pytest.mark.parametrize(
    ("idle", "every", "latest", "collects"),
    [(True, 0.0, 99.0, True), (False, 0.0, 99.0, False), (False, 0.0, 0.05, True), (True, 99.0, 99.0, False)],
    ids=["idle and due", "busy", "busy for too long", "not due"],
)
async def test_it_waits_for_an_idle_moment_but_not_for_ever(monkeypatch, idle, every, latest, collects) -> None:
    calls: list[str] = []
    enough = asyncio.Event()

    def collect() -> int:
        calls.append("collect")
        enough.set()
        return 0

    monkeypatch.setattr(process.gc, "unfreeze", lambda: None)
    monkeypatch.setattr(process.gc, "freeze", lambda: None)
    monkeypatch.setattr(process.gc, "collect", collect)
    answers = iter([idle] * 20)

    def is_idle() -> bool:
        answer = next(answers, None)
        if answer is None:
            enough.set()
        return bool(answer)

    how = {"every_seconds": every, "latest_seconds": latest, "look_seconds": 0.01}
    keeper = asyncio.create_task(process.collect_when_idle(is_idle, **how))
    await enough.wait()
    keeper.cancel()
    with suppress(asyncio.CancelledError):
        await keeper
    assert bool(calls) == collects
