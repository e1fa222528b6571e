"""The online store rebuilt from the log that a real reader wrote: equal rows, and the stream goes on behind them."""

import json
import time

import pytest
from typer.testing import CliRunner

from core.codec import from_ms
from core.kafka import topic_sources
from core.topics import Topics
from features import positions, windows
from features.definitions import ITEM_PROFILE, ITEM_STATS, USER_EMBEDDING, USER_PROFILE, USER_STATE
from features.item_stats import decode
from features.stores.erasures import Erasure, Erasures
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, ITEMS, USERS, Source, deletions, to_table
from features.stores.layout import row_key
from features.stores.online import OnlineStore, Write, read_offsets
from features.windows import Position
from headrace.v1.events_pb2 import Event, Feedback, Impression, ImpressionList, Item, ItemStats, User
from offline.cli import app
from offline.rebuild import rebuild

NOW_MS = 1_700_000_000_000
USERS_SENT = [f"u{n}" for n in range(6)]
PARTITIONS = range(4)
# Field 100 of a later version: a text.
LATER = b"\xa2\x06\x03new"


def event(number: int, kind=Event):
    return kind(event_id=f"{kind.__name__}{number}", user_id=USERS_SENT[number % 6], item_id=f"i{number % 5}",
                kind="click", event_time=from_ms(NOW_MS + 1000 * number), categories=["tea"])  # fmt: skip


def shown(number: int) -> ImpressionList:
    impressions = [Impression(item_id=f"i{n}", position=n, propensity=1.0) for n in range(3)]
    return ImpressionList(event_id=f"s{number}", user_id=USERS_SENT[number % 6], impressions=impressions,
                          event_time=from_ms(NOW_MS + 1000 * number))  # fmt: skip


def rounded(number: float) -> float:
    """Sums depend on the order of the events, in their last bits."""
    return float(f"{number:.9g}")


def compared(row) -> tuple:
    """A user's row without its positions, which must agree with each other."""
    state = windows.decode(row.cells.get("state", b""))
    assert read_offsets(row.raw.get("offsets", b"")) == state.offsets
    state.offsets = {}
    state.affinity = [
        (mark, {bucket: rounded(total) for bucket, total in sums.items()}) for mark, sums in state.affinity
    ]
    return state, row.cells.get("revision"), row.cells.get("watermark_ms")


class House:
    def __init__(self, settings, producer, start_reader) -> None:
        self.settings, self._producer, self._start = settings, producer, start_reader
        self.topics = Topics(settings.kafka.topic_prefix)
        self.log = settings.streams.event_log_path
        self.part = start_reader(settings)

    def send(self, numbers) -> list:
        futures = []
        for number in numbers:
            for topic, message in (
                (self.topics.events, event(number)),
                (self.topics.events, event(number - number % 7)),  # often a duplicate
                (self.topics.feedback, event(number, Feedback)),
                (self.topics.impressions, shown(number)),
            ):
                futures.append(self._producer.send(topic, message.user_id.encode(), message.SerializeToString()))
        return [future.result(10) for future in futures]

    def play(self, numbers) -> None:
        self.part.wait_for(self.send(numbers))

    def stop(self) -> None:
        self.part.stop()

    def restart(self, settings=None) -> None:
        self.part = self._start(settings or self.settings)

    def rows(self, project: str | None = None) -> tuple[dict, dict]:
        """What the store holds: states and statistics, without positions."""
        store = OnlineStore(self.settings.redis, project or self.settings.features.project)
        rows = store.read(USER_STATE, [(user,) for user in USERS_SENT])
        states = {user: compared(row) for user, row in zip(USERS_SENT, rows, strict=True)}
        keys = [(f"i{n}", str(partition)) for n in range(5) for partition in PARTITIONS]
        stats = {}
        for key, row in zip(keys, store.read(ITEM_STATS, keys), strict=True):
            partial = decode(ItemStats.FromString(row.cells.get("stats", b"")))
            sums = [(landmark, rounded(total)) for landmark, total in partial.popularity]
            stats[key] = (partial.revision, partial.watermark_ms, partial.kinds, sums)
        store.close()
        return states, stats


