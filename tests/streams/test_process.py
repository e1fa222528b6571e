"""`python -m streams` as a process: ready, quiet topics, kill -9, SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from core.codec import from_ms
from core.topics import Topics
from devstack.addresses import to_environment
from devstack.child import tied
from devstack.ports import Ports
from devstack.processes import http_problem, python_module
from features.definitions import ITEM_PROFILE, POPULARITY, USER_PROFILE, USER_STATE
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, ITEMS, USERS
from features.stores.online import OnlineStore
from headrace.v1.events_pb2 import Event, Item, User

ROOT = Path(__file__).resolve().parents[2]
NOW_MS = 1_700_000_000_000


def wait_until(condition, timeout_seconds: float = 30):
    end = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.01)
    return result


class Worker:
    """The process, its settings and its store."""

    def __init__(self, settings, log: Path) -> None:
        self.settings, self._log = settings, log
        self.folder = log.with_suffix(".folder")
        self.folder.mkdir()
        self.topics = Topics(settings.kafka.topic_prefix)
        self.store = OnlineStore(settings.redis, settings.features.project)
        self._ports = Ports()
        self.port = self._ports.take("streams")
        kafka, streams = settings.kafka, settings.streams
        self._environment = to_environment(
            {
                "kafka": kafka.model_dump(include={"bootstrap_servers", "topic_prefix", "log_id", "fetch_wait_max_ms"}),
                "redis": {"url": settings.redis.url.get_secret_value()},
                "features": {"project": settings.features.project},
                "registry": {"path": str(settings.registry.path)},
                "streams": {
                    **streams.model_dump(include={"group_id", "event_log_path", "session_timeout_ms"}),
                    "admin_port": self.port,
                    "event_log_interval_ms": 200,
                    "popularity_interval_ms": 50,
                },
            }
        )
        self.process = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                tied(python_module("streams")),
                cwd=self.folder,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}",
                    "TMPDIR": str(self.folder),
                    **self._environment,
                },
                stderr=log,
            )
        wait_until(lambda: http_problem(self.port, "/ready") is None or self.process.poll() is not None)
        assert self.process.poll() is None, self._log.read_text()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)

    def log_lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    def row(self, view, key: str) -> dict:
        return dict(self.store.read(view, [(key,)])[0].cells)


@pytest.fixture
def worker(shared_redis, stream_settings, tmp_path):
    worker = Worker(stream_settings(shared_redis), tmp_path / "streams.log")
    yield worker
    if worker.process is not None and worker.process.poll() is None:
        worker.end(signal.SIGKILL)
    worker._ports.close()


def event(number: int, user_id: str) -> bytes:
    return Event(
        event_id=f"e{number}", user_id=user_id, item_id=f"i{number % 3}", kind="click",
        event_time=from_ms(NOW_MS + number),
    ).SerializeToString()  # fmt: skip


def send(producer, worker, topic, key: str, value: bytes | None):
    return producer.send(topic, key.encode(), value)


def test_a_worker_is_killed_comes_back_and_ends_cleanly(worker, kafka_producer) -> None:
    worker.start()
    users = [f"u{n}" for n in range(5)]
    sent = [
        send(kafka_producer, worker, worker.topics.events, users[n % 5], event(n, users[n % 5])) for n in range(300)
    ]
    kafka_producer.flush()
    worker.end(signal.SIGKILL)
    # Nobody would ever remove it.
    assert not list(worker.folder.iterdir())
    sent += [
        send(kafka_producer, worker, worker.topics.events, users[n % 5], event(n, users[n % 5]))
        for n in range(300, 600)
    ]
    kafka_producer.flush()
    worker.start()
    wait_until(lambda: all(worker.row(USER_STATE, user_id).get("revision") == 120 for user_id in users))
    wait_until(lambda: worker.row(POPULARITY, "all"))
    assert worker.end(signal.SIGTERM) == 0
    written = [future.result(10) for future in sent]
    logged = Counter(
        (row["topic"], row["partition"], row["offset"])
        for path in EventLog(worker.settings.streams.event_log_path).files(EVENTS)
        for row in pq.read_table(path, columns=["topic", "partition", "offset"], partitioning=None).to_pylist()
    )
    assert logged == Counter((one.topic, one.partition, one.offset) for one in written)
    # A machine under load may miss a heartbeat of so short a session; nothing else may go wrong.
    lines = [line for line in worker.log_lines() if "Heartbeat session expired" not in line]
    assert not [line for line in lines if "Traceback" in line or "[error" in line]


def test_items_and_users_become_rows_and_tombstones_remove_them(worker, kafka_producer) -> None:
    worker.start()
    topics = worker.topics
    send(kafka_producer, worker, topics.items, "a", Item(item_id="a", title="An item").SerializeToString())
    send(kafka_producer, worker, topics.items, "broken", b"\xff\xff")
    send(kafka_producer, worker, topics.items, "b", Item(item_id="b", title="Another").SerializeToString())
    send(kafka_producer, worker, topics.users, "u", User(user_id="u", segment="anglers").SerializeToString())
    send(kafka_producer, worker, topics.events, "u", event(1, "u"))
    wait_until(lambda: worker.row(ITEM_PROFILE, "a").get("title") == "An item")
    wait_until(lambda: worker.row(ITEM_PROFILE, "b") and worker.row(USER_PROFILE, "u") and worker.row(USER_STATE, "u"))
    send(kafka_producer, worker, topics.items, "a", None)
    send(kafka_producer, worker, topics.users, "u", None)
    wait_until(lambda: "item" not in worker.row(ITEM_PROFILE, "a") and "profile" not in worker.row(USER_PROFILE, "u"))
    # Positions stay, so that nothing of it comes back.
    assert set(worker.row(ITEM_PROFILE, "a")) == {"item_offsets"}
    assert set(worker.row(USER_STATE, "u")) == {"state", "offsets"}
    # The erased user acts again: a new state, without what was erased.
    send(kafka_producer, worker, topics.events, "u", event(2, "u"))
    wait_until(lambda: worker.row(USER_STATE, "u").get("revision") == 1)
    assert worker.end(signal.SIGTERM) == 0
    log = EventLog(worker.settings.streams.event_log_path)
    assert [item.item_id for item in log.items()] == ["b"]
    assert list(log.users()) == []
    assert log.files(ITEMS)
    assert log.files(USERS)
    assert len([line for line in worker.log_lines() if "dead letter" in line]) == 1


def test_profiles_come_back_into_a_redis_that_was_emptied(own_redis, stream_settings, kafka_producer, tmp_path) -> None:
    worker = Worker(stream_settings(own_redis), tmp_path / "streams.log")
    topics = worker.topics

    def everything() -> bool:
        item, user = worker.row(ITEM_PROFILE, "a"), worker.row(USER_PROFILE, "u")
        return item.get("title") == "Newer" and user.get("profile_segment") == "anglers"

    worker.start()
    for title in ("Old", "Newer"):
        send(kafka_producer, worker, topics.items, "a", Item(item_id="a", title=title).SerializeToString())
    send(kafka_producer, worker, topics.items, "gone", Item(item_id="gone").SerializeToString())
    send(kafka_producer, worker, topics.items, "gone", None)
    send(kafka_producer, worker, topics.users, "u", User(user_id="u", segment="anglers").SerializeToString())
    wait_until(everything)
    own_redis.client().flushall()
    wait_until(everything)
    # The group's offsets say that all was read; the store does not.
    assert worker.end(signal.SIGTERM) == 0
    own_redis.client().flushall()
    worker.start()
    wait_until(everything)
    assert "item" not in worker.row(ITEM_PROFILE, "gone")
    assert worker.end(signal.SIGTERM) == 0
    worker._ports.close()


def test_without_kafka_it_waits_unready_and_ends_on_sigterm(shared_redis, stream_settings, tmp_path) -> None:
    settings = stream_settings(shared_redis)
    nowhere = settings.model_copy(
        update={"kafka": settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:9"})}
    )
    worker = Worker(nowhere, tmp_path / "streams.log")
    with worker._log.open("ab") as log:
        worker.process = subprocess.Popen(
            tied(python_module("streams")),
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", **worker._environment},
            stderr=log,
        )
    wait_until(lambda: "waiting for kafka" in (http_problem(worker.port, "/ready") or ""))
    assert http_problem(worker.port, "/live") is None
    assert worker.end(signal.SIGTERM) == 0
    worker._ports.close()


def test_with_another_feature_definition_it_ends_and_says_what_to_run(worker, kafka_producer) -> None:
    worker.start()
    assert worker.end(signal.SIGTERM) == 0
    changed = {"HEADRACE_FEATURES__HALF_LIVES_SECONDS": "[60, 600]"}
    done = subprocess.run(
        tied(python_module("streams")),
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", **worker._environment, **changed},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("streams: ")]
    assert "half_lives_seconds was" in line
    assert "`headrace rebuild --project NEW`" in line


def test_the_settings_can_be_checked_without_starting() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "streams", "--check-config"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "streams: settings are valid\n")
