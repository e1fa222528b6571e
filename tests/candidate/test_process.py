"""The process as it runs: `python -m candidate`, a real broker, a real port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from core.bundle import promote_version
from core.codec import from_ms
from core.grpc_runtime import blocking_channel
from core.kafka import KafkaProducer
from core.settings import Settings, load_settings
from core.topics import Topics
from devstack.addresses import with_values
from devstack.kafka_broker import FETCH_WAIT_MAX_MS, broker_spec, read_announcement
from devstack.supervisor import Supervisor
from devstack.topics import ensure_topics
from features import windows
from features.windows import UserEvent, UserState
from headrace.v1.candidate_service_pb2 import GetIndexInfoRequest, RetrieveCandidatesRequest
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub
from headrace.v1.events_pb2 import Event, Feedback, Item
from headrace.v1.types_pb2 import ItemFilter

if TYPE_CHECKING:
    from conftest import World

T0_MS = 1_700_000_000_000
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Candidate:
    """One `python -m candidate`."""

    def __init__(self, registry: Path, kafka: dict[str, str]) -> None:
        self.port, self.admin_port = free_port(), free_port()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
            "HEADRACE_CANDIDATE__PORT": str(self.port),
            "HEADRACE_CANDIDATE__ADMIN_PORT": str(self.admin_port),
            "HEADRACE_REGISTRY__PATH": str(registry),
            "HEADRACE_REGISTRY__WATCH_INTERVAL_MS": "50",
            **kafka,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "candidate"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def over(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def stop(self) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


def until(what: Callable[[], Any], timeout_seconds: float) -> Any:
    end = time.monotonic() + timeout_seconds
    while not (result := what()):
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)
    return result


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    folder = tmp_path_factory.mktemp("broker")
    spec, announce = broker_spec(folder / "kafka")
    supervisor = Supervisor([spec], folder, say=lambda _name, _text: None)
    supervisor.start_all(30)
    announced = read_announcement(announce)
    assert announced is not None
    values = {
        "bootstrap_servers": announced.bootstrap_servers,
        "log_id": announced.log_id,
        "fetch_wait_max_ms": FETCH_WAIT_MAX_MS,
    }
    settings = with_values(load_settings(), {"kafka": values}, {})
    ensure_topics(settings.kafka)
    yield settings
    supervisor.stop_all()


def kafka_variables(settings: Settings) -> dict[str, str]:
    return {
        f"HEADRACE_KAFKA__{name.upper()}": str(getattr(settings.kafka, name))
        for name in ("bootstrap_servers", "log_id", "fetch_wait_max_ms")
    }


def test_items_come_and_go_within_a_second(music: World, kafka: Settings) -> None:
    candidate = Candidate(music.registry, kafka_variables(kafka))
    producer = KafkaProducer(kafka.kafka)
    connection = blocking_channel(f"127.0.0.1:{candidate.port}")
    try:
        until(candidate.ready, 60)
        stub = CandidateServiceStub(connection)
        request = RetrieveCandidatesRequest(
            user_id="u", num_candidates=50, filter=ItemFilter(categories_any=["polka"]), source_quotas={"new": 50}
        )

        def found() -> list[str]:
            return [candidate.item_id for candidate in stub.RetrieveCandidates(request, timeout=5).candidates]

        assert found() == []
        item = Item(item_id="polka-1", title="polka", categories=["polka"])
        item.publish_time.GetCurrentTime()
        producer.send("headrace.items.v1", b"polka-1", item.SerializeToString()).result(10)
        started = time.monotonic()
        until(lambda: found() == ["polka-1"], 5)
        assert time.monotonic() - started < 1
        producer.send("headrace.items.v1", b"polka-1", None).result(10)
        started = time.monotonic()
        until(lambda: found() == [], 5)
        assert time.monotonic() - started < 1
    finally:
        connection.close()
        producer.close()
        code, errors = candidate.stop()
    assert code == 0, errors


def test_replicas_learn_the_same_pairs_whenever_they_start(music: World, kafka: Settings) -> None:
    """One reads the events as they come, the other comes later and reads what is there."""
    variables = kafka_variables(kafka)
    early = Candidate(music.registry, variables)
    producer = KafkaProducer(kafka.kafka)
    candidates, channels = [early], [blocking_channel(f"127.0.0.1:{early.port}")]
    rng = np.random.default_rng(2)
    topics = Topics(kafka.kafka.topic_prefix)
    state = UserState()
    windows.apply(state, [UserEvent("u", 1, "jazz-1", "click", T0_MS)], kafka.features)
    now_ms = time.time_ns() // 1_000_000
    request = RetrieveCandidatesRequest(
        user_id="u",
        num_candidates=50,
        state=windows.encode(state),
        source_quotas={"co_visitation": 50},
        context={"as_of_time": from_ms(now_ms)},
    )

    def found(connection: grpc.Channel) -> list[tuple[str, float]]:
        response = CandidateServiceStub(connection).RetrieveCandidates(request, timeout=5)
        return [(candidate.item_id, round(candidate.score, 6)) for candidate in response.candidates]

    def send(kind: type[Event] | type[Feedback], event_id: str, user_id: str, item_id: str) -> None:
        message = kind(event_id=event_id, user_id=user_id, item_id=item_id, kind="click", event_time=from_ms(now_ms))
        topic = topics.events if kind is Event else topics.feedback
        producer.send(topic, user_id.encode(), message.SerializeToString()).result(10)

    try:
        until(early.ready, 60)
        before = found(channels[0])
        for n in range(300):
            item_id = f"metal-{rng.integers(20)}" if n % 2 else "jazz-1"
            kind = Event if n % 3 else Feedback
            for _ in range(1 + n % 2):
                send(kind, f"e{n}", f"user-{n // 4 % 12}", item_id)
        producer.post(topics.events, b"x", b"\xff broken")
        send(Event, "last", "somebody", "jazz-1")
        send(Event, "last of all", "somebody", "techno-19")
        until(lambda: "techno-19" in dict(found(channels[0])), 10)
        candidates.append(Candidate(music.registry, variables))
        channels.append(blocking_channel(f"127.0.0.1:{candidates[1].port}"))
        until(candidates[1].ready, 60)
        # Ready means that what was there is read.
        assert "techno-19" in dict(found(channels[1]))
        # The topics have no order between them: the one that was there early may hear the rest a moment later.
        until(lambda: found(channels[0]) == found(channels[1]), 10)
        assert found(channels[1]) != before
        assert sum(item_id.startswith("metal") for item_id, _ in found(channels[1])) == 20
    finally:
        for connection in channels:
            connection.close()
        producer.close()
        ends = [candidate.stop() for candidate in candidates]
    assert all(code == 0 for code, _ in ends), ends


def test_it_serves_without_kafka_and_swaps_to_the_promoted_bundle(music: World, tmp_path: Path) -> None:
    registry = tmp_path / "bundles"
    registry.mkdir()
    for version in ("v1", "v2"):
        # Two versions of one content.
        folder = registry / version
        folder.mkdir()
        for file in music.bundle.path.iterdir():
            text = file.read_bytes()
            (folder / file.name).write_bytes(
                text.replace(b'"bundle_version": "v1"', b'"bundle_version": "%s"' % version.encode())
                if file.name == "manifest.json"
                else text
            )
    broken = registry / "v3"
    broken.mkdir()
    for file in music.bundle.path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:-1] if "vectors" in file.name else file.read_bytes())
    promote_version(registry, "v1")
    candidate = Candidate(registry, {"HEADRACE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"})
    connection = blocking_channel(f"127.0.0.1:{candidate.port}")
    try:
        stub = CandidateServiceStub(connection)

        def version() -> str:
            try:
                return stub.GetIndexInfo(GetIndexInfoRequest(), timeout=5, wait_for_ready=True).bundle_version
            except grpc.RpcError:
                return ""

        until(candidate.ready, 60)
        assert version() == "v1"
        promote_version(registry, "v3")
        promote_version(registry, "v2")
        until(lambda: version() == "v2", 20)
    finally:
        connection.close()
        code, errors = candidate.stop()
    assert code == 0, errors
    assert "kafka is away" in errors


def test_without_a_bundle_it_says_what_to_run(tmp_path: Path) -> None:
    code, errors = Candidate(tmp_path / "nothing", {}).over()
    assert code == 1
    assert "headrace train" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
