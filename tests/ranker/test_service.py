"""The service on a real socket: answers, refusals, deadlines, swaps. Kafka is away throughout."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.timestamp_pb2 import Timestamp

from core.bundle import ITEM_STATS, ITEM_VECTORS, RANKER, RANKER_CONFIG, ReleaseBundle, promote_version
from core.clock import ManualClock
from core.codec import from_ms
from core.deadline import Deadline
from core.grpc_runtime import GrpcServer, channel
from core.settings import Settings
from features import feature_log, windows
from features.vectors import SIGNATURE, ranker_input
from features.windows import UserState
from headrace.v1.ranker_service_pb2 import (
    RankCandidatesRequest,
    RankerServiceGetModelInfoRequest,
    UserCandidates,
)
from headrace.v1.ranker_service_pb2_grpc import RankerServiceStub, add_RankerServiceServicer_to_server
from ranker.batcher import Batcher
from ranker.bootstrap import SERVICE, make_batcher
from ranker.model import load_ranker, save_ranker
from ranker.release import UserJob
from ranker.releases import Releases
from ranker.scorer import Scores
from ranker.service import RankerService

T0_MS = 1_700_000_000_000
DIMENSION = 16
MakeBundle = Callable[..., ReleaseBundle]
State = Callable[..., UserState]


@dataclass
class Running:
    releases: Releases
    batcher: Batcher[UserJob, Scores]
    stub: RankerServiceStub

    async def rank(self, *users: UserCandidates, model_version: str = "", timeout: float = 20) -> object:  # noqa: ASYNC109
        request = RankCandidatesRequest(users=users, model_version=model_version)
        return await self.stub.RankCandidates(request, timeout=timeout)

    async def problem(self, *users: UserCandidates, **more: str) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.rank(*users, **more)
        return caught.value.code(), str(caught.value.details())


@pytest.fixture
async def start(registry_settings: Settings) -> AsyncIterator[Callable[..., object]]:
    closers = []

    async def make(settings: Settings | None = None) -> Running:
        chosen = settings or registry_settings
        clock = ManualClock(T0_MS + 3_600_000)
        releases = Releases(chosen, clock)
        batcher = make_batcher(chosen)
        batcher.start()
        server = GrpcServer("127.0.0.1", 0, [SERVICE])
        add_RankerServiceServicer_to_server(RankerService(releases, batcher, clock), server.grpc)
        server.start()
        connection = channel(f"127.0.0.1:{server.port}")
        closers.extend([connection.close, lambda: server.stop(0), batcher.close])
        return Running(releases, batcher, RankerServiceStub(connection))

    yield make
    for close in closers:
        await close()


Start = Callable[..., "asyncio.Future[Running]"]


def asked(*numbers: int, state: UserState | None = None, **more: object) -> UserCandidates:
    fields: dict[str, object] = {
        "user_id": "u",
        "state": windows.encode(state) if state else b"",
        "item_ids": [f"item-{number}" for number in numbers],
        "scores": [1.0 / (1 + index) for index in range(len(numbers))],
        "source_bits": [1] * len(numbers),
        **more,
    }
    return UserCandidates(**fields)  # type: ignore[arg-type]


async def test_an_answer_names_its_versions_and_scores_every_candidate(
    make_bundle: MakeBundle, start: Start, state_of: State
) -> None:
    bundle = make_bundle()
    running = await start()
    answer = await running.rank(asked(1, 2, 3, state=state_of(5, 6), embedding=[0.25] * DIMENSION), asked(4), asked())
    assert [len(user.scores) for user in answer.users] == [3, 1, 0]
    assert answer.bundle_version == "v1"
    assert answer.model_version == bundle.manifest.model_version
    assert answer.feature_signature == SIGNATURE
    first = answer.users[0]
    for scores in (first.click_scores, first.conversion_scores, first.value_scores, first.scores, first.confidences):
        assert len(scores) == 3
        assert all(0 <= score <= 1 for score in scores)


async def test_a_click_changes_the_scores_of_the_next_answer(
    make_bundle: MakeBundle, start: Start, state_of: State
) -> None:
    make_bundle()
    running = await start()
    answer = await running.rank(asked(1, 2, 3, state=state_of(5)), asked(1, 2, 3, state=state_of(5, 6)))
    assert list(answer.users[0].scores) != list(answer.users[1].scores)


async def test_features_are_as_of_the_time_that_the_request_gives(
    make_bundle: MakeBundle, start: Start, state_of: State
) -> None:
    make_bundle()
    running = await start()
    now, later = (from_ms(T0_MS + hours * 3_600_000) for hours in (1, 40))
    user = asked(1, 2, 3, state=state_of(5))
    at_request, at_default, at_later, replayed = (
        list(one.scores)
        for one in (
            await running.rank(
                UserCandidates(**{**_fields(user), "request_time": now}),
                user,
                UserCandidates(**{**_fields(user), "request_time": later}),
                UserCandidates(**{**_fields(user), "request_time": now, "context": {"as_of_time": later}}),
            )
        ).users
    )
    assert at_request == pytest.approx(at_default)
    assert at_later == pytest.approx(replayed)
    assert at_request != pytest.approx(at_later, rel=1e-3)


def _fields(message: UserCandidates) -> dict[str, object]:
    return {field.name: value for field, value in message.ListFields()}


@pytest.mark.parametrize(
    ("user", "field"),
    [
        (asked(1, 2, scores=[0.5]), "users[0].scores: length 1 differs from that of item_ids, 2"),
        (asked(1, 2, source_bits=[]), "users[0].source_bits: length 0 differs"),
        (asked(1, embedding=[1.0] * 3), "users[0].embedding: 16 numbers are needed"),
        (asked(1, state=None, user_id="x" * 129), "users[0].user_id: at most 128"),
        (asked(*range(2001)), "users[0].item_ids: at most 2000, not 2001"),
        (asked(1, request_time=Timestamp(seconds=2**62)), "users[0].request_time: is not between"),
        (asked(1, context={"as_of_time": Timestamp(seconds=-(2**62))}), "users[0].context.as_of_time: is not between"),
    ],
    ids=["scores", "source_bits", "embedding", "user_id", "item_ids", "time", "as_of"],
)
async def test_a_bad_request_names_its_field(
    make_bundle: MakeBundle, start: Start, user: UserCandidates, field: str
) -> None:
    make_bundle()
    code, text = await (await start()).problem(user)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert field in text


async def test_broken_states_and_counts_of_users_are_refused(make_bundle: MakeBundle, start: Start) -> None:
    make_bundle()
    running = await start()
    broken = asked(1)
    broken.state = b"\xff\x01nonsense"
    assert "users[1].state: not an encoded user state" in (await running.problem(asked(2), broken))[1]
    assert "users: 1..64 are needed, not 0" in (await running.problem())[1]
    assert "users: 1..64 are needed, not 65" in (await running.problem(*[asked(1)] * 65))[1]


async def test_a_model_that_is_not_loaded_is_not_found(make_bundle: MakeBundle, start: Start) -> None:
    bundle = make_bundle()
    running = await start()
    code, text = await running.problem(asked(1), model_version="other")
    assert code == grpc.StatusCode.NOT_FOUND
    assert "'other' is not loaded" in text
    answer = await running.rank(asked(1), model_version=bundle.manifest.model_version)
    assert len(answer.users[0].scores) == 1


async def test_the_largest_request_is_answered_in_full(make_bundle: MakeBundle, start: Start, state_of: State) -> None:
    make_bundle()
    numbers = [number % 60 for number in range(500)]
    answer = await (await start()).rank(*[asked(*numbers, state=state_of(1, 2))] * 64)
    assert [len(user.scores) for user in answer.users] == [500] * 64
    assert answer.users[0].scores == pytest.approx(answer.users[63].scores, abs=1e-6)


async def test_what_is_not_a_number_gives_scores_all_the_same(
    make_bundle: MakeBundle, start: Start, state_of: State
) -> None:
    make_bundle()
    nan, inf = float("nan"), float("inf")
    user = asked(1, 2, 3, state=state_of(5), scores=[nan, inf, -inf], embedding=[nan] * DIMENSION)
    answer = await (await start()).rank(user)
    assert np.isfinite(answer.users[0].scores).all()


async def test_unknown_items_get_a_score_and_no_confidence(make_bundle: MakeBundle, start: Start) -> None:
    make_bundle()
    answer = await (await start()).rank(asked(6, 12345))
    assert answer.users[0].scores[1] > 0
    assert answer.users[0].confidences[1] == 0
    assert answer.users[0].confidences[0] > 0


async def test_many_callers_get_their_own_answers(make_bundle: MakeBundle, start: Start, state_of: State) -> None:
    make_bundle()
    running = await start()
    users = [asked(*range(1 + index % 7), state=state_of(*range(index % 5))) for index in range(60)]
    alone = [await running.rank(user) for user in users]
    together = await asyncio.gather(*(running.rank(user) for user in users))
    for one, other in zip(alone, together, strict=True):
        assert list(one.users[0].scores) == pytest.approx(list(other.users[0].scores), abs=1e-6)


async def test_an_expired_call_is_late_and_a_full_queue_refuses(
    make_bundle: MakeBundle, start: Start, registry_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle()
    one_place = registry_settings.ranker.model_copy(update={"queue_max": 1})
    running = await start(registry_settings.model_copy(update={"ranker": one_place}))
    inside, queued, gate = asyncio.Event(), asyncio.Event(), threading.Event()
    loop, work, submit = asyncio.get_running_loop(), running.batcher._work, running.batcher.submit

    def held(jobs: Sequence[UserJob]) -> Sequence[Scores]:
        loop.call_soon_threadsafe(inside.set)
        assert gate.wait(20)
        return work(jobs)

    async def told(jobs: Sequence[UserJob], deadline: Deadline) -> list[Scores]:
        loop.call_soon(queued.set)
        return await submit(jobs, deadline)

    monkeypatch.setattr(running.batcher, "_work", held)
    working = asyncio.create_task(running.rank(asked(1)))
    await inside.wait()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await running.rank(asked(2), timeout=0.05)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    monkeypatch.setattr(running.batcher, "submit", told)
    waiting = asyncio.create_task(running.rank(asked(3)))
    async with asyncio.timeout(20):
        await queued.wait()
    code, text = await running.problem(asked(4))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again" in text
    gate.set()
    assert len((await working).users[0].scores) == len((await waiting).users[0].scores) == 1


async def test_a_request_names_its_bundle_and_gets_it(make_bundle: MakeBundle, start: Start) -> None:
    make_bundle("v1", seed=1)
    running = await start()
    make_bundle("v2", seed=2)
    assert await running.releases.look()
    request = RankCandidatesRequest(users=[asked(1, 2)], bundle_version="v1")
    assert (await running.stub.RankCandidates(request, timeout=20)).bundle_version == "v1"
    request.bundle_version = "v0"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.RankCandidates(request, timeout=20)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    info = await running.stub.GetModelInfo(RankerServiceGetModelInfoRequest(), timeout=5)
    assert list(info.loaded_bundle_versions) == ["v2", "v1"]
    running.releases.close()


async def test_items_of_low_confidence_are_marked_where_the_request_asks(make_bundle: MakeBundle, start: Start) -> None:
    make_bundle()
    running = await start()
    # Item 7 was never clicked, item 6 was; the last one is unknown.
    user = asked(7, 6, 999)
    request = RankCandidatesRequest(users=[user], least_confidence=0.1)
    ranked = (await running.stub.RankCandidates(request, timeout=20)).users[0]
    assert list(ranked.below_confidence) == [confidence < 0.1 for confidence in ranked.confidences]
    assert list(ranked.below_confidence) == [True, False, True]
    assert ranked.click_uncertainties[0] > ranked.click_uncertainties[1] > 0
    plain = (await running.rank(user)).users[0]
    assert not plain.below_confidence
    assert not plain.click_uncertainties
    request.least_confidence = 2
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.RankCandidates(request, timeout=20)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_model_info_says_what_is_loaded(make_bundle: MakeBundle, start: Start) -> None:
    bundle = make_bundle()
    info = await (await start()).stub.GetModelInfo(RankerServiceGetModelInfoRequest(), timeout=5)
    assert (info.bundle_version, info.model_version) == ("v1", bundle.manifest.model_version)
    assert info.feature_signature == SIGNATURE
    assert info.parameter_count > 10_000
    assert info.device == "cpu"
    assert info.load_time == from_ms(T0_MS + 3_600_000)
    assert dict(info.metrics) == {"ranker_auc": 0.75}


class TestSwap:
    async def test_the_promoted_bundle_serves_the_next_request(self, make_bundle: MakeBundle, start: Start) -> None:
        make_bundle("v1", seed=1)
        running = await start()
        before = await running.rank(asked(1, 2, 3))
        second = make_bundle("v2", seed=2)
        assert await running.releases.look()
        after = await running.rank(asked(1, 2, 3))
        assert (before.bundle_version, after.bundle_version) == ("v1", "v2")
        assert after.model_version == second.manifest.model_version
        assert list(after.users[0].scores) != list(before.users[0].scores)
        assert not await running.releases.look()
        running.releases.close()

    @pytest.mark.parametrize("name", [RANKER, ITEM_VECTORS, ITEM_STATS])
    async def test_a_corrupt_bundle_leaves_the_old_one(
        self, make_bundle: MakeBundle, start: Start, registry_settings: Settings, name: str
    ) -> None:
        make_bundle("v1")
        running = await start()
        bad = make_bundle("v2", seed=2)
        content = (bad.path / name).read_bytes()
        (bad.path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert not await running.releases.look()
        assert (await running.rank(asked(1))).bundle_version == "v1"
        promote_version(registry_settings.registry.path, "v1")
        assert not await running.releases.look()

    async def test_a_model_that_scores_nonsense_fails_its_warm_up(self, make_bundle: MakeBundle, start: Start) -> None:
        make_bundle("v1")
        running = await start()
        make_bundle("v2", change=_break_weights)
        assert not await running.releases.look()
        assert (await running.rank(asked(1))).bundle_version == "v1"


def _break_weights(staged: Path) -> None:
    model = load_ranker(staged)
    before = model.config
    with torch.no_grad():
        model.heads.weight.fill_(float("nan"))
    save_ranker(model, staged)
    # The file says what the manifest will say; only the warm-up can find out.
    assert json.loads((staged / RANKER_CONFIG).read_text())["model_version"] != before.model_version


async def test_features_are_told_of_the_best_and_are_what_the_model_read(
    make_bundle: MakeBundle, start: Start, state_of: State, registry_settings: Settings
) -> None:
    make_bundle()
    running = await start()
    state = state_of(5, 6)
    state.offsets = {(7, 1): 3}
    question = asked(*range(30), 999, state=state, request_time=from_ms(T0_MS + 7_200_000))
    plain = (await running.rank(question)).users[0]
    assert not plain.HasField("features")
    question.log_features_of = 4
    answer = await running.rank(question, asked(1))
    told, features = answer.users[0], answer.users[0].features
    assert not answer.users[1].HasField("features")
    assert list(told.scores) == pytest.approx(list(plain.scores), abs=1e-6)
    best = np.argsort(-np.array(told.scores, np.float32), kind="stable")[:4]
    assert list(features.item_ids) == [question.item_ids[place] for place in best]
    assert (features.bundle_version, features.candidate_count, features.shown_count) == ("v1", 31, 0)
    assert (features.as_of_time_ms, features.state_revision) == (T0_MS + 7_200_000, 2)
    assert [(one.source, one.partition, one.offset) for one in features.state_offsets] == [(7, 1, 3)]
    release = running.releases.current
    made = ranker_input(
        state,
        release.catalog,
        release.catalog.rows(question.item_ids),
        np.array(question.scores, np.float32),
        np.ones(31, np.int32),
        T0_MS + 7_200_000,
        registry_settings.features,
    )
    numbers = feature_log.read_numbers(features)
    np.testing.assert_array_equal(numbers.candidates, made.candidates[best])
    np.testing.assert_array_equal(numbers.user, made.user)
    np.testing.assert_array_equal(numbers.history_ages, made.history_ages[-2:])
    assert features.stats_revisions == release.catalog.stats_revisions(release.catalog.rows(features.item_ids))


@pytest.mark.parametrize("count", [-1, 513])
async def test_no_more_features_are_told_than_there_is_room_for(
    make_bundle: MakeBundle, start: Start, count: int
) -> None:
    make_bundle()
    running = await start()
    code, details = await running.problem(asked(1, log_features_of=count))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "users[0].log_features_of" in details


async def test_features_of_no_candidates_are_none(make_bundle: MakeBundle, start: Start) -> None:
    make_bundle()
    running = await start()
    answer = await running.rank(asked(log_features_of=5))
    assert len(answer.users[0].features.item_ids) == 0
