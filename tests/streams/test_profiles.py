"""Items and users: rows, tombstones, and messages that come again."""

import pytest

from core.settings import load_settings
from features import positions, windows
from features.definitions import ITEM_PROFILE, ITEM_STATS, USER_BATCH_SCORES, USER_EMBEDDING, USER_PROFILE, USER_STATE
from features.stores.layout import row_key
from features.stores.online import ABSENT, OnlineStore, Write, read_offsets
from features.windows import UserState
from headrace.v1.events_pb2 import Item, User
from streams.processor import RawMessage
from streams.profiles import Erasing, ProfileProcessor, Removing

SOURCES = {"items": 11, "users": 12}
KEEP_SECONDS = 1000
REMOVING = Removing(KEEP_SECONDS, lambda: range(-1, 2))


@pytest.fixture
def store(shared_redis, request):
    settings = load_settings(overrides={"redis": {"url": shared_redis.url}})
    store = OnlineStore(settings.redis, f"profiles-{request.node.name}")
    yield store
    store.close()


def item(offset: int, item_id: str, title: str | None) -> RawMessage:
    value = None if title is None else Item(item_id=item_id, title=title).SerializeToString()
    return RawMessage("items", 0, offset, item_id.encode(), value, None, 0)


def user(offset: int, user_id: str, segment: str | None) -> RawMessage:
    value = None if segment is None else User(user_id=user_id, segment=segment).SerializeToString()
    return RawMessage("users", 0, offset, user_id.encode(), value, None, 0)


def play(processor: ProfileProcessor, *batch: RawMessage):
    profiles = processor.sort_out(batch)
    processor.write(profiles)
    return profiles


def titles(store, *item_ids: str) -> list:
    return [row.cells.get("title") for row in store.read(ITEM_PROFILE, [(item_id,) for item_id in item_ids])]


def test_the_newest_of_a_batch_holds_and_older_ones_that_come_again_do_not(store) -> None:
    items = ProfileProcessor(ITEM_PROFILE, store, SOURCES, REMOVING)
    play(items, item(0, "a", "first"), item(1, "b", "b"), item(2, "a", "second"))
    assert titles(store, "a", "b") == ["second", "b"]
    play(items, item(0, "a", "first"))
    assert titles(store, "a") == ["second"]
    play(items, item(3, "a", None))
    assert titles(store, "a", "b") == [None, "b"]


def life_seconds(store, client, view, *key: str) -> int:
    """How long a row will still be there; -1 = for ever, -2 = it is not there."""
    return client.ttl(row_key(store._project, view.join_keys, key))


def test_a_removed_item_leaves_its_position_for_a_while(store, shared_redis) -> None:
    items, client = ProfileProcessor(ITEM_PROFILE, store, SOURCES, REMOVING), shared_redis.client()
    store.write([Write(ITEM_STATS, ("a", "-1"), {"revision": 1}), Write(ITEM_STATS, ("a", "1"), {"revision": 1})])
    play(items, item(0, "a", "A"), item(1, "b", "B"))
    (asleep,) = store.read(ITEM_PROFILE, [("a",)])
    play(items, item(2, "a", None), item(3, "never", None))
    (row,) = store.read(ITEM_PROFILE, [("a",)])
    assert (set(row.cells), row.time_ms) == ({"item_offsets"}, None), "to readers of features there is no row"
    assert read_offsets(row.raw["item_offsets"]) == {(11, 0): 2}
    lives = [life_seconds(store, client, ITEM_STATS, "a", number) for number in ("-1", "0", "1")]
    assert [0 < life <= KEEP_SECONDS for life in lives] == [True, False, True]
    assert 0 < life_seconds(store, client, ITEM_PROFILE, "a") <= KEEP_SECONDS
    assert 0 < life_seconds(store, client, ITEM_PROFILE, "never") <= KEEP_SECONDS
    assert life_seconds(store, client, ITEM_PROFILE, "b") == -1
    # Neither a message that comes again nor a worker that wakes up late brings it back.
    play(items, item(0, "a", "A"))
    for expected in (asleep.raw["item_offsets"], ABSENT):
        late = Write(ITEM_PROFILE, ("a",), {"title": "A"}, "item_offsets", expected)
        assert store.write([late]) == [False]
    assert titles(store, "a") == [None]


