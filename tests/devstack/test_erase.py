"""A user is erased everywhere, with a real stream worker at work; the receipt says what went and what stays."""

import json
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from core.bundle import BATCH_SCORES, Manifest, open_current, publish, staging_folder
from core.codec import from_ms
from core.errors import MalformedEventError, StageError
from core.topics import Topics
from devstack.addresses import to_environment
from devstack.child import tied
from devstack.cli import app
from devstack.erase import erase, erase_pending
from devstack.letters import Choice, read_letters
from devstack.ports import Ports
from devstack.processes import http_problem, python_module
from devstack.retention import _retention, retention_of
from features import windows
from features.definitions import USER_BATCH_SCORES, USER_EMBEDDING, USER_PROFILE, USER_STATE
from features.stores.event_log import EventLog, user_events
from features.stores.event_rows import LOG_TABLES
from features.stores.online import OnlineStore, Write
from headrace.v1.events_pb2 import Event, Feedback, Impression, ImpressionList, User
from offline.batch_scores import SCHEMA, read_batch_scores
from offline.logs import open_log
from offline.materialize import materialize
from offline.rebuild import rebuild
from tests.conftest import wait_until

ROOT = Path(__file__).resolve().parents[2]
NOW_MS = 1_700_000_000_000


class House:
    """Settings, a store, a producer, and the stream worker as a process."""

    def __init__(self, settings, producer) -> None:
        self.settings, self._producer = settings, producer
        self.topics = Topics(settings.kafka.topic_prefix)
        self.store = OnlineStore(settings.redis, settings.features.project)
        self.log, self.registry = settings.streams.event_log_path, settings.registry.path
        self.ports = Ports()
        kafka, streams = settings.kafka, settings.streams
        self.environment = to_environment(
            {
                "kafka": kafka.model_dump(include={"bootstrap_servers", "topic_prefix", "log_id", "fetch_wait_max_ms"}),
                "redis": {"url": settings.redis.url.get_secret_value()},
                "features": {"project": settings.features.project},
                "registry": {"path": str(self.registry)},
                "streams": {
                    **streams.model_dump(include={"group_id", "event_log_path", "session_timeout_ms"}),
                    "admin_port": self.ports.take("streams"),
                    "event_log_interval_ms": 100,
                },
            }
        )
        self._process = None

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", **self.environment}
        self._process = subprocess.Popen(tied(python_module("streams")), env=environment)
        port = int(self.environment["HEADRACE_STREAMS__ADMIN_PORT"])
        wait_until(lambda: http_problem(port, "/ready") is None, 40, "the worker")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            assert self._process.wait(20) == 0
            self._process = None

    def send(self, topic: str, user_id: str, message) -> None:
        value = message if isinstance(message, bytes) else message.SerializeToString()
        self._producer.send(topic, user_id.encode(), value).result(10)

    def act(self, user_id: str, number: int) -> None:
        """One message on every topic that is about users."""
        common = {"user_id": user_id, "event_time": from_ms(NOW_MS + number)}
        item = {"item_id": f"i{number}", "kind": "click"}
        self.send(self.topics.events, user_id, Event(event_id=f"e{number}", **item, **common))
        self.send(self.topics.feedback, user_id, Feedback(event_id=f"f{number}", **item, **common))
        shown = [Impression(item_id="i", propensity=1.0)]
        self.send(self.topics.impressions, user_id, ImpressionList(event_id=f"s{number}", impressions=shown, **common))
        self.send(self.topics.users, user_id, User(user_id=user_id, segment="anglers"))

    def row(self, view, user_id: str) -> dict:
        return dict(self.store.read(view, [(user_id,)])[0].cells)

    def logged(self, user_id: str) -> dict[str, int]:
        log, counts = EventLog(self.log), {}
        for table in LOG_TABLES:
            if "user_id" in table.schema.names:
                files = [pq.read_table(path, partitioning=None) for path in log.files(table)]
                counts[table.name] = sum(rows["user_id"].to_pylist().count(user_id) for rows in files)
        return counts

    def erase(self, user_id: str, **options):
        return erase(user_id, self.log, self.registry, self.settings, **options)


