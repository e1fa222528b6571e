"""What was erased stays away: replays, an emptied store, a store that comes back older, a restart."""

import pytest

from core.codec import from_ms
from core.kafka import topic_sources
from core.topics import Topics
from features import windows
from features.definitions import USER_PROFILE, USER_STATE
from features.stores.erasures import Erasures
from features.stores.online import OnlineStore
from headrace.v1.events_pb2 import Event, User
from streams.processor import RawMessage
from streams.profiles import Erasing, ProfileProcessor
from streams.topic_ends import TopicEnds

NOW_MS = 1_700_000_000_000


class House:
    """A reader, and the users agent's work done by hand."""

    def __init__(self, settings, producer) -> None:
        self.settings, self._producer = settings, producer
        self.topics = Topics(settings.kafka.topic_prefix)
        sources = topic_sources(settings.kafka, self.topics.inbound)
        self.store = OnlineStore(settings.redis, settings.features.project)
        self.records = Erasures(settings.streams.event_log_path)
        erasing = Erasing(TopicEnds(settings.kafka, sources), self.records)
        self.users = ProfileProcessor(USER_PROFILE, self.store, sources, erasing)

    def send(self, user_id: str, *numbers: int) -> list:
        futures = []
        for number in numbers:
            event = Event(event_id=f"e{number}", user_id=user_id, item_id=f"i{number}", kind="click",
                          event_time=from_ms(NOW_MS + number))  # fmt: skip
            futures.append(self._producer.send(self.topics.events, user_id.encode(), event.SerializeToString()))
        return [future.result(10) for future in futures]

    def user(self, user_id: str, segment: str | None) -> RawMessage:
        value = None if segment is None else User(user_id=user_id, segment=segment).SerializeToString()
        written = self._producer.send(self.topics.users, user_id.encode(), value).result(10)
        raw = RawMessage(written.topic, written.partition, written.offset, user_id.encode(), value, None, NOW_MS)
        self.users.write(self.users.sort_out([raw]))
        return raw

    def items(self, user_id: str) -> list[str]:
        (row,) = self.store.read(USER_STATE, [(user_id,)])
        return windows.recent_items(windows.decode(row.cells.get("state", b"")))


@pytest.fixture
def house(shared_redis, stream_settings, kafka_producer) -> House:
    return House(stream_settings(shared_redis), kafka_producer)


@pytest.fixture
def own_house(own_redis, stream_settings, kafka_producer) -> House:
    return House(stream_settings(own_redis), kafka_producer)


def test_an_erased_user_who_acts_again_has_only_what_is_new(house, start_reader) -> None:
    part = start_reader(house.settings)
    part.wait_for(house.send("u", 1, 2) + house.send("v", 3))
    house.user("u", None)
    assert house.items("u") == []
    # The reader has the old state in memory: the row decides.
    part.wait_for(house.send("u", 4))
    assert house.items("u") == ["i4"]
    assert house.items("v") == ["i3"]
    assert [(one.user_id, len(one.cut)) for one in house.records.all()] == [("u", 1)]


def test_events_that_the_worker_had_not_read_yet_are_erased_too(house, start_reader) -> None:
    sent = house.send("u", 1, 2)
    house.user("u", None)
    sent += house.send("u", 3)
    start_reader(house.settings).wait_for(sent)
    assert house.items("u") == ["i3"]


def test_an_emptied_store_is_filled_again_without_the_erased_user(own_house, own_redis, start_reader) -> None:
    house = own_house
    part = start_reader(house.settings)
    part.wait_for(house.send("u", 1, 2) + house.send("v", 3))
    house.user("u", None)
    sent = house.send("u", 4)
    part.wait_for(sent)
    part.stop()
    own_redis.client().flushall()
    part = start_reader(house.settings)
    part.wait_for(sent + house.send("v", 5))
    assert house.items("u") == ["i4"]
    assert house.items("v") == ["i5", "i3"]


def test_a_store_that_comes_back_from_before_the_erasure_is_erased_again(own_house, own_redis, start_reader) -> None:
    house = own_house
    part = start_reader(house.settings)
    part.wait_for(house.send("u", 1, 2) + house.send("v", 3))
    part.stop()
    kept = own_redis.keep_aof()
    raw = house.user("u", None)
    own_redis.kill()
    own_redis.restore_aof(kept)
    own_redis.start()
    again = OnlineStore(house.settings.redis, house.settings.features.project)
    assert again.read(USER_STATE, [("u",)])[0].cells["revision"] == 2
    part = start_reader(house.settings)
    part.wait_for(house.send("v", 4))
    assert set(again.read(USER_STATE, [("u",)])[0].cells) == {"state", "offsets"}
    assert [one.tombstone.offset for one in house.records.of("u")] == [raw.offset]
    again.close()


def test_the_record_is_made_once_and_its_cut_stays(house) -> None:
    house.send("u", 1)
    raw = house.user("u", None)
    (first,) = house.records.all()
    house.send("u", 2)
    # The worker was killed after the record and before the row: the tombstone comes again.
    house.store.delete(USER_STATE, [("u",)])
    house.users.write(house.users.sort_out([raw]))
    assert Erasures(house.settings.streams.event_log_path).all() == [first]
