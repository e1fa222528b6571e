"""The process as it runs: `python -m ranker`, a real broker, a real port."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from core.bundle import RANKER, ReleaseBundle
from core.grpc_runtime import blocking_channel
from core.kafka import KafkaProducer
from core.settings import load_settings
from core.topics import Topics
from devstack.ports import Ports
from devstack.topics import ensure_topics
from headrace.v1.events_pb2 import Item
from headrace.v1.ranker_service_pb2 import RankCandidatesRequest, RankerServiceGetModelInfoRequest, UserCandidates
from headrace.v1.ranker_service_pb2_grpc import RankerServiceStub

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e
MakeBundle = Callable[..., ReleaseBundle]
Start = Callable[..., "Ranker"]


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {timeout_seconds} s"
        time.sleep(0.01)


class Ranker:
    """One `python -m ranker`."""

    def __init__(self, registry: Path, port: int, admin_port: int, variables: dict[str, str]) -> None:
        self.port, self.admin_port = port, admin_port
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
            "HEADRACE_RANKER__PORT": str(port),
            "HEADRACE_RANKER__ADMIN_PORT": str(admin_port),
            "HEADRACE_REGISTRY__PATH": str(registry),
            "HEADRACE_REGISTRY__WATCH_INTERVAL_MS": "50",
            "HEADRACE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1",
            **variables,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ranker"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )

    def get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}{path}", timeout=2) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            return ""

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1]
        return self.get("/ready") == "ready\n"

    def over(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def stop(self) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.over()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    ports, started = Ports(), []

    def make(**variables: str) -> Ranker:
        port, admin_port = (ports.take(f"{name}{len(started)}") for name in ("ranker", "admin"))
        started.append(Ranker(tmp_path / "bundles", port, admin_port, variables))
        return started[-1]

    yield make
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()
    ports.close()


def ask(number: str) -> RankCandidatesRequest:
    return RankCandidatesRequest(users=[UserCandidates(user_id="u", item_ids=[number], scores=[1], source_bits=[1])])


def test_without_a_bundle_it_ends_with_one_line(start: Start) -> None:
    code, errors = start().over()
    assert code == 1
    assert errors.startswith("ranker: ")
    assert "headrace train" in errors
    assert len(errors.splitlines()) == 1


def test_with_a_corrupt_bundle_it_ends_with_one_line(start: Start, make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle.path / RANKER).write_bytes(b"not a model")
    code, errors = start().over()
    assert code == 1
    assert f"{RANKER} is corrupt" in errors
    assert len(errors.splitlines()) == 1


def test_it_serves_without_kafka_swaps_and_stops_cleanly(start: Start, make_bundle: MakeBundle) -> None:
    make_bundle("v1", seed=1)
    ranker = start()
    wait_until(ranker.is_ready, 60, "ready")
    with blocking_channel(f"127.0.0.1:{ranker.port}") as connection:
        stub = RankerServiceStub(connection)
        assert stub.RankCandidates(ask("item-1"), timeout=5).bundle_version == "v1"
        make_bundle("v2", seed=2)
        info = RankerServiceGetModelInfoRequest()
        wait_until(lambda: stub.GetModelInfo(info, timeout=5).bundle_version == "v2", 30, "the new bundle")
        assert stub.RankCandidates(ask("item-1"), timeout=5).bundle_version == "v2"
    metrics = ranker.get("/metrics")
    assert "headrace_ranker_batch_users_count" in metrics
    assert 'headrace_ranker_bundle_loads_total{outcome="loaded"} 2.0' in metrics
    code, errors = ranker.stop()
    assert code == 0
    assert errors.count("kafka is away") == 1


def test_news_of_the_item_topic_arrive_while_it_serves(
    start: Start, make_bundle: MakeBundle, kafka: dict[str, object], kafka_producer: KafkaProducer
) -> None:
    make_bundle()
    prefix = f"ranker{os.getpid()}"
    settings = load_settings(overrides={"kafka": {**kafka, "topic_prefix": prefix}}).kafka
    ensure_topics(settings)
    names = ("bootstrap_servers", "log_id", "fetch_wait_max_ms", "topic_prefix")
    ranker = start(**{f"HEADRACE_KAFKA__{name.upper()}": str(getattr(settings, name)) for name in names})
    wait_until(ranker.is_ready, 60, "ready")

    def unknown() -> float:
        line = next(x for x in ranker.get("/metrics").splitlines() if x.startswith("headrace_ranker_unknown_cand"))
        return float(line.split()[-1])

    with blocking_channel(f"127.0.0.1:{ranker.port}") as connection:
        stub = RankerServiceStub(connection)

        def is_known() -> bool:
            before = unknown()
            stub.RankCandidates(ask("fresh"), timeout=5)
            return unknown() == before

        assert not is_known()
        item = Item(item_id="fresh", title="Fresh", categories=["taste-1"])
        kafka_producer.send(Topics(prefix).items, b"fresh", item.SerializeToString()).result(10)
        wait_until(is_known, 5, "the new item")
    code, errors = ranker.stop()
    assert code == 0
    assert "kafka is away" not in errors


def test_a_port_in_use_is_one_line(start: Start, make_bundle: MakeBundle) -> None:
    make_bundle()
    first = start()
    wait_until(first.is_ready, 60, "ready")
    code, errors = start(HEADRACE_RANKER__PORT=str(first.port)).over()
    assert code == 1
    assert "is the port in use?" in errors
    assert "Traceback" not in errors
    grpc.channel_ready_future(blocking_channel(f"127.0.0.1:{first.port}")).result(10)