@pytest.fixture
def house(own_redis, stream_settings, kafka_producer):
    made = House(stream_settings(own_redis), kafka_producer)
    yield made
    made.stop()
    made.ports.close()


@pytest.fixture
def bundle(house):
    """A bundle with nothing but batch scores."""
    staged = staging_folder(house.registry, "v1")
    columns = {"user_id": ["ada", "bob"], "item_ids": [["i1"], ["i2"]], "scores": [[0.5], [0.25]]}
    pq.write_table(pa.table(columns, SCHEMA), staged / BATCH_SCORES)
    publish(house.registry, staged, Manifest("v1", "", "", "", "", 0, 0, 8, 0))


def test_everything_of_the_user_goes_and_nothing_of_others(house, bundle, own_redis) -> None:
    house.start()
    for number in range(4):
        house.act("ada" if number % 2 else "bob", number)
    house.send(house.topics.events, "ada", b"\xffrubbish")
    house.send(house.topics.events, "bob", b"\xffrubbish")
    # Under a foreign key; and one that only may be about her.
    house.send(house.topics.events, "bob", Event(event_id="e", user_id="ada", item_id="i", kind="click"))
    house.send(house.topics.events, "bob", b"\xffadamant")
    for user_id in ("ada", "bob"):
        wait_until(lambda user_id=user_id: house.row(USER_STATE, user_id).get("revision") == 4)
        wait_until(lambda user_id=user_id: house.row(USER_PROFILE, user_id).get("profile_segment"))
        house.store.write([Write(USER_BATCH_SCORES, (user_id,), {"batch_item_ids": ["i1"]})])
    wait_until(lambda: house.logged("ada") == {"events": 2, "feedback": 2, "impressions": 2, "users": 2})
    bobs = house.logged("bob")

    receipt = house.erase("ada", reason="asked to")

    assert set(house.row(USER_STATE, "ada")) == {"state", "offsets"}
    for view in (USER_EMBEDDING, USER_BATCH_SCORES):
        assert house.row(view, "ada") == {}
    assert set(house.row(USER_PROFILE, "ada")) == {"profile_offsets"}
    assert house.row(USER_STATE, "bob")["revision"] == 4
    assert house.logged("ada") == dict.fromkeys(bobs, 0)
    assert house.logged("bob") == bobs
    assert [row.user_id for row in read_batch_scores(open_current(house.registry).file(BATCH_SCORES))] == ["bob"]
    removed = {"online store: user_state": 1, "online store: user_batch_scores": 1, "online store: user_profile": 1,
               "event log: events": 2, "event log: feedback": 2, "event log: impressions": 2, "event log: users": 3,
               f"bundles: v1/{BATCH_SCORES}": 1}  # fmt: skip
    embedded = bool(house.settings.kafka.log_id)
    # The embedded broker cannot delete: there they stay, and cannot be sent again.
    removed |= {} if embedded else {"dead letters: events": 2}
    assert {
        place: count for place, count in receipt.removed.items() if not embedded or "letters" not in place
    } == removed
    assert len(receipt.dead_letters_left) == (3 if embedded else 1)
    assert receipt.not_found == ["online store: user_embedding", *(["dead letters"] if embedded else [])]
    letters = read_letters(house.settings.kafka, Choice())
    assert {one.letter.key for one in letters if one.position not in receipt.dead_letters_left} == {b"bob"}
    held = receipt.kafka_holds[house.topics.events].meaning
    assert held.startswith("in memory, until the embedded broker stops" if embedded else "for ever: retention.ms is -1")
    assert not receipt.came_back

    # The user comes back, the store is lost, everything is read again and rebuilt: only what is new is there.
    house.act("ada", 9)
    wait_until(lambda: house.row(USER_STATE, "ada").get("revision") == 2)
    wait_until(lambda: house.logged("ada")["events"] == 1)
    house.stop()
    own_redis.client().flushall()
    house.start()
    wait_until(lambda: house.row(USER_STATE, "ada").get("revision") == 2)
    wait_until(lambda: house.row(USER_STATE, "bob").get("revision") == 4)
    assert house.logged("ada")["events"] == 1
    house.stop()
    rebuild(house.log, Path("nowhere"), house.settings, project="new", progress=False)
    fresh = OnlineStore(house.settings.redis, "new")
    (row,) = fresh.read(USER_STATE, [("ada",)])
    assert windows.recent_items(windows.decode(row.cells["state"])) == ["i9"]
    fresh.close()

    # A second erasure finds what has come since.
    house.start()
    assert house.erase("ada").removed["event log: events"] == 1