@pytest.fixture
def house(own_redis, stream_settings, kafka_producer, start_reader) -> House:
    return House(stream_settings(own_redis), kafka_producer, start_reader)


def run(house, **options):
    return rebuild(house.log, house.settings.registry.path, house.settings, progress=False, **options)


def test_a_lost_store_is_rebuilt_and_the_stream_goes_on_without_counting_twice(house, own_redis) -> None:
    house.play(range(40))
    house.stop()
    expected = house.rows()
    own_redis.client().flushall()
    summary = run(house)
    assert (summary.users, summary.left_to_stream, summary.partitions) == (6, 0, len({*_partitions(house)}))
    assert house.rows() == expected
    # The worker starts behind the log, and even where it does not the rows know what they include.
    house.restart()
    house.play(range(40, 60))
    house.stop()
    run(house, project="check")
    assert house.rows() == house.rows("check")
    assert house.rows() != expected


def _partitions(house) -> set[int]:
    from features.stores.log_positions import positions

    return {partition for _, partition in positions(EventLog(house.log), EVENTS)}


def test_replayed_from_the_beginning_rebuilt_rows_change_nothing(house, own_redis) -> None:
    house.play(range(30))
    house.stop()
    expected = house.rows()
    own_redis.client().flushall()
    run(house)
    for partition in PARTITIONS:
        own_redis.client().delete(f"{house.settings.features.project}:marker:{partition}")
    house.restart()
    house.play([30])
    after = house.rows()
    unchanged = [user for user in USERS_SENT if user not in (event(30).user_id, event(28).user_id)]
    assert {user: after[0][user] for user in unchanged} == {user: expected[0][user] for user in unchanged}


def test_beside_the_live_store_then_cut_over(house, own_redis) -> None:
    house.play(range(30))
    house.part.sink.flush()
    summary = run(house, project="next")
    live = house.rows()
    assert house.rows("next") == live
    assert summary.project == "next"
    # Events go on while nobody reads for the new project; after the cut it catches up.
    house.play(range(30, 40))
    live = house.rows()
    house.stop()
    features = house.settings.features.model_copy(update={"project": "next"})
    streams = house.settings.streams.model_copy(update={"group_id": "next"})
    house.restart(house.settings.model_copy(update={"features": features, "streams": streams}))
    house.part.wait_for(house.send([40]))
    house.stop()
    ahead, _ = house.rows("next")
    others = [user for user in USERS_SENT if user not in (event(40).user_id, event(40 - 40 % 7).user_id)]
    assert {user: ahead[user] for user in others} == {user: live[0][user] for user in others}


def test_rows_that_include_more_than_the_log_stay(house) -> None:
    house.play(range(20))
    house.stop()
    before, _ = house.rows()
    store = house.part.store
    (row,) = store.read(USER_STATE, [("u0",)])
    state = windows.decode(row.cells["state"])
    state.offsets = {where: offset + 100 for where, offset in state.offsets.items()}
    offsets = positions.encode(state.offsets)
    store.write([Write(USER_STATE, ("u0",), {"state": windows.encode(state), "offsets": offsets, "revision": 77})])
    summary = run(house)
    assert summary.left_to_stream == 1
    after, _ = house.rows()
    assert after.pop("u0")[1] == 77
    before.pop("u0")
    assert after == before


def test_imported_rows_count_apart_and_the_sums_of_a_whole_log_go(house, own_redis) -> None:
    house.play(range(10))
    house.stop()
    imported = [event(n) for n in range(100, 106)]
    EventLog(house.log).write(EVENTS, to_table(EVENTS, imported), "import-00000")
    store = house.part.store
    store.write([Write(ITEM_STATS, ("i4", "-1"), {"stats": b"", "revision": 9})])
    run(house)
    (row,) = store.read(ITEM_STATS, [("i0", "-1")])
    assert row.cells["revision"] == 2
    assert "offsets" not in row.cells
    own_redis.client().flushall()
    run(house)
    (state,) = store.read(USER_STATE, [("u0",)])
    assert len(windows.decode(state.cells["state"]).history) == 5


