"""The fuzzing load is what it says, and each message is taken or refused as the contract has it."""

from collections import Counter

import pytest

from benchmarks.fuzz_load import FuzzConfig, FuzzLoad
from benchmarks.fuzz_messages import HUGE, MAKERS, Expected
from core.settings import load_settings
from core.topics import Topics
from features import windows
from features.definitions import ITEM_PROFILE, USER_PROFILE
from features.stores import event_rows
from features.windows import UserState
from headrace.v1.events_pb2 import Item
from streams.dead_letters import as_letter
from streams.processor import RawMessage, try_decode
from streams.profiles import ProfileProcessor
from streams.sink import tables_of

TOPICS = Topics()
SOURCES = {topic: number for number, topic in enumerate(TOPICS.inbound)}
ITEMS = [Item(item_id=f"item-{n}", categories=["a"]) for n in range(20)]
NOW_MS = 1_795_000_000_000
# What every broker takes.
MESSAGE_BYTES = 1 << 20


@pytest.fixture(scope="module")
def messages():
    return list(FuzzLoad(FuzzConfig(8000, users=50, seed=3), TOPICS, ITEMS))


def as_raw(message, offset: int) -> RawMessage:
    return RawMessage(message.topic, 0, offset, message.key, message.value, list(message.headers), NOW_MS)


def taken(message, offset: int):
    """What is read of a message (None for a tombstone), or the reason why it is refused."""
    raw = as_raw(message, offset)
    if message.topic in TOPICS.user_keyed:
        result = try_decode(raw, TOPICS, SOURCES)
        return result if isinstance(result, str) else result.message
    view = ITEM_PROFILE if message.topic == TOPICS.items else USER_PROFILE
    profiles = ProfileProcessor(view, None, SOURCES, None).sort_out([raw])
    return profiles.letters[0][1] if profiles.letters else profiles.rows[0][0]


def test_the_same_seed_gives_the_same_messages_of_every_kind(messages) -> None:
    assert messages == list(FuzzLoad(FuzzConfig(8000, users=50, seed=3), TOPICS, ITEMS))
    kinds = Counter(message.what for message in messages)
    assert kinds.keys() >= MAKERS.keys()
    assert kinds.keys() & HUGE.keys()


def test_each_is_taken_or_refused_as_the_contract_says(messages) -> None:
    for offset, message in enumerate(messages):
        result = taken(message, offset)
        found = Expected.DEAD_LETTER if isinstance(result, str) else Expected.PROCESSED
        assert message.expected in (Expected.EITHER, found), (message.what, result)


def test_what_is_taken_fits_the_event_log_and_what_is_refused_fits_a_letter(messages) -> None:
    tables = tables_of(TOPICS)
    for offset, message in enumerate(messages):
        result = taken(message, offset)
        if isinstance(result, str):
            assert as_letter(as_raw(message, offset), result, NOW_MS).ByteSize() < MESSAGE_BYTES
        elif result is not None:
            source = event_rows.Source(message.topic, 0, offset, NOW_MS)
            assert event_rows.to_table(tables[message.topic], [result], [source]).num_rows == 1


def test_states_stay_readable_whatever_was_taken(messages) -> None:
    settings, states = load_settings().features, {}
    for offset, message in enumerate(messages):
        result = message.topic in TOPICS.user_keyed and try_decode(as_raw(message, offset), TOPICS, SOURCES)
        if result and not isinstance(result, str):
            windows.apply(states.setdefault(result.event.user_id, UserState()), [result.event], settings)
    assert all(
        windows.encode(windows.decode(windows.encode(state))) == windows.encode(state) for state in states.values()
    )
