"""Calls over a real socket under pressure: queues, deadlines, cancellation, late sources, swaps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from candidate.encoder import UserEncoder
from candidate.executor import Job, WorkExecutor
from candidate.snapshot import Snapshot
from candidate.sources import NOTHING, Hits, Query, TrendingSource
from core.bundle import promote_version
from core.deadline import Deadline
from core.errors import OverloadedError, StageTimeoutError
from features import windows
from features.windows import UserState
from headrace.v1.candidate_service_pb2 import EncodeUsersRequest, UserToEncode

if TYPE_CHECKING:
    from conftest import Opener, OtherTowers, World

StateOf = Callable[..., UserState]


async def until(what: Callable[[], bool], timeout_seconds: float = 10) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not what():  # noqa: ASYNC110 - what happens on threads sets no event
            await asyncio.sleep(0.005)


class GatedSource:
    """Stands in front of a gate."""

    name = "ann"

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()

    def retrieve(self, _snapshot: Snapshot, _query: Query, _quota: int) -> Hits:
        self.begun.set()
        assert self.gate.wait(20)
        return NOTHING

    def place(self, _snapshot: Snapshot, _query: Query, _row: int) -> None:
        return None


class CountedSource(TrendingSource):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def retrieve(self, snapshot: Snapshot, query: Query, quota: int) -> Hits:
        self.calls += 1
        return super().retrieve(snapshot, query, quota)


def vector_of(music: World) -> dict[str, Any]:
    return {
        "embedding": music.trained.item_vectors[0].tolist(),
        "embedding_version": music.trained.towers.embedding_version,
    }


async def test_a_cancelled_retrieval_asks_no_further_source(opener: Opener, music: World) -> None:
    gated, counted = GatedSource(), CountedSource()
    running = await opener(executor=WorkExecutor(1, 4), sources=[gated, counted])
    call = asyncio.create_task(running.retrieve(**vector_of(music)))
    await until(gated.begun.is_set)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # The cancellation travels to the server; only then may the source come back.
    await until(lambda: running.executor.abandoned == 1)
    gated.gate.set()
    await until(lambda: running.executor.pending == 0)
    assert counted.calls == 0


async def test_a_cancelled_encoding_stops_after_its_batch(
    opener: Opener, state_of: StateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, batches = threading.Event(), []
    encode = UserEncoder.encode

    def counted(self: UserEncoder, states: list[UserState], *rest: Any) -> Any:
        batches.append(len(states))
        assert gate.wait(20)
        return encode(self, states, *rest)

    monkeypatch.setattr(UserEncoder, "encode", counted)
    running = await opener(executor=WorkExecutor(1, 4))
    users = [UserToEncode(user_id=f"u{n}", state=windows.encode(state_of("jazz-1"))) for n in range(1000)]
    call = asyncio.ensure_future(running.stub.EncodeUsers(EncodeUsersRequest(users=users), timeout=20))
    await until(lambda: bool(batches))
    call.cancel()
    await until(lambda: running.executor.abandoned == 1)
    gate.set()
    await until(lambda: running.executor.pending == 0)
    assert batches == [running.settings.candidate.encode_batch_users]


async def test_past_the_deadline_no_further_source_is_asked(opener: Opener, music: World) -> None:
    gated, counted = GatedSource(), CountedSource()
    running = await opener(executor=WorkExecutor(1, 4), sources=[gated, counted])
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await running.retrieve(**vector_of(music), timeout_seconds=0.3)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(gated.begun.is_set)
    await until(lambda: running.executor.abandoned == 1)
    gated.gate.set()
    await until(lambda: running.executor.pending == 0)
    assert counted.calls == 0


async def test_a_source_whose_budget_is_not_left_is_left_out_and_named(opener: Opener, music: World) -> None:
    """The others answer; a probe says it, too."""
    running = await opener(
        source_budget_ms={"ann": 60_000, "item_to_item": 1, "co_visitation": 1, "trending": 1, "new": 1}
    )
    response = await running.retrieve(**vector_of(music), probe_item_ids=["jazz-0"], num_candidates=1)
    assert list(response.missing_sources) == ["ann"]
    assert response.candidates
    if response.candidates[0].item_id != "jazz-0":
        assert "late or failed" in response.probes[0].decided_by or "num_candidates" in response.probes[0].decided_by
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await running.retrieve(**vector_of(music), source_quotas={"ann": 5})
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "ann" in (late.value.details() or "")


async def test_a_full_service_says_so_at_once_and_recovers(opener: Opener, music: World) -> None:
    gated = GatedSource()
    running = await opener(executor=WorkExecutor(1, 1), sources=[gated])
    calls = [asyncio.create_task(running.retrieve(**vector_of(music))) for _ in range(2)]
    await until(lambda: running.executor.pending == 2)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.retrieve(**vector_of(music))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    gated.gate.set()
    await asyncio.gather(*calls)
    await running.retrieve(**vector_of(music))


async def test_a_swap_under_load_fails_no_call_and_mixes_no_versions(
    opener: Opener, other_towers: OtherTowers, state_of: StateOf, music: World
) -> None:
    """Two bundles of different towers change places while calls bring a vector of the first one."""
    registry, versions = other_towers
    promote_version(registry, "v1")
    running = await opener(registry=registry)
    state = state_of("jazz-1", "jazz-2")
    stored = {**vector_of(music), "embedding_revision": state.revision}
    answers: list[tuple[str, str, str, bool]] = []
    stop = asyncio.Event()

    async def ask() -> None:
        while not stop.is_set():
            response = await running.retrieve(state, **stored)
            assert len(response.candidates) == 30
            said = (response.bundle_version, response.index_version, response.embedding_version)
            answers.append((*said, response.encoded_on_the_spot))

    callers = [asyncio.create_task(ask()) for _ in range(4)]
    watching = asyncio.create_task(running.snapshots.watch())
    for version in ("v2", "v1", "v2"):
        promote_version(registry, version)
        await until(lambda version=version: running.snapshots.current.manifest.bundle_version == version, 30)
        seen = len(answers)
        await until(lambda seen=seen: len(answers) > seen + 8, 30)
    stop.set()
    await asyncio.gather(*callers)
    watching.cancel()
    assert set(answers) == {
        ("v1", "i-v1", versions["v1"], False),
        # A vector of the other towers never meets this index: the user is encoded from the history.
        ("v2", "i-v2", versions["v2"], True),
    }


async def test_a_full_queue_refuses_and_recovers() -> None:
    executor = WorkExecutor(1, 1)
    gate, begun = threading.Event(), []

    def work(_: Job) -> None:
        begun.append(1)
        gate.wait(10)

    calls = [asyncio.create_task(executor.run(Deadline.after_ms(10_000), work)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await executor.run(Deadline.after_ms(1000), work)
    gate.set()
    await asyncio.gather(*calls)
    await executor.run(Deadline.after_ms(1000), work)
    assert len(begun) == 3
    executor.close()


async def test_work_whose_call_is_over_is_not_begun() -> None:
    executor = WorkExecutor(1, 8)
    gate, begun = threading.Event(), []
    first = asyncio.create_task(executor.run(Deadline.after_ms(10_000), lambda _: gate.wait(10)))
    cancelled = asyncio.create_task(executor.run(Deadline.after_ms(10_000), lambda _: begun.append("cancelled")))
    expired = asyncio.create_task(executor.run(Deadline.after_ms(0), lambda _: begun.append("expired")))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    gate.set()
    await first
    with pytest.raises(StageTimeoutError):
        await expired
    assert not begun
    executor.close()