def test_profiles_and_items_carry_their_positions_and_erased_users_stay_erased(house) -> None:
    house.play(range(12))
    house.stop()
    log = EventLog(house.log)
    sources = topic_sources(house.settings.kafka, house.topics.inbound)
    users, items = sources[house.topics.users], sources[house.topics.items]
    people = [User(user_id="u0", segment="a"), User(user_id="u1", segment="b")]
    places = [Source(house.topics.users, 2, offset, NOW_MS) for offset in (3, 4)]
    log.write(USERS, to_table(USERS, people, places), f"{users:016x}-p2-000000000000-000000000009")
    thing = Item.FromString(Item(item_id="i0", title="Tea").SerializeToString() + LATER)
    place = [Source(house.topics.items, 1, 7, NOW_MS)]
    log.write(ITEMS, to_table(ITEMS, [thing], place), f"{items:016x}-p1-000000000000-000000000007")
    (row,) = house.part.store.read(USER_STATE, [("u5",)])
    cut = dict.fromkeys(read_offsets(row.raw["offsets"]), 10**6)
    Erasures(house.log).add(Erasure("u5", Position(users, 2, 11), cut))
    run(house)
    store = house.part.store
    (row,) = store.read(USER_PROFILE, [("u1",)])
    assert row.cells["profile_segment"] == "b"
    assert read_offsets(row.raw["profile_offsets"]) == {(users, 2): 9}
    # With the field that this version does not know.
    (row,) = store.read(ITEM_PROFILE, [(thing.item_id,)])
    assert row.cells["item"] == thing.SerializeToString()
    assert row.cells["item"].endswith(LATER)
    (erased,) = store.read(USER_STATE, [("u5",)])
    assert set(erased.cells) == {"state", "offsets"}
    assert store.read(USER_EMBEDDING, [("u5",)])[0].cells == {}


def test_statistics_of_removed_items_last_as_long_as_the_stream_keeps_them(house, own_redis) -> None:
    house.play(range(12))
    house.stop()
    log, now_ms = EventLog(house.log), time.time_ns() // 1_000_000
    (items,) = topic_sources(house.settings.kafka, [house.topics.items]).values()
    places = [
        Source(house.topics.items, 0, number, time_ms)
        for number, time_ms in enumerate([now_ms, now_ms - 30 * 86_400_000, now_ms - 30 * 86_400_000])
    ]
    log.write(ITEMS, deletions(ITEMS, ["i0", "i1", "i2"], places), f"{items:016x}-p0-000000000000-000000000002")
    back = to_table(ITEMS, [Item(item_id="i2")], [Source(house.topics.items, 0, 3, now_ms)])
    log.write(ITEMS, back, f"{items:016x}-p0-000000000003-000000000003")
    run(house, project="new")
    _, stats = house.rows("new")
    assert [any(stats[f"i{n}", str(p)][0] for p in PARTITIONS) for n in range(4)] == [True, False, True, True]
    with own_redis.client() as client:
        for item_id, lasts in (("i0", True), ("i2", False)):
            keys = [row_key("new", ITEM_STATS.join_keys, (item_id, str(partition))) for partition in PARTITIONS]
            lives = {client.ttl(key) > 0 for key in keys if client.exists(key)}
            assert lives == {lasts}


def test_the_command_says_how_to_cut_over(house, tmp_path, monkeypatch) -> None:
    house.play(range(6))
    house.stop()
    monkeypatch.setenv("REDIS_URL", house.settings.redis.url.get_secret_value())
    done = CliRunner().invoke(
        app, ["rebuild", "--data", house.log, "--registry", str(tmp_path / "none"), "--project", "new", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["users"] == 6
    assert 'features.project = "new"' in done.stderr