def test_a_removed_item_that_returns_stays_and_so_do_its_statistics(store, shared_redis) -> None:
    items, client = ProfileProcessor(ITEM_PROFILE, store, SOURCES, REMOVING), shared_redis.client()
    store.write([Write(ITEM_STATS, ("a", "0"), {"revision": 1})])
    play(items, item(0, "a", "A"))
    play(items, item(1, "a", None))
    play(items, item(2, "a", "again"))
    # The tombstone comes again after a restart.
    play(items, item(1, "a", None))
    assert titles(store, "a") == ["again"]
    assert life_seconds(store, client, ITEM_PROFILE, "a") == -1
    assert life_seconds(store, client, ITEM_STATS, "a", "0") == -1
    play(items, item(3, "a", None), item(4, "a", "in one batch"))
    assert titles(store, "a") == ["in one batch"]
    assert life_seconds(store, client, ITEM_PROFILE, "a") == -1
    assert life_seconds(store, client, ITEM_STATS, "a", "0") == -1


def test_what_is_malformed_becomes_a_letter_and_the_rest_is_written(store) -> None:
    items = ProfileProcessor(ITEM_PROFILE, store, SOURCES, REMOVING)
    broken = RawMessage("items", 0, 1, b"x", b"\xff", None, 0)
    foreign = item(2, "b", "b")._replace(key=b"other")
    no_key = RawMessage("items", 0, 3, b"\xff\xfe", None, None, 0)
    profiles = play(items, item(0, "a", "A"), broken, foreign, no_key)
    assert [raw.offset for raw, _ in profiles.letters] == [1, 2, 3]
    assert titles(store, "a", "b") == ["A", None]
    assert len(profiles.rows) == 1


CUT = {(21, 0): 40}


def erasing(erased: list[str]) -> Erasing:
    return Erasing(lambda _: dict(CUT), on_erased=erased.append)


def state_of(store, user_id: str) -> UserState:
    return windows.decode(store.read(USER_STATE, [(user_id,)])[0].cells.get("state", b""))


def test_a_user_tombstone_removes_all_that_is_kept_of_the_user(store) -> None:
    erased = []
    users = ProfileProcessor(USER_PROFILE, store, SOURCES, erasing(erased))
    play(users, user(0, "u", "anglers"))
    old = UserState(revision=3, offsets={(21, 0): 7, (22, 0): 9})
    offsets = positions.encode(old.offsets)
    store.write([Write(USER_STATE, ("u",), {"state": windows.encode(old), "offsets": offsets, "revision": 3})])
    store.write([Write(USER_EMBEDDING, ("u",), {"vector": [1.0], "embedding_revision": 3})])
    store.write([Write(USER_BATCH_SCORES, ("u",), {"batch_item_ids": ["i"]})])
    play(users, user(1, "u", None))
    assert erased == ["u"]
    (row,) = store.read(USER_STATE, [("u",)])
    assert set(row.cells) == {"state", "offsets"}
    assert row.time_ms is None, "to readers of features there is no row"
    assert state_of(store, "u") == UserState(offsets={(21, 0): 40, (22, 0): 9, (12, 0): 1})
    assert read_offsets(row.raw["offsets"]) == state_of(store, "u").offsets
    assert store.read(USER_EMBEDDING, [("u",)])[0].cells == {}
    assert store.read(USER_BATCH_SCORES, [("u",)])[0].cells == {}
    assert set(store.read(USER_PROFILE, [("u",)])[0].cells) == {"profile_offsets"}
    # What came before does not come back, in whatever order it is read again.
    play(users, user(0, "u", "anglers"))
    play(users, user(1, "u", None))
    assert erased == ["u"]
    assert set(store.read(USER_PROFILE, [("u",)])[0].cells) == {"profile_offsets"}


def test_a_user_who_comes_back_in_the_same_batch_begins_anew(store) -> None:
    users = ProfileProcessor(USER_PROFILE, store, SOURCES, erasing([]))
    store.write([Write(USER_STATE, ("u",), {"state": windows.encode(UserState(revision=1)), "revision": 1})])
    play(users, user(0, "u", None), user(1, "u", "new"))
    assert state_of(store, "u").revision == 0
    assert store.read(USER_PROFILE, [("u",)])[0].cells["profile_segment"] == "new"
    # The tombstone comes again after a restart: what was built since then stays.
    store.write([Write(USER_STATE, ("u",), {"state": windows.encode(UserState(revision=2)), "revision": 2})])
    play(users, user(0, "u", None), user(1, "u", "new"))
    assert state_of(store, "u").revision == 2


def test_an_erased_user_who_comes_back_without_a_profile_is_not_erased_again(store) -> None:
    users = ProfileProcessor(USER_PROFILE, store, SOURCES, erasing([]))
    play(users, user(0, "u", None))
    store.write([Write(USER_STATE, ("u",), {"state": windows.encode(UserState(revision=1)), "revision": 1})])
    play(users, user(0, "u", None))
    assert state_of(store, "u").revision == 1
