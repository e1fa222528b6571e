"""The stream and a single pass over the log agree: same events, same user states, same item statistics.

Through the real reader, a real Redis and a real broker: duplicates, late events, JSON, restarts, a killed Redis,
and a second worker that believes that the partitions are its own.
"""

import random
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pyarrow.parquet as pq
import pytest
from confluent_kafka import Consumer
from google.protobuf import json_format

from core.codec import from_ms
from core.kafka import TopicFollower
from core.topics import Topics
from features import item_stats, windows
from features.definitions import ITEM_STATS, USER_STATE
from features.item_stats import ItemPartial
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS
from features.stores.online import OnlineStore
from features.windows import Outcome, UserState, as_impression_event, as_user_event
from headrace.v1.events_pb2 import Event, Feedback, Impression, ImpressionList, ItemStats
from offline.rebuild import rebuild
from streams.consumer import consumer_config
from tests.redis_servers import wait_until

START_MS = 1_700_000_000_000
KINDS = ["view", "click", "cart", "purchase", "rating", "dwell", "skip", "wave"]
PARTITIONS = range(4)
MALFORMED = b"\xff\xff"


@dataclass
class Sent:
    """Messages as produced: topic, key, value, headers."""

    messages: list = field(default_factory=list)
    # What a single pass sees, duplicates and all.
    passes: list = field(default_factory=list)


def draw(topics: Topics, count: int, seed: int) -> Sent:
    """Events, feedback and impressions of 30 users on 20 items; 10% twice, 10% an hour late, a third as JSON."""
    rng, sent = random.Random(seed), Sent()
    for number in range(count):
        user_id, time_ms = f"user-{rng.randrange(30)}", START_MS + number * 1000
        if rng.random() < 0.1:
            time_ms -= rng.randrange(3_600_000)
        which = rng.random()
        if which < 0.15:
            shown = [Impression(item_id=f"item-{rng.randrange(20)}", propensity=1.0) for _ in range(5)]
            message = ImpressionList(
                event_id=f"i{number}", user_id=user_id, event_time=from_ms(time_ms), impressions=shown
            )
            topic = topics.impressions
        else:
            kind = Feedback if which < 0.3 else Event
            topic = topics.feedback if kind is Feedback else topics.events
            message = kind(
                event_id=f"e{number}",
                user_id=user_id,
                item_id=f"item-{rng.randrange(20)}",
                kind=rng.choice(KINDS),
                event_time=from_ms(time_ms),
                categories=rng.sample(["a", "b", "c", "d"], rng.randrange(3)),
            )
            if rng.random() < 0.5:
                message.value = rng.uniform(0, 5)
        for _ in range(2 if rng.random() < 0.1 else 1):
            as_json = rng.random() < 0.3
            value = json_format.MessageToJson(message).encode() if as_json else message.SerializeToString()
            headers = {"content-type": b"application/json"} if as_json else {}
            sent.messages.append((topic, user_id.encode(), value, headers))
            sent.passes.append(message)
        if rng.random() < 0.02:
            sent.messages.append((topic, user_id.encode(), MALFORMED, {}))
    return sent


def single_pass(sent: Sent, settings) -> tuple[dict[str, UserState], dict[str, ItemPartial]]:
    states: dict[str, UserState] = defaultdict(UserState)
    partials: dict[str, ItemPartial] = defaultdict(ItemPartial)
    for message in sent.passes:
        shown = isinstance(message, ImpressionList)
        event = as_impression_event(message) if shown else as_user_event(message)
        (outcome,) = windows.apply(states[event.user_id], [event], settings)
        if outcome is Outcome.APPLIED:
            items = [impression.item_id for impression in message.impressions] if shown else [event.item_id]
            for item_id in items:
                item_stats.apply(partials[item_id], event._replace(item_id=item_id), settings)
    return states, partials


def assert_same_state(stored: UserState, expected: UserState) -> None:
    for name in ("revision", "watermark_ms", "first_event_time_ms", "history", "horizon", "known"):
        assert getattr(stored, name) == getattr(expected, name), name
    assert (stored.duplicate_count, stored.outside_horizon_count) == (expected.duplicate_count, 0)
    assert stored.dwell_seconds == pytest.approx(expected.dwell_seconds, rel=1e-9)
    assert {kind: count for kind, (count, _) in stored.kinds.items()} == {
        kind: count for kind, (count, _) in expected.kinds.items()
    }
    for kind, (_, value_sum) in stored.kinds.items():
        assert value_sum == pytest.approx(expected.kinds[kind][1], rel=1e-9)
    assert len(stored.affinity) == len(expected.affinity)
    for (landmark, sums), (other_landmark, other_sums) in zip(stored.affinity, expected.affinity, strict=True):
        assert landmark == other_landmark
        assert sums == pytest.approx(other_sums, rel=1e-9)