def test_a_plain_tombstone_keeps_the_user_out_of_all_that_reads_the_log(house) -> None:
    house.start()
    house.act("ada", 1)
    house.act("bob", 2)
    wait_until(lambda: house.row(USER_STATE, "ada").get("revision") == 2 and house.row(USER_STATE, "bob"))
    house._producer.send(house.topics.users, b"ada", None).result(10)
    wait_until(lambda: "revision" not in house.row(USER_STATE, "ada"))
    wait_until(lambda: house.logged("ada")["users"] == 2)
    house.stop()
    assert house.logged("ada")["events"] == 1, "only `headrace erase` rewrites the log"
    summary = rebuild(house.log, Path("nowhere"), house.settings, project="new", progress=False)
    assert (summary.users, summary.erased_users) == (1, 1)
    # Nor does anybody train on them, or score them.
    log = open_log(house.log)
    assert {event.user_id for event in user_events(log.events())} == {"bob"}
    assert "ada" not in {user.user_id for user in log.users()}
    materialize(house.log, None, house.settings, progress=False)
    assert "revision" not in house.row(USER_STATE, "ada")
    # The rest, for all whose tombstones came; once.
    (receipt,) = erase_pending(house.log, house.registry, house.settings, reason="nightly")
    assert (receipt.user_id, receipt.reason, receipt.removed["event log: events"]) == ("ada", "nightly", 1)
    assert set(house.logged("ada").values()) == {0}
    assert house.logged("bob")["events"] == 1
    assert erase_pending(house.log, house.registry, house.settings) == []


def test_without_a_worker_nothing_is_rewritten(house) -> None:
    house.start()
    house.act("ada", 1)
    wait_until(lambda: house.logged("ada")["impressions"] == 1)
    house.stop()
    before = house.logged("ada")
    with pytest.raises(StageError, match="no stream worker has taken the tombstone"):
        house.erase("ada", timeout_seconds=0.2)
    assert house.logged("ada") == before


def test_an_id_that_cannot_be_one_is_refused(house) -> None:
    with pytest.raises(MalformedEventError, match="user_id: must not be empty"):
        house.erase("")


def test_the_command_writes_the_receipt(house, tmp_path, monkeypatch) -> None:
    house.start()
    house.act("ada", 1)
    wait_until(lambda: house.row(USER_STATE, "ada").get("revision") == 2)
    for name, value in house.environment.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "receipt.json"
    done = CliRunner().invoke(app, ["erase", "ada", "--reason", "request 7", "--receipt", str(path)])
    assert done.exit_code == 0, done.output
    receipt = json.loads(path.read_text())
    assert (receipt["user_id"], receipt["reason"], receipt["removed"]["event log: users"]) == ("ada", "request 7", 2)
    assert f"receipt: {path}" in done.stdout
    assert "nothing to do" in CliRunner().invoke(app, ["erase", "--pending"]).stdout
    assert "say one of the two" in CliRunner().invoke(app, ["erase"]).stderr


def test_retention_is_said_from_the_topics_settings(house) -> None:
    class Entry:
        def __init__(self, value: str) -> None:
            self.value = value

    def told(**config: str):
        return _retention({name.replace("_", "."): Entry(value) for name, value in config.items()})

    assert told(cleanup_policy="delete", retention_ms="604800000", segment_ms="1000").until
    assert "for ever" in told(cleanup_policy="delete", retention_ms="-1", segment_ms="1").meaning
    assert "compacted" in told(cleanup_policy="compact", delete_retention_ms="86400000").meaning
    real = house.settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:9", "log_id": ""})
    with pytest.raises(StageError, match="kafka"):
        retention_of(real, ["t"], 0.2)
