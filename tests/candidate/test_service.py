"""CandidateService over a real socket, on a bundle of the real trainer."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from candidate.bootstrap import SERVICE, make_sources
from candidate.executor import Job, WorkExecutor
from candidate.feed import Snapshots
from candidate.retriever import Retriever
from candidate.service import CandidateService
from candidate.snapshot import load_snapshot
from core.clock import SystemClock
from core.codec import from_ms
from core.deadline import Deadline
from core.errors import ArtifactError, OverloadedError, StageTimeoutError
from core.grpc_runtime import GrpcServer, channel
from core.kafka import Record
from core.settings import Settings
from core.topics import Topics
from features import windows
from features.windows import UserState
from headrace.v1.candidate_service_pb2 import (
    EncodeUsersRequest,
    GetIndexInfoRequest,
    RetrieveCandidatesRequest,
    RetrieveCandidatesResponse,
    UserToEncode,
)
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub, add_CandidateServiceServicer_to_server
from headrace.v1.events_pb2 import Event, Item
from headrace.v1.types_pb2 import ItemFilter, LabelMatch, NumberRange

if TYPE_CHECKING:
    from conftest import World

StateOf = Callable[..., UserState]


@dataclass
class Running:
    """A service, its client, and the hand that plays Kafka."""

    stub: Any
    snapshots: Snapshots
    settings: Settings

    def put(self, item: Item) -> None:
        self.snapshots.feeds.catalog.apply([self._record(item.item_id, item.SerializeToString())])

    def remove(self, item_id: str) -> None:
        self.snapshots.feeds.catalog.apply([self._record(item_id, None)])

    def tell(self, offset: int, event: Event) -> None:
        """One message of the events topic."""
        assert self.snapshots.feeds.events is not None
        topic = Topics(self.settings.kafka.topic_prefix).events
        self.snapshots.feeds.events.resume()
        self.snapshots.feeds.events.apply([Record(topic, b"u", event.SerializeToString(), None, 0, offset)])

    def _record(self, item_id: str, value: bytes | None) -> Record:
        topic = Topics(self.settings.kafka.topic_prefix).items
        return Record(topic, item_id.encode(), value, None, 0, 0)

    async def retrieve(self, state: UserState | bytes | None = None, **more: Any) -> RetrieveCandidatesResponse:
        request: dict[str, Any] = {"user_id": "u", "num_candidates": 30, **more}
        if state is not None:
            request["state"] = state if isinstance(state, bytes) else windows.encode(state)
        return await self.stub.RetrieveCandidates(RetrieveCandidatesRequest(**request), timeout=10)


@pytest.fixture
async def running(music: World) -> AsyncIterator[Running]:
    registry = {"path": music.registry}
    settings = music.settings.model_copy(update={"registry": music.settings.registry.model_copy(update=registry)})
    snapshots = Snapshots(settings)
    executor = WorkExecutor(2, 16)
    server = GrpcServer("127.0.0.1", 0, [SERVICE])
    service = CandidateService(snapshots, Retriever(settings, make_sources(), SystemClock()), executor)
    add_CandidateServiceServicer_to_server(service, server.aio)
    await server.start()
    async with channel(f"127.0.0.1:{server.port}") as connection:
        yield Running(CandidateServiceStub(connection), snapshots, settings)
    await server.stop(0)
    executor.close()


def ids(response: RetrieveCandidatesResponse) -> list[str]:
    return [candidate.item_id for candidate in response.candidates]


def genres(response: RetrieveCandidatesResponse, source: str) -> list[str]:
    """Genres of what a source brought, in its order."""
    ranked = [(p.rank, c.item_id) for c in response.candidates for p in c.provenance if p.source == source]
    return [item_id.split("-")[0] for _, item_id in sorted(ranked)]


async def test_candidates_follow_the_taste_and_say_where_they_come_from(running: Running, state_of: StateOf) -> None:
    response = await running.retrieve(state_of("folk-1", "folk-2", "folk-3"))
    assert len(response.candidates) == 30
    assert len(set(ids(response))) == 30
    assert genres(response, "ann")[:8].count("folk") >= 7
    assert genres(response, "item_to_item")[:3] == ["folk"] * 3
    assert response.encoded_on_the_spot
    assert response.bundle_version == "v1"
    assert response.index_version == "i-v1"
    assert not response.missing_sources
    sources = {p.source for candidate in response.candidates for p in candidate.provenance}
    assert sources == {"ann", "item_to_item", "co_visitation", "trending", "new"}


async def test_a_user_without_history_gets_what_trends_and_what_is_new(running: Running) -> None:
    response = await running.retrieve()
    assert len(response.candidates) == 30
    assert {p.source for candidate in response.candidates for p in candidate.provenance} == {"trending", "new"}
    assert not response.encoded_on_the_spot


async def test_a_stored_vector_counts_only_while_it_is_current(
    running: Running, state_of: StateOf, music: World
) -> None:
    state = state_of("jazz-1", "jazz-2")
    version = running.snapshots.current.embedding_version
    metal = music.trained.item_vectors[[item.item_id for item in music.items].index("metal-3")].tolist()
    stored = {"embedding": metal, "embedding_version": version, "embedding_revision": state.revision}
    used = await running.retrieve(state, **stored)
    assert not used.encoded_on_the_spot
    assert genres(used, "ann")[0] == "metal"
    for change in ({"embedding_version": "e0"}, {"embedding_revision": state.revision - 1}):
        encoded = await running.retrieve(state, **{**stored, **change})
        assert encoded.encoded_on_the_spot
        assert genres(encoded, "ann")[0] == "jazz"


async def test_filters_act_inside_the_search(running: Running, state_of: StateOf) -> None:
    state = state_of("folk-1", "folk-2")
    jazz = await running.retrieve(state, filter=ItemFilter(categories_any=["jazz"]), num_candidates=20)
    assert sorted(ids(jazz)) == sorted(f"jazz-{n}" for n in range(20))
    narrow = ItemFilter(
        categories_none=["jazz", "metal"],
        ranges=[NumberRange(name="year", min=1985, max=1988), NumberRange(name="price", max=12.5)],
        labels=[LabelMatch(name="label", values=["label-1"])],
        exclude_item_ids=["folk-7"],
    )
    some = await running.retrieve(state, filter=narrow)
    assert sorted(ids(some)) == ["folk-5", "techno-5", "techno-7"]
    assert not (await running.retrieve(state, filter=ItemFilter(categories_any=["opera"]))).candidates


async def test_what_the_user_has_seen_can_be_left_out(running: Running, state_of: StateOf) -> None:
    state = state_of("folk-1", "folk-2")
    assert "folk-1" in ids(await running.retrieve(state, num_candidates=80))
    assert not {"folk-1", "folk-2"} & set(ids(await running.retrieve(state, num_candidates=80, exclude_seen=True)))


async def test_quotas_of_the_request_are_taken_literally(running: Running, state_of: StateOf) -> None:
    response = await running.retrieve(state_of("folk-1"), source_quotas={"ann": 5, "new": 2})
    counts = [p.source for candidate in response.candidates for p in candidate.provenance]
    assert (counts.count("ann"), counts.count("new"), len(counts)) == (5, 2, 7)


async def test_a_new_item_is_found_by_its_content_and_a_removed_one_is_gone(
    running: Running, state_of: StateOf
) -> None:
    state = state_of("techno-1", "techno-2")
    published = from_ms(1_710_000_000_000)
    running.put(Item(item_id="fresh", title="techno record", categories=["techno"], publish_time=published))
    response = await running.retrieve(state, filter=ItemFilter(categories_any=["techno"]))
    fresh = next(candidate for candidate in response.candidates if candidate.item_id == "fresh")
    assert {p.source for p in fresh.provenance} >= {"ann", "item_to_item", "new"}
    assert next(p.rank for p in fresh.provenance if p.source == "new") == 0
    info = await running.stub.GetIndexInfo(GetIndexInfoRequest())
    assert (info.main_item_count, info.delta_item_count, info.tombstone_count, info.dimension) == (81, 0, 0, 32)
    # Its history may hold it at once.
    known = await running.retrieve(state_of("fresh"))
    assert genres(known, "ann")[:5].count("techno") >= 4
    for item_id in ("fresh", "techno-5"):
        running.remove(item_id)
        assert item_id not in ids(await running.retrieve(state, filter=ItemFilter(categories_any=["techno"])))
    running.put(Item(item_id="techno-5", title="techno record", categories=["jazz"]))
    assert "techno-5" in ids(await running.retrieve(state, filter=ItemFilter(categories_any=["jazz"])))
    assert "techno-5" not in ids(await running.retrieve(state, filter=ItemFilter(categories_any=["techno"])))


async def test_items_that_go_together_are_learnt_from_events(running: Running, state_of: StateOf) -> None:
    """Items of two genres, so that no vector could know."""
    running.put(Item(item_id="encore", title="opera record", categories=["opera"]))
    now_ms = time.time_ns() // 1_000_000
    for n in range(40):
        for step, item_id in enumerate(("jazz-1", "encore")):
            at = from_ms(now_ms + step)
            running.tell(
                2 * n + step,
                Event(event_id=f"{n}/{step}", user_id=f"v{n}", item_id=item_id, kind="click", event_time=at),
            )
    response = await running.retrieve(state_of("jazz-1"), source_quotas={"co_visitation": 10})
    assert ids(response)[0] == "encore"
    (first,) = response.candidates[0].provenance
    assert (first.source, first.rank) == ("co_visitation", 0)
    assert 0 < first.score < 1
    assert "encore" not in ids(
        await running.retrieve(
            state_of("jazz-1"),
            source_quotas={"co_visitation": 10},
            filter=ItemFilter(exclude_item_ids=["encore"]),
        )
    )


async def test_items_outside_their_time_are_not_retrieved(running: Running, state_of: StateOf) -> None:
    state, now_ms = state_of("techno-1"), time.time_ns() // 1_000_000
    techno = ItemFilter(categories_any=["techno"])
    running.put(Item(item_id="early", categories=["techno"], publish_time=from_ms(now_ms + 60_000)))
    running.put(Item(item_id="late", categories=["techno"], expire_time=from_ms(now_ms - 60_000)))
    running.put(Item(item_id="off", categories=["techno"], available=False))
    assert not {"early", "late", "off"} & set(ids(await running.retrieve(state, filter=techno)))
    then = await running.retrieve(state, filter=techno, context={"as_of_time": from_ms(now_ms + 120_000)})
    assert "early" in ids(then)


async def test_broken_messages_are_left_out_and_the_rest_applied(running: Running) -> None:
    topic = Topics(running.settings.kafka.topic_prefix).items
    broken = Record(topic, b"x", b"\xff\xff\xff", None, 0, 0)
    good = Record(topic, b"good", Item(item_id="good", categories=["jazz"]).SerializeToString(), None, 0, 1)
    running.snapshots.feeds.catalog.apply([broken, good])
    assert running.snapshots.current.catalog.row("good") >= 0


async def test_users_are_encoded_in_batches_and_in_order(running: Running, state_of: StateOf) -> None:
    states = [state_of(f"jazz-{n % 20}", f"metal-{n % 7}") for n in range(150)] + [state_of("unheard-of"), UserState()]
    users = [UserToEncode(user_id=f"u{n}", state=windows.encode(state)) for n, state in enumerate(states)]
    response = await running.stub.EncodeUsers(EncodeUsersRequest(users=users), timeout=10)
    assert [user.user_id for user in response.users] == [f"u{n}" for n in range(152)]
    assert [user.revision for user in response.users] == [state.revision for state in states]
    assert [len(user.embedding) for user in response.users] == [32] * 150 + [0, 0]
    assert response.embedding_version == running.snapshots.current.embedding_version
    snapshot = running.snapshots.current
    alone, _ = snapshot.encoder.encode(states[77:78], snapshot.catalog, snapshot.vectors)
    assert np.allclose(response.users[77].embedding, alone[0], atol=1e-5)


async def test_probes_say_what_let_an_item_in_or_kept_it_out(running: Running, state_of: StateOf) -> None:
    response = await running.retrieve(
        state_of("folk-1", "folk-2"),
        filter=ItemFilter(categories_none=["metal"]),
        num_candidates=5,
        exclude_seen=True,
        probe_item_ids=["nowhere", "metal-1", "folk-1", "jazz-1", "folk-9"],
    )
    probes = {probe.item_id: probe for probe in response.probes}
    assert not probes["nowhere"].known
    assert probes["metal-1"].decided_by == "filter.categories_none"
    assert probes["folk-1"].decided_by == "exclude_seen"
    for item_id in ("jazz-1", "folk-9"):
        is_in = item_id in ids(response)
        assert probes[item_id].decided_by.startswith("source" if is_in else ("quota", "num_candidates"))
    assert probes["folk-9"].exact_rank < probes["jazz-1"].exact_rank


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"user_id": "x" * 129}, "user_id"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"num_candidates": 1_000_000}, "num_candidates"),
        ({"state": b"\xff\xff"}, "state"),
        ({"embedding": [math.nan] * 32}, "embedding"),
        ({"embedding": [1.0] * 3, "embedding_version": "OURS"}, "embedding"),
        ({"filter": ItemFilter(ranges=[NumberRange(name="height")])}, "filter.ranges[0].name"),
        ({"filter": ItemFilter(ranges=[NumberRange(name="year", min=2, max=1)])}, "filter.ranges[0]"),
        ({"filter": ItemFilter(labels=[LabelMatch(name="colour", values=["red"])])}, "filter.labels[0].name"),
        ({"filter": ItemFilter(exclude_item_ids=["x"] * 10_001)}, "filter.exclude_item_ids"),
        ({"source_quotas": {"magic": 3}}, "source_quotas"),
        ({"source_quotas": {"ann": 3000}}, "source_quotas[ann]"),
        ({"probe_item_ids": ["x"] * 101}, "probe_item_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_bad_requests_are_refused_by_field(running: Running, change: dict[str, Any], field: str) -> None:
    if change.get("embedding_version") == "OURS":
        change = {**change, "embedding_version": running.snapshots.current.embedding_version}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.retrieve(**change)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(f"{field}:")


@pytest.mark.parametrize(
    ("users", "field"),
    [
        ([], "users"),
        ([UserToEncode(user_id="u")] * 1001, "users"),
        ([UserToEncode(user_id="u"), UserToEncode()], "users[1].user_id"),
        ([UserToEncode(user_id="u", state=b"\xff")], "users[0].state"),
    ],
    ids=["none", "too many", "no id", "broken state"],
)
async def test_bad_encode_requests_are_refused_by_field(
    running: Running, users: list[UserToEncode], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.stub.EncodeUsers(EncodeUsersRequest(users=users), timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(f"{field}:")


async def test_a_source_that_fails_is_named_and_the_others_answer(
    running: Running, state_of: StateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no index today")

    monkeypatch.setattr("candidate.sources.AnnSource.retrieve", fail)
    response = await running.retrieve(state_of("folk-1"))
    assert list(response.missing_sources) == ["ann"]
    assert response.candidates


async def test_a_bundle_of_two_embedding_versions_is_refused(music: World, running: Running) -> None:
    bundle = music.bundle
    foreign = replace(bundle, manifest=replace(bundle.manifest, embedding_version="e0"))
    with pytest.raises(ArtifactError, match="embedding version e0"):
        load_snapshot(foreign, running.settings)


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