def assert_same_item(stored: ItemPartial, expected: ItemPartial) -> None:
    assert (stored.revision, stored.watermark_ms) == (expected.revision, expected.watermark_ms)
    assert {kind: count for kind, (count, _) in stored.kinds.items()} == {
        kind: count for kind, (count, _) in expected.kinds.items()
    }
    for (landmark, total), (other_landmark, other_total) in zip(stored.popularity, expected.popularity, strict=True):
        assert landmark == other_landmark
        assert total == pytest.approx(other_total, rel=1e-9)


def assert_states_equal_single_pass(settings, sent: Sent) -> None:
    states, _ = single_pass(sent, settings.features)
    store = OnlineStore(settings.redis, settings.features.project)
    rows = store.read(USER_STATE, [(user_id,) for user_id in states])
    for row, expected in zip(rows, states.values(), strict=True):
        stored = windows.decode(row.cells["state"])
        assert_same_state(stored, expected)
        assert (row.cells["revision"], row.cells["watermark_ms"]) == (expected.revision, expected.watermark_ms)
    store.close()


def assert_store_equals_single_pass(settings, sent: Sent) -> None:
    assert_states_equal_single_pass(settings, sent)
    _, partials = single_pass(sent, settings.features)
    store = OnlineStore(settings.redis, settings.features.project)
    for item_id, expected in partials.items():
        rows = store.read(ITEM_STATS, [(item_id, str(partition)) for partition in PARTITIONS])
        parts = [item_stats.decode(ItemStats.FromString(row.cells["stats"])) for row in rows if row.cells]
        assert_same_item(item_stats.add_up(parts), expected)
    store.close()


def assert_caught_up_after_a_loss(redis_server, part, settings, sent: Sent) -> None:
    """A primary of a cluster loses items without their users: that is said, and mended by a rebuild."""
    if redis_server.cluster:
        assert_states_equal_single_pass(settings, sent)
        assert part.doubts.look(PARTITIONS)
        part.stop()
        rebuild(settings.streams.event_log_path, settings.registry.path, settings, progress=False)
    assert not part.doubts.look(PARTITIONS)
    assert_store_equals_single_pass(settings, sent)


def send(producer, messages) -> list:
    futures = [producer.send(*message) for message in messages]
    producer.flush()
    return [future.result(10) for future in futures]


@pytest.mark.parametrize("poll_max_events", [7, 1000])
def test_batches_of_any_size_give_the_state_of_a_single_pass(
    each_shared_redis, stream_settings, start_reader, kafka_producer, poll_max_events
) -> None:
    settings = stream_settings(each_shared_redis, poll_max_events=poll_max_events, state_cache_users=10)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=poll_max_events)
    part = start_reader(settings)
    written = send(kafka_producer, sent.messages)
    part.wait_for(written)
    assert_store_equals_single_pass(settings, sent)


def test_a_new_worker_goes_on_at_the_marker(shared_redis, stream_settings, start_reader, kafka_producer) -> None:
    settings = stream_settings(shared_redis, poll_max_events=50)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=3)
    third = len(sent.messages) // 3
    part = start_reader(settings)
    first = send(kafka_producer, sent.messages[:third])
    part.wait_for(first)
    part.stop()
    written = send(kafka_producer, sent.messages[third : 2 * third])
    part = start_reader(settings)
    written = first + written + send(kafka_producer, sent.messages[2 * third :])
    part.wait_for(written)
    part.stop()
    assert_store_equals_single_pass(settings, sent)
    assert_log_holds_each_position_once(settings, written, sent)


