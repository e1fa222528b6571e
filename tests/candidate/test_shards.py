"""An index spread over processes: together they answer as one does, and without one of them the others do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from candidate.shard import Shard
from candidate.shards import Answer, combined
from core.errors import ConfigError
from core.grpc_runtime import blocking_channel
from core.settings import load_settings
from features import windows
from features.windows import UserState
from headrace.v1.candidate_service_pb2 import (
    CandidateProbe,
    GetIndexInfoRequest,
    RetrieveCandidatesRequest,
    RetrieveCandidatesResponse,
)
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub
from headrace.v1.types_pb2 import ItemFilter

if TYPE_CHECKING:
    from conftest import World

ROOT = Path(__file__).parents[2]


def answer(shard: int, **sources: Sequence[tuple[str, float]]) -> Answer:
    """What a shard says, in columns."""
    ids = list(dict.fromkeys(item_id for of in sources.values() for item_id, _ in of))
    response = RetrieveCandidatesResponse(item_ids=ids, scores=[0.0] * len(ids), index_version="i", bundle_version="b")
    for name, of in sources.items():
        response.source_quotas[name] = 2
        proposals = response.proposals.add(source=name)
        proposals.candidates.extend(ids.index(item_id) for item_id, _ in of)
        proposals.scores.extend(score for _, score in of)
        proposals.ranks.extend(range(len(of)))
    return Answer(shard, response)


def test_every_item_has_one_owner_and_shares_are_even() -> None:
    shards = [Shard(number, 3) for number in range(3)]
    owned = np.array([[shard.owns(f"item-{n}") for n in range(3000)] for shard in shards])
    assert (owned.sum(axis=0) == 1).all()
    assert (owned.sum(axis=1) > 900).all()
    assert Shard().owns("anything")


def test_vector_sources_are_merged_by_score_and_the_others_are_the_first_ones() -> None:
    first = answer(0, ann=[("a", 0.9), ("b", 0.5)], trending=[("t", 1.0), ("a", 0.5)])
    second = answer(1, ann=[("c", 0.7), ("d", 0.6)], trending=[("x", 1.0)])
    response = combined(RetrieveCandidatesRequest(num_candidates=3), first, [second], ["2 (h:1)"], Shard(0, 3))
    found = {candidate.item_id: candidate for candidate in response.candidates}
    assert set(found) == {"a", "t", "c"}
    assert [(p.source, p.rank, round(p.score, 3)) for p in found["c"].provenance] == [("ann", 1, 0.7)]
    assert {p.source for p in found["a"].provenance} == {"ann", "trending"}
    assert list(response.missing_shards) == ["2 (h:1)"]
    assert (response.index_version, response.bundle_version) == ("i", "b")


def test_a_probe_is_the_word_of_the_items_own_shard() -> None:
    shard = Shard(0, 2)
    owner = {number: next(f"i{n}" for n in range(99) if shard.owner(f"i{n}") == number) for number in (0, 1)}
    first, second = answer(0, ann=[(owner[0], 0.9)]), answer(1, ann=[(owner[1], 0.7)])
    for of in (first, second):
        for number in (0, 1):
            said = "source ann (rank 0)" if number == of.shard else "quota: not mine"
            of.response.probes.append(CandidateProbe(item_id=owner[number], known=True, decided_by=said))
    request = RetrieveCandidatesRequest(num_candidates=1, probe_item_ids=[owner[0], owner[1]])
    said = [probe.decided_by for probe in combined(request, first, [second], [], shard).probes]
    assert said == ["source ann (rank 0)", "num_candidates: other candidates took their turn first"]
    said = [probe.decided_by for probe in combined(request, first, [], ["1"], shard).probes]
    assert said == ["source ann (rank 0)", "shard 1 is away"]


def test_a_shard_that_is_none_of_the_targets_is_refused() -> None:
    with pytest.raises(ConfigError, match="shard 2 is none of the 2 shard_targets"):
        load_settings(overrides={"candidate": {"shard_targets": ["a:1", "b:2"], "shard": 2}})


class Process:
    """One `python -m candidate` without Kafka."""

    def __init__(self, registry: Path, ports: tuple[int, int], targets: Sequence[str], shard: int) -> None:
        self.target, self._admin_port = f"127.0.0.1:{ports[0]}", ports[1]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
            "HEADRACE_CANDIDATE__PORT": str(ports[0]),
            "HEADRACE_CANDIDATE__ADMIN_PORT": str(ports[1]),
            "HEADRACE_CANDIDATE__SHARD_TARGETS": str(list(targets)).replace("'", '"'),
            "HEADRACE_CANDIDATE__SHARD": str(shard),
            "HEADRACE_REGISTRY__PATH": str(registry),
            "HEADRACE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "candidate"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        self._connection = blocking_channel(self.target)
        self.stub = CandidateServiceStub(self._connection)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._admin_port}/ready", timeout=2) as said:
                return bool(said.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def stop(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.wait(20)


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


def until(what: Callable[[], bool], timeout_seconds: float = 120) -> None:
    end = time.monotonic() + timeout_seconds
    while not what():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


@pytest.fixture
def processes(music: World) -> Iterator[list[Process]]:
    """Two shards, and one process that has all."""
    ports = free_ports(6)
    targets = [f"127.0.0.1:{port}" for port in ports[:2]]
    started = [Process(music.registry, (ports[n], ports[n + 2]), targets, n) for n in range(2)]
    started.append(Process(music.registry, (ports[4], ports[5]), [], 0))
    for process in started:
        until(process.ready)
    yield started
    for process in started:
        process.stop()


@pytest.mark.e2e
def test_two_shards_answer_as_one_index_and_one_answers_without_the_other(
    processes: list[Process], state_of: Callable[..., UserState]
) -> None:
    *shards, whole = processes
    sizes = [shard.stub.GetIndexInfo(GetIndexInfoRequest(), timeout=10).main_item_count for shard in shards]
    assert sum(sizes) == 80
    assert min(sizes) > 20
    request = RetrieveCandidatesRequest(
        user_id="u",
        state=windows.encode(state_of("jazz-1", "jazz-2", "folk-3")),
        num_candidates=40,
        probe_item_ids=["jazz-5", "techno-7", "nothing"],
        filter=ItemFilter(categories_none=["metal"]),
        source_quotas={"ann": 25, "item_to_item": 10, "trending": 10},
    )
    expected = whole.stub.RetrieveCandidates(request, timeout=10)
    for shard in shards:
        response = shard.stub.RetrieveCandidates(request, timeout=10)
        assert not response.missing_shards
        assert (response.index_version, response.bundle_version) == (expected.index_version, expected.bundle_version)
        ours, theirs = ({c.item_id: c for c in r.candidates} for r in (response, expected))
        assert set(ours) == set(theirs)
        for item_id, candidate in theirs.items():
            assert ours[item_id].score == pytest.approx(candidate.score, abs=1e-5)
            proposers = [{(p.source, p.rank) for p in of[item_id].provenance} for of in (ours, theirs)]
            assert proposers[0] == proposers[1]
        for mine, one in zip(response.probes, expected.probes, strict=True):
            assert (mine.known, mine.exact_rank, mine.decided_by) == (one.known, one.exact_rank, one.decided_by)
    columns = RetrieveCandidatesRequest()
    columns.CopyFrom(request)
    columns.columns = True
    in_columns = shards[0].stub.RetrieveCandidates(columns, timeout=10)
    assert set(in_columns.item_ids) == {candidate.item_id for candidate in expected.candidates}

    # A shard that hangs is not waited for beyond the caller's time; when it is back, so are its items.
    shards[1].process.send_signal(signal.SIGSTOP)
    late = shards[0].stub.RetrieveCandidates(request, timeout=2)
    assert list(late.missing_shards) == [f"1 ({shards[1].target})"]
    shards[1].process.send_signal(signal.SIGCONT)
    until(lambda: not shards[0].stub.RetrieveCandidates(request, timeout=2).missing_shards)

    shards[1].process.kill()
    shards[1].process.wait(20)
    alone = shards[0].stub.RetrieveCandidates(request, timeout=5)
    assert list(alone.missing_shards) == [f"1 ({shards[1].target})"]
    owns = Shard(0, 2).owns
    found = [c.item_id for c in alone.candidates if {p.source for p in c.provenance} & {"ann", "item_to_item"}]
    assert len(found) >= 20
    assert all(owns(item_id) for item_id in found)
