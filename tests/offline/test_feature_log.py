"""Logged features made again from a log: imported events, events of two topics, descriptions that change; what is gone
is named. The stream's side is played here by its own functions; tests/parity does it with real processes."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from core.codec import from_ms
from core.settings import load_settings
from features import feature_log, item_stats, windows
from features.catalog import Catalog
from features.item_stats import ItemPartial
from features.stores.erasures import Erasure, Erasures, UnerasedLog
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, ITEMS, Source, to_table
from features.vectors import ranker_input
from features.windows import Outcome, Position, UserState
from headrace.v1.events_pb2 import Event, Feedback, Impression, ImpressionList, Item
from offline.cli import app
from offline.feature_log import Rebuilder, compare, logged_answers

SETTINGS = load_settings()
FEATURES = SETTINGS.features
NOW_MS = 1_780_000_000_000
SOURCES = {EVENTS: 0xE, FEEDBACK: 0xF, IMPRESSIONS: 0x1}
ITEM_IDS = [f"i{number}" for number in range(6)]


class House:
    """A log and, beside it, what a stream and a ranker hold of it."""

    def __init__(self, root: Path) -> None:
        self.log, self.root = EventLog(root), root
        self.states: dict[str, UserState] = defaultdict(UserState)
        self.partials: dict[tuple[str, int], ItemPartial] = defaultdict(ItemPartial)
        self.catalog = Catalog(FEATURES, with_revisions=True)
        self.clock_ms = NOW_MS
        self._rows: dict[tuple, list] = defaultdict(list)
        self._next: dict[tuple, int] = defaultdict(int)

    def describe(self, number: int, item: Item) -> None:
        self.catalog.upsert(item)
        self.log.write(ITEMS, to_table(ITEMS, [item], [Source("items", 0, number, NOW_MS + number)]), f"items-{number}")

    def message(self, table, user_id: str, item_ids: list[str], number: int):
        time_ms = from_ms(self.clock_ms - 5000 * (number % 3))
        if table is IMPRESSIONS:
            shown = [Impression(item_id=item_id, propensity=1.0) for item_id in item_ids]
            return ImpressionList(event_id=f"s{number}", user_id=user_id, event_time=time_ms, impressions=shown)
        kind = Event if table is EVENTS else Feedback
        # Every seventh is the one before it again.
        return kind(event_id=f"{kind.__name__}{number - (number % 7 == 6)}", user_id=user_id, item_id=item_ids[0],
                    kind="click", event_time=time_ms, categories=["tea", item_ids[0]])  # fmt: skip

    def import_(self, numbers: range) -> None:
        messages = [
            self.message(EVENTS, ("u1", "u2", "u8")[number % 3], [ITEM_IDS[number % 4]], number) for number in numbers
        ]
        self.log.write(EVENTS, to_table(EVENTS, messages), "imported")
        for message in sorted(messages, key=lambda one: (one.event_time.ToMilliseconds(), one.event_id)):
            self.apply(windows.as_user_event(message), [message.item_id], -1)

    def send(self, table, user_id: str, *item_ids: str, features: bytes = b"") -> None:
        """Through the topic, and at once into the rows."""
        partition = int(user_id[1:]) % 2
        where = (table, partition)
        offset = self._next[where]
        self._next[where] += 1
        self.clock_ms += 700
        message = self.message(table, user_id, list(item_ids), 1000 + sum(self._next.values()))
        if features:
            message.features, message.recommendation_id = features, f"r{offset}"
        self._rows[where].append((message, Source("topic", partition, offset, self.clock_ms)))
        position = Position(SOURCES[table], partition, offset)
        make = windows.as_impression_event if table is IMPRESSIONS else windows.as_user_event
        self.apply(make(message, position), list(item_ids), partition)

    def apply(self, event, item_ids: list[str], partition: int) -> None:
        (outcome,) = windows.apply(self.states[event.user_id], [event], FEATURES)
        if outcome is Outcome.APPLIED:
            for item_id in item_ids:
                item_stats.apply(self.partials[item_id, partition], event._replace(item_id=item_id), FEATURES)

    def broadcast(self, *partitions: int) -> None:
        """The replicas hear of these partitions' rows."""
        for (item_id, partition), partial in self.partials.items():
            if partition in partitions:
                self.catalog.put_stats(item_stats.as_message(item_id, partition, partial, FEATURES))

    def answer(self, user_id: str, item_ids: list[str] = ITEM_IDS) -> None:
        """Ranks, shows and logs."""
        rows = self.catalog.rows(item_ids)
        scores, bits = np.linspace(0.1, 0.9, len(rows), dtype=np.float32), np.arange(len(rows), dtype=np.int32) + 1
        state = windows.decode(windows.encode(self.states[user_id]))
        made = ranker_input(state, self.catalog, rows, scores, bits, self.clock_ms + 50, FEATURES)
        features = feature_log.note(state, item_ids, made, self.catalog, self.clock_ms + 50, "gone")
        self.send(IMPRESSIONS, user_id, *item_ids[:2], features=features.SerializeToString())

    def write(self) -> UnerasedLog:
        for (table, partition), rows in self._rows.items():
            messages, sources = zip(*rows, strict=True)
            name = f"{SOURCES[table]:016x}-p{partition}-{0:012d}-{len(rows) - 1:012d}"
            self.log.write(table, to_table(table, messages, sources), name)
        return UnerasedLog(self.root)

    def compared(self, **more):
        log = self.write()
        answers = list(logged_answers(log))
        return compare(answers, Rebuilder(log, self.root / "bundles", SETTINGS, answers, **more))


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Eight answers, between events of two topics; replicas hear of the two partitions at different times."""
    house = House(tmp_path / "log")
    for number, item_id in enumerate(ITEM_IDS[:4]):
        house.describe(number, Item(item_id=item_id, categories=["tea"], year=2000 + number, price=number))
    house.import_(range(40))
    house.broadcast(-1)
    for turn in range(8):
        user_id = f"u{turn % 4}"
        for step in range(5):
            house.send((EVENTS, FEEDBACK)[step % 2], user_id, ITEM_IDS[(turn + step) % 5])
        house.broadcast(turn % 2)
        if turn == 4:
            house.describe(10, Item(item_id="i1", categories=["coffee"], year=1980))
        house.answer(user_id)
    return house


def test_each_number_of_each_answer_comes_again(house: House) -> None:
    found = house.compared()
    assert (found.answers, found.items, found.equal_items) == (8, 48, 48)
    assert not found.differing
    assert not found.not_rebuilt


def test_the_command_says_what_differs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.write()
    arguments = ["skew", "--data", str(house.root), "--registry", str(house.root / "bundles")]
    done = CliRunner().invoke(app, [*arguments, "--json", "--answers", "5"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "answers": 5, "unreadable_answers": 0, "items": 30, "equal_items": 30, "differing": {}, "not_rebuilt": {},
    }  # fmt: skip
    # As a definition that training has changed and serving has not.
    monkeypatch.setenv("HEADRACE_FEATURES__HALF_LIVES_SECONDS", "[3600, 86400]")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "log_popularity_long" in done.stdout
    assert "log_popularity_short" not in done.stdout


def test_what_was_imported_later_is_left_out(house: House) -> None:
    later = house.message(EVENTS, "u1", ["i1"], 999)
    later.event_time.CopyFrom(from_ms(NOW_MS + 1))
    house.log.write(EVENTS, to_table(EVENTS, [later]), "later")
    assert house.compared(before_ms=NOW_MS + 1).equal_items == 48
    assert house.compared().not_rebuilt["events of the user"] > 0


def test_events_that_the_log_has_lost_are_named_and_not_guessed(house: House) -> None:
    house.write()
    (path,) = [path for path in house.log.files(FEEDBACK) if "-p1-" in path]
    Path(path).unlink()
    del house._rows[FEEDBACK, 1]
    found = house.compared()
    assert not found.differing
    assert set(found.not_rebuilt) == {"events of the user", "events of an item"}
    assert 0 < found.equal_items == found.items - found.not_rebuilt.total()


def erase(house: House, user_id: str) -> None:
    cut = {(source, partition): 10_000 for source in SOURCES.values() for partition in (0, 1)}
    Erasures(str(house.root)).add(Erasure(user_id, Position(0xA, 0, 5), cut, house.clock_ms))


def test_of_an_erased_user_nothing_is_compared(house: House) -> None:
    erase(house, "u0")
    found = house.compared()
    assert found.answers == 6
    assert not found.differing
    assert found.not_rebuilt["events of an item"] > 0


def test_later_events_are_not_taken_for_those_that_were_erased(house: House) -> None:
    """Of what was imported no position says which events a sum includes."""
    erase(house, "u8")
    later = [house.message(EVENTS, "u9", [item_id], 200 + number) for number, item_id in enumerate(ITEM_IDS * 9)]
    for message in later:
        message.event_time.CopyFrom(from_ms(NOW_MS + 1000))
    house.log.write(EVENTS, to_table(EVENTS, later), "later")
    found = house.compared()
    assert found.answers == 8
    assert not found.differing
    # i4 and i5 were never imported.
    assert found.not_rebuilt == {"events of an item": 8 * 4}


def test_a_description_that_nobody_has_is_named(house: House) -> None:
    for path in house.log.files(ITEMS):
        if "items-10" in path:
            Path(path).unlink()
    found = house.compared()
    assert not found.differing
    assert found.not_rebuilt["the description of an item"] > 0


def test_unreadable_features_do_not_stop_the_others(house: House) -> None:
    house.send(IMPRESSIONS, "u1", "i1", features=b"\xff\xff")
    found = house.compared()
    assert (found.answers, found.unreadable_answers, found.equal_items) == (9, 1, 48)
    assert not found.not_rebuilt
    house.send(IMPRESSIONS, "u1", "i1")
    assert house.compared().answers == 9, "an answer that logged none is none of them"
