"""The load is what it says: repeatable, with its shares, and malformed exactly where it says so."""

from collections import Counter, defaultdict

from benchmarks.stream_load import HOUR_MS, LoadConfig, StreamLoad
from core.codec import to_ms
from core.settings import load_settings
from core.topics import Topics
from features import windows
from features.windows import UserState
from headrace.v1.events_pb2 import Item
from streams.processor import RawMessage, Received, try_decode

TOPICS = Topics()
SOURCES = {topic: number for number, topic in enumerate(TOPICS.user_keyed)}
ITEMS = [Item(item_id=f"item-{n}", categories=["a", "b"][: n % 3]) for n in range(50)]
CONFIG = LoadConfig(messages=8000, users=200, seed=5)


def received(load: StreamLoad) -> list[tuple[bool, Received | str]]:
    """Whether the load calls it malformed, and what the reader makes of it."""
    results = []
    for offset, sent in enumerate(load):
        raw = RawMessage(sent.topic, 0, offset, sent.key, sent.value, list(sent.headers.items()), 0)
        result = try_decode(raw, TOPICS, SOURCES)
        results.append(((sent.topic, sent.key, sent.value) in load.malformed, result))
    return results


def test_the_same_seed_gives_the_same_messages() -> None:
    assert list(StreamLoad(CONFIG, TOPICS, ITEMS)) == list(StreamLoad(CONFIG, TOPICS, ITEMS))


def test_exactly_the_malformed_are_refused_and_the_shares_are_right() -> None:
    results = received(StreamLoad(CONFIG, TOPICS, ITEMS))
    assert all(malformed == isinstance(result, str) for malformed, result in results)
    events = [result.event for _, result in results if isinstance(result, Received)]
    assert 0.003 < sum(malformed for malformed, _ in results) / len(results) < 0.008
    ids = Counter((event.user_id, event.event_hash) for event in events)
    assert 0.04 < sum(count - 1 for count in ids.values()) / len(events) < 0.06
    newest, late = 0, 0
    for event in events:
        late += event.time_ms < newest - 60_000
        assert event.time_ms > newest - 2 * HOUR_MS
        newest = max(newest, event.time_ms)
    assert 0.08 < late / len(events) < 0.12


def test_the_order_of_the_topics_makes_no_difference() -> None:
    """Each topic alone keeps its order; users who appear in several stay inside the duplicate horizon."""
    settings = load_settings().features
    streams = defaultdict(list)
    for _, result in received(StreamLoad(CONFIG, TOPICS, ITEMS)):
        if isinstance(result, Received):
            streams[result.raw.topic].append(result.event)
    states = []
    for topics in (TOPICS.user_keyed, reversed(TOPICS.user_keyed)):
        users: dict[str, UserState] = defaultdict(UserState)
        for topic in topics:
            for event in streams[topic]:
                windows.apply(users[event.user_id], (event,), settings)
        states.append(users)
    assert len(streams) == 3
    for user_id, state in states[0].items():
        assert (state.history, state.horizon) == (states[1][user_id].history, states[1][user_id].horizon)
        assert state.revision == states[1][user_id].revision


def test_event_times_are_those_of_the_configuration() -> None:
    sent = [result for _, result in received(StreamLoad(CONFIG, TOPICS, ITEMS)) if isinstance(result, Received)]
    assert min(to_ms(one.message.event_time) for one in sent) >= CONFIG.start_ms - HOUR_MS
