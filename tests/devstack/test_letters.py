"""Dead letters: listed, shown, sent again and never twice by accident."""

import json

import pytest
from typer.testing import CliRunner

from core.codec import from_ms
from core.errors import ConfigError, NotFoundError
from core.topics import CONTENT_TYPE, JSON_CONTENT, Topics, dead_letter
from devstack.cli import app
from devstack.letters import BEGUN, NOTE, SENT_FROM, Choice, read_letters, read_to_end, redrive
from features import windows
from features.definitions import USER_STATE
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
