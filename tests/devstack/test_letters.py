"""Dead letters: listed, shown, sent again and never twice by accident."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from core.codec import from_ms
from core.errors import ConfigError, NotFoundError
from core.kafka import KafkaProducer, topic_sources
from core.settings import load_settings
from core.topics import CONTENT_TYPE, JSON_CONTENT, Topics, dead_letter
from devstack import letter_removal
from devstack.cli import app
from devstack.letter_removal import may_name_user, remove_letters, users_of
from devstack.letters import BEGUN, NOTE, SENT_FROM, Choice, Letter, erased_letters, read_letters, read_to_end, redrive
from devstack.topics import ensure_topics
from features import windows
from features.definitions import USER_STATE
from features.stores.erasures import Erasure
from features.windows import Position
from headrace.v1.events_pb2 import DeadLetter, Event

NOW_MS = 1_700_000_000_000


def as_json(user_id: str) -> bytes:
    event = {"event_id": f"e-{user_id}", "user_id": user_id, "item_id": "i", "kind": "click",
             "event_time": "2023-11-14T22:13:20Z"}  # fmt: skip
    return json.dumps(event).encode()


@pytest.fixture
def house(shared_redis, stream_settings, start_reader, kafka_producer):
    """Three letters from a real reader: JSON without its header, rubbish, a foreign key."""
    settings = stream_settings(shared_redis)
    topic = Topics(settings.kafka.topic_prefix).events
    part = start_reader(settings)
    sent = [
        kafka_producer.send(topic, b"ada", as_json("ada"), {"trace": b"7"}),
        kafka_producer.send(topic, b"ada", b"\xff\x00rubbish"),
        kafka_producer.send(topic, b"bob", Event(event_id="e", user_id="eve", item_id="i", kind="click",
                                                 event_time=from_ms(NOW_MS)).SerializeToString()),
    ]  # fmt: skip
    part.wait_for([future.result(10) for future in sent])
    return settings, part


def revision(part, user_id: str) -> int:
    (row,) = part.store.read(USER_STATE, [(user_id,)])
    return windows.decode(row.cells.get("state", b"")).revision


def test_letters_are_chosen_by_topic_reason_key_and_position(house) -> None:
    kafka = house[0].kafka
    letters = read_letters(kafka, Choice())
    assert len(letters) == 3
    assert [one.letter.key for one in read_letters(kafka, Choice(reason="KEY"))] == [b"bob"]
    assert len(read_letters(kafka, Choice(topic="events", key="ada"))) == 2
    assert read_letters(kafka, Choice(topic="items")) == []
    assert read_letters(kafka, Choice((letters[1].position,))) == [letters[1]]
    with pytest.raises(NotFoundError, match="events/0/999"):
        read_letters(kafka, Choice(("events/0/999",)))
    with pytest.raises(ConfigError, match="events, feedback, impressions, items, users"):
        read_letters(kafka, Choice(topic="clicks"))


def test_a_letter_is_sent_again_whole_and_only_once(house) -> None:
    settings, part = house
    kafka = settings.kafka
    wanted = [one for one in read_letters(kafka, Choice(key="ada")) if one.letter.headers]
    result = redrive(kafka, wanted, set_headers={CONTENT_TYPE: JSON_CONTENT})
    part.wait_for(list(result.sent.values()))
    assert revision(part, "ada") == 1
    (message,) = [m for m in read_to_end(kafka, [wanted[0].letter.topic]) if SENT_FROM in dict(m.headers() or ())]
    assert (message.key(), message.value()) == (b"ada", as_json("ada"))
    headers = {"trace": b"7", CONTENT_TYPE: JSON_CONTENT, SENT_FROM: wanted[0].position.encode()}
    assert dict(message.headers()) == headers
    # The second run reads what the first one noted.
    second = redrive(kafka, read_letters(kafka, Choice(tuple(result.sent))))
    assert not second.sent
    assert "--again" in second.skipped[wanted[0].position]
    json_header = {CONTENT_TYPE: JSON_CONTENT}
    third = redrive(kafka, read_letters(kafka, Choice(tuple(result.sent))), again=True, set_headers=json_header)
    part.wait_for(list(third.sent.values()))
    assert revision(part, "ada") == 1, "a known event id"
    assert list(third.sent) == [wanted[0].position]
    assert len(read_letters(kafka, Choice())) == 3, "notes are no letters"


def test_a_run_that_was_cut_off_is_told_and_not_repeated(house, kafka_producer) -> None:
    kafka = house[0].kafka
    one = read_letters(kafka, Choice(key="bob"))[0]
    headers = {SENT_FROM: one.position.encode(), NOTE: BEGUN}
    kafka_producer.send(dead_letter(one.letter.topic), one.letter.key, b"", headers).result(10)
    result = redrive(kafka, read_letters(kafka, Choice(key="bob")))
    assert not result.sent
    assert "perhaps sent" in result.skipped[one.position]


def test_what_was_cut_is_not_sent(house, kafka_producer) -> None:
    kafka = house[0].kafka
    topic = Topics(kafka.topic_prefix).users
    letter = DeadLetter(key=b"u", value=b"v", topic=topic, offset=5, reason="too long (value cut from 2000000 bytes)")
    kafka_producer.send(dead_letter(topic), b"u", letter.SerializeToString()).result(10)
    result = redrive(kafka, read_letters(kafka, Choice(topic="users")))
    assert not result.sent
    assert f"{topic}/0/5" in next(iter(result.skipped.values()))


def test_letters_of_an_erased_user_are_not_sent(house) -> None:
    settings, part = house
    letters = read_letters(settings.kafka, Choice())
    assert not any(erased_letters(settings)(one.letter) for one in letters)
    (source,) = topic_sources(settings.kafka, [letters[0].letter.topic]).values()
    cut = {(source, one.letter.partition): one.letter.offset for one in letters if one.letter.key == b"ada"}
    part.records.add(Erasure("ada", Position(1, 0, 0), cut, NOW_MS))
    result = redrive(settings.kafka, letters, is_erased=erased_letters(settings))
    ada = {one.position for one in letters if one.letter.key == b"ada"}
    assert result.skipped == dict.fromkeys(ada, "its user was erased since")
    assert len(result.sent) == 1


@pytest.mark.real_kafka
def test_some_letters_are_removed_and_the_others_keep_their_positions(house, kafka_producer) -> None:
    settings, part = house
    kafka = settings.kafka
    if kafka.log_id:
        pytest.skip("the embedded broker cannot delete messages")
    part.stop()
    before = {one.position: one for one in read_letters(kafka, Choice())}
    bob = next(position for position, one in before.items() if one.letter.key == b"bob")
    redrive(kafka, [before[bob]])
    before[bob] = dataclasses.replace(before[bob], sent="done")
    # All in one partition: what goes lies before what stays, and behind it.
    topic = dead_letter(before[bob].letter.topic)
    others = [DeadLetter(key=b"ada", value=b"%d" % n, topic=before[bob].letter.topic, reason="r") for n in range(4)]
    sent = [kafka_producer.send(topic, b"ada", other.SerializeToString()).result(10) for other in others]
    positions = [f"events/{one.partition}/{one.offset}" for one in sent]
    unwanted = {*positions[:1], positions[2], bob}
    assert set(remove_letters(kafka, lambda one: one.position in unwanted)) == unwanted
    after = {one.position: one for one in read_letters(kafka, Choice())}
    assert after.keys() == before.keys() - {bob} | {positions[1], positions[3]}
    assert all(after[position] == before[position] for position in before.keys() - {bob})
    # Nothing of them can be read, notes and copies included.
    raw = list(read_to_end(kafka, [topic]))
    assert b"bob" not in {message.key() for message in raw}
    assert {b"1", b"3"} <= {DeadLetter.FromString(message.value()).value for message in raw}
    assert not {b"0", b"2"} & {DeadLetter.FromString(message.value()).value for message in raw}
    # A moved letter can be named, sent and removed as before.
    assert redrive(kafka, read_letters(kafka, Choice((positions[1],)))).sent.keys() == {positions[1]}
    assert read_letters(kafka, Choice((positions[1],)))[0].sent == "done"
    assert remove_letters(kafka, lambda one: one.position == positions[1]) == [positions[1]]
    assert {one.position for one in read_letters(kafka, Choice())} == after.keys() - {positions[1]}
    assert remove_letters(kafka, lambda one: one.position == positions[1]) == []


@pytest.mark.real_kafka
def test_a_removal_that_was_cut_off_before_the_cut_loses_and_doubles_nothing(house, monkeypatch) -> None:
    settings, part = house
    kafka = settings.kafka
    if kafka.log_id:
        pytest.skip("the embedded broker cannot delete messages")
    part.stop()
    before = {one.position: one for one in read_letters(kafka, Choice())}
    last = {}
    for position in before:
        partition, offset = position.split("/")[1:]
        last[partition] = max(int(offset), last.get(partition, -1))
    # The newest of each partition goes, so that all others are copied.
    unwanted = {f"events/{partition}/{offset}" for partition, offset in last.items()}

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(letter_removal, "_cut", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_letters(kafka, lambda one: one.position in unwanted)
    monkeypatch.undo()
    assert {one.position: one for one in read_letters(kafka, Choice())} == before
    assert set(remove_letters(kafka, lambda one: one.position in unwanted)) == unwanted
    assert read_letters(kafka, Choice()) == [one for position, one in before.items() if position not in unwanted]


def test_the_embedded_broker_says_that_it_cannot_delete(embedded_kafka) -> None:
    kafka = load_settings(overrides={"kafka": {**embedded_kafka, "topic_prefix": "letters"}}).kafka
    ensure_topics(kafka)
    topic = Topics(kafka.topic_prefix).events
    producer = KafkaProducer(kafka)
    letter = DeadLetter(key=b"u", topic=topic, reason="r")
    producer.send(dead_letter(topic), b"u", letter.SerializeToString()).result(10)
    producer.close()
    with pytest.raises(ConfigError, match="cannot delete messages"):
        remove_letters(kafka, lambda _: True)


EVENT = Event(event_id="e", user_id="ada", item_id="eve")


@pytest.mark.parametrize(
    ("key", "value", "users"),
    [
        (b"ada", b"\xff", {"ada"}),
        (b"bob", EVENT.SerializeToString(), {"bob", "ada"}),
        (b"", b'{"user_id": "ada", "item_id": 7}', {"ada"}),
        (b"", b'{"userId": "ada"}', {"ada"}),
        (b"\xff", b'{"user_id": "ada"', set()),
        (b"", b'["ada"]', set()),
        (b"", b"an adamant text", set()),
    ],
)
def test_a_letter_is_about_its_key_and_the_user_in_its_value(key, value, users) -> None:
    letter = Letter("events/0/0", DeadLetter(key=key, value=value, topic="events"))
    assert users_of(letter, {"events": Event}) == users
    assert may_name_user(letter, "ada")
    assert not may_name_user(letter, "zoe")


def test_the_commands(house, tmp_path) -> None:
    settings, part = house
    # Its lines would be among those of the command, which runs in this process here.
    part.stop()
    kafka = settings.kafka
    config = tmp_path / "settings.toml"
    config.write_text(
        f'[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\ntopic_prefix = "{kafka.topic_prefix}"\n'
        f'log_id = "{kafka.log_id}"\nfetch_wait_max_ms = {kafka.fetch_wait_max_ms}\n'
    )

    def run(*arguments: str):
        return CliRunner().invoke(app, ["dead-letter", *arguments, "--config", str(config)])

    rows = [json.loads(line) for line in run("list", "--json").stdout.splitlines()]
    assert len(rows) == 3
    by_key = {row["key"]: row for row in rows}
    assert "key: must be the user_id" in by_key["bob"]["reason"]
    listed = run("list")
    assert "3 dead letters" in listed.stdout
    assert by_key["bob"]["position"] in listed.stdout
    rubbish = next(row for row in rows if row["key"] == "ada" and "protobuf" in row["reason"])
    shown = [run("show", row["position"]).stdout for row in rows if row["key"] == "ada"]
    assert any("ff 00 72 75 62" in text and "..rubbish" in text for text in shown)
    assert any('"event_id": "e-ada"' in text and "header trace" in text for text in shown)
    assert json.loads(run("show", rubbish["position"], "--json").stdout)["source"] == rubbish["source"]
    assert "say which" in run("redrive").stderr
    assert run("redrive", "--key", "bob").stdout.endswith("1 sent, 0 left\n")
    assert json.loads(run("redrive", "--all", "--json").stdout)["skipped"].keys() == {by_key["bob"]["position"]}
    assert run("show", "events/0/999").exit_code == 1
    assert "say which" in run("remove").stderr
    if not kafka.log_id:
        assert run("remove", rubbish["position"]).stdout == f"removed {rubbish['position']}\n1 removed\n"
        assert len(run("list", "--json").stdout.splitlines()) == 2