def test_a_worker_that_forgot_its_marker_reads_everything_again_and_changes_nothing(
    shared_redis, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(shared_redis)
    sent = draw(Topics(settings.kafka.topic_prefix), 600, seed=4)
    written = send(kafka_producer, sent.messages)
    part = start_reader(settings)
    part.wait_for(written)
    part.stop()
    for partition in PARTITIONS:
        shared_redis.client().delete(f"{settings.features.project}:marker:{partition}")
    again = start_reader(settings)
    again.wait_for(written)
    assert_store_equals_single_pass(settings, sent)


def test_what_a_dead_worker_did_not_tell_the_replicas_is_told_by_the_next(
    shared_redis, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(shared_redis)
    topics = Topics(settings.kafka.topic_prefix)
    sent = draw(topics, 300, seed=6)
    written = send(kafka_producer, sent.messages)
    dead = start_reader(settings)
    # Killed between the marker and the broadcast: it posts nothing.
    dead.reader._broadcast.tick = lambda *_, **__: None
    dead.wait_for(written)
    dead.stop()
    told: dict[bytes, bytes] = {}
    follower = TopicFollower(
        settings.kafka, [topics.item_stats], lambda records: told.update((r.key, r.value) for r in records)
    )
    follower.start()
    start_reader(settings).wait_for(written)
    _, partials = single_pass(sent, settings.features)
    end = time.monotonic() + 20
    while sum(ItemStats.FromString(value).revision for value in list(told.values())) < sum(
        partial.revision for partial in partials.values()
    ):
        assert time.monotonic() < end, "the replicas were not told everything"
        time.sleep(0.02)
    follower.stop()


def test_two_workers_that_both_believe_to_own_everything(
    shared_redis, stream_settings, start_reader, kafka_producer
) -> None:
    """As a worker that was frozen past its session and woke up: here for the whole run."""
    settings = stream_settings(shared_redis, poll_max_events=20, state_cache_users=15)
    twin_streams = settings.streams.model_copy(update={"group_id": f"{settings.streams.group_id}-twin"})
    twin_settings = settings.model_copy(update={"streams": twin_streams})
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=8)
    third = len(sent.messages) // 3
    parts = [start_reader(settings), start_reader(twin_settings)]
    written = []
    for begin in (0, third, 2 * third):
        written += send(kafka_producer, sent.messages[begin : begin + third if begin < 2 * third else None])
        parts[begin // third % 2].wait_for(written, 60)
    for part in parts:
        part.wait_for(written, 60)
        part.stop()
    assert_store_equals_single_pass(settings, sent)
    assert_log_holds_each_position_once(settings, written, sent)


def begun(settings, start_reader, producer, *, seed: int):
    """A reader that has processed the first third of 600 messages, all that are drawn, and where that third lies."""
    sent = draw(Topics(settings.kafka.topic_prefix), 600, seed=seed)
    part = start_reader(settings)
    written = send(producer, sent.messages[: len(sent.messages) // 3])
    part.wait_for(written)
    return part, sent, written


@pytest.mark.real_kafka
def test_a_worker_whose_name_another_client_took_for_a_while_goes_on(
    shared_redis, stream_settings, start_reader, kafka_producer, caplog
) -> None:
    """Fenced, its client is dead for good; after the broker was away, the worker's own join may fence it."""
    settings = stream_settings(shared_redis, instance_id="worker-1")
    part, sent, written = begun(settings, start_reader, kafka_producer, seed=9)
    other = Consumer(consumer_config(settings))
    other.subscribe([Topics(settings.kafka.topic_prefix).events])

    def has_taken_over() -> bool:
        other.poll(0.05)
        return bool(other.assignment())

    wait_until(has_taken_over, 30, "taken over")
    other.close()
    wait_until(lambda: "fenced by other consumer" in caplog.text, 30, "fenced")
    written += send(kafka_producer, sent.messages[len(written) :])
    part.wait_for(written, 60)
    assert_store_equals_single_pass(settings, sent)


class Forgetful(Consumer):
    """A client whose first one loses its partitions once `is_due`, and is never let into the group again."""

    is_due = threading.Event()
    made = 0

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        type(self).made += 1
        self._is_first, self._is_stuck = self.made == 1, False

    def subscribe(self, topics, on_assign, on_revoke, on_lost) -> None:
        self._on_lost = on_lost
        super().subscribe(topics, on_assign=on_assign, on_revoke=on_revoke, on_lost=on_lost)

    def consume(self, *arguments):
        if self._is_stuck:
            time.sleep(0.02)
            return []
        if self._is_first and self.is_due.is_set():
            self._is_stuck = True
            self._on_lost(self, self.assignment())
            return []
        return super().consume(*arguments)


@pytest.mark.real_kafka
def test_a_client_that_does_not_get_back_into_the_group_is_replaced(
    shared_redis, stream_settings, start_reader, kafka_producer, monkeypatch
) -> None:
    """As librdkafka was seen to be stuck after a broker hung for longer than the session."""
    monkeypatch.setattr("streams.reader.Consumer", Forgetful)
    monkeypatch.setattr(Forgetful, "is_due", threading.Event())
    monkeypatch.setattr(Forgetful, "made", 0)
    settings = stream_settings(shared_redis, instance_id="worker-1")
    part, sent, written = begun(settings, start_reader, kafka_producer, seed=11)
    Forgetful.is_due.set()
    wait_until(lambda: not part.reader.processed(), 10, "lost")
    written += send(kafka_producer, sent.messages[len(written) :])
    part.wait_for(written, 60)
    assert Forgetful.made == 2
    assert_store_equals_single_pass(settings, sent)


@pytest.mark.real_kafka
@pytest.mark.parametrize("protocol", ["cooperative-sticky", "range", "consumer"])
def test_workers_that_get_no_partitions_keep_their_clients(
    shared_redis, stream_settings, start_reader, protocol
) -> None:
    settings = stream_settings(shared_redis, group_protocol=protocol)
    readers = [start_reader(settings).reader for _ in range(len(PARTITIONS) + 1)]

    def is_settled() -> bool:
        owned = [partition for reader in readers for partition in PARTITIONS if reader.owns(partition)]
        return sorted(owned) == list(PARTITIONS) and all(reader.is_in_group for reader in readers)

    wait_until(is_settled, 30, "settled")


def assert_log_holds_each_position_once(settings, written, sent: Sent) -> None:
    log = EventLog(settings.streams.event_log_path)
    logged = Counter()
    for table in (EVENTS, FEEDBACK, IMPRESSIONS):
        for path in log.files(table):
            rows = pq.read_table(path, columns=["topic", "partition", "offset"], partitioning=None).to_pylist()
            logged.update((row["topic"], row["partition"], row["offset"]) for row in rows)
    valid = [one for one, message in zip(written, sent.messages, strict=True) if message[2] != MALFORMED]
    assert logged == Counter((one.topic, one.partition, one.offset) for one in valid)


def test_redis_killed_in_the_middle(each_own_redis, stream_settings, start_reader, kafka_producer) -> None:
    settings = stream_settings(each_own_redis, poll_max_events=20)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=5)
    middle = len(sent.messages) // 2
    part = start_reader(settings)
    written = send(kafka_producer, sent.messages[:middle])
    each_own_redis.kill()
    written += send(kafka_producer, sent.messages[middle:])
    each_own_redis.start()
    part.wait_for(written, 60)
    assert_store_equals_single_pass(settings, sent)


def test_redis_comes_back_without_its_newest_rows(
    each_own_redis, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(each_own_redis, state_cache_users=10)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=6)
    third = len(sent.messages) // 3
    part = start_reader(settings)
    written = send(kafka_producer, sent.messages[:third])
    part.wait_for(written)
    kept = each_own_redis.keep_aof()
    written += send(kafka_producer, sent.messages[third : 2 * third])
    part.wait_for(written)
    each_own_redis.kill()
    each_own_redis.restore_aof(kept)
    each_own_redis.start()
    written += send(kafka_producer, sent.messages[2 * third :])
    part.wait_for(written, 60)
    assert_caught_up_after_a_loss(each_own_redis, part, settings, sent)


def test_no_marker_is_left_in_a_redis_that_was_emptied_before_it(
    own_redis, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(own_redis, marker_interval_ms=600_000)
    sent = draw(Topics(settings.kafka.topic_prefix), 300, seed=11)
    part = start_reader(settings)
    written = send(kafka_producer, sent.messages)
    part.wait_for(written)
    own_redis.client().flushall()
    # Its end writes markers.
    part.stop()
    start_reader(settings).wait_for(written)
    assert_store_equals_single_pass(settings, sent)


def test_redis_that_was_emptied_while_it_ran_is_filled_again(
    each_own_redis, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(each_own_redis, state_cache_users=10)
    sent = draw(Topics(settings.kafka.topic_prefix), 1200, seed=7)
    middle = len(sent.messages) // 2
    part = start_reader(settings)
    part.wait_for(send(kafka_producer, sent.messages[:middle]))
    each_own_redis.empty()
    part.wait_for(send(kafka_producer, sent.messages[middle:]))
    assert_caught_up_after_a_loss(each_own_redis, part, settings, sent)
