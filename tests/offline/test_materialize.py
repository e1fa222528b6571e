"""The online store after `materialize`: what the stream would have written for the same log."""

import shutil

import pytest

from candidate.encoder import UserEncoder
from candidate.towers import load_towers
from core.codec import from_ms
from core.errors import StageError
from core.settings import load_settings
from features import windows
from features.catalog import Catalog
from features.definitions import (
    ITEM_PROFILE,
    ITEM_STATS,
    POPULARITY,
    USER_BATCH_SCORES,
    USER_EMBEDDING,
    USER_PROFILE,
    USER_STATE,
)
from features.stores import event_rows
from features.stores.event_log import EventLog
from features.stores.online import OnlineStore, Write
from headrace.v1.events_pb2 import Event, Item, ItemStats, User
from offline.batch_scores import read_batch_scores
from offline.logs import read_items
from offline.materialize import materialize
from offline.models import read_item_vectors
from offline.replay import Replay, read_entries

NOW_MS = 4_000_000_000_000


@pytest.fixture
def store(online):
    store = OnlineStore(online.redis, online.features.project)
    yield store
    store.close()


@pytest.fixture(scope="module")
def replay(shop, settings):
    replay = Replay(read_items(shop), settings.features)
    replay.advance(read_entries(shop))
    return replay


def cells(store, view, *keys):
    return [row.cells for row in store.read(view, list(keys))]


def test_every_view_is_filled(shop, bundle, online, store, replay):
    summary = materialize(shop.root, bundle, online, progress=False)
    users = sorted(replay.states)
    for user, row in zip(users, cells(store, USER_STATE, *[(user,) for user in users]), strict=True):
        assert windows.decode(row["state"]) == replay.states[user]
        assert (row["revision"], row["watermark_ms"]) == (
            replay.states[user].revision,
            replay.states[user].watermark_ms,
        )
        assert "offsets" not in row
    by_item = {stats.item_id: stats for stats in replay.item_stats()}
    for item_id, row in zip(by_item, cells(store, ITEM_STATS, *[(item, "-1") for item in by_item]), strict=True):
        assert ItemStats.FromString(row["stats"]) == by_item[item_id]
        assert row["revision"] == by_item[item_id].revision
    items = list(shop.items())
    for item, row in zip(items, cells(store, ITEM_PROFILE, *[(item.item_id,) for item in items]), strict=True):
        assert (Item.FromString(row["item"]), row["title"]) == (item, item.title)
    people = list(shop.users())
    for user, row in zip(people, cells(store, USER_PROFILE, *[(user.user_id,) for user in people]), strict=True):
        assert (User.FromString(row["profile"]), row["profile_segment"]) == (user, user.segment)
    (popular,) = cells(store, POPULARITY, ("all",))
    assert popular["popular_item_ids"] == [item_id for item_id, _ in bundle.json("popularity.json")["all"]]
    assert popular["popular_watermark_ms"] == replay.watermark_ms == summary.watermark_ms
    scored = list(read_batch_scores(bundle.file("batch_scores.parquet")))
    for expected, row in zip(scored, cells(store, USER_BATCH_SCORES, *[(s.user_id,) for s in scored]), strict=True):
        assert row["batch_item_ids"] == expected.item_ids
    counts = (summary.users, summary.item_stats, summary.items, summary.user_profiles, summary.batch_scores)
    assert counts == (len(users), len(by_item), len(items), len(people), len(scored))
    assert summary.left_to_stream == 0


def test_vectors_are_the_towers_of_the_state_that_was_written(shop, bundle, online, store, replay):
    summary = materialize(shop.root, bundle, online, progress=False)
    catalog = Catalog.of_items(bundle.items(), online.features)
    users = sorted(replay.states)
    encoder = UserEncoder(load_towers(bundle.path), online.features)
    states = [replay.states[user] for user in users]
    vectors, known = encoder.encode(states, catalog, read_item_vectors(bundle.path))
    assert summary.user_embeddings == known.sum() > 0
    for index, row in enumerate(cells(store, USER_EMBEDDING, *[(user,) for user in users])):
        assert bool(row) == known[index]
        if row:
            assert row["vector"] == pytest.approx(vectors[index].tolist(), abs=1e-5)
            assert row["embedding_version"] == bundle.manifest.embedding_version
            assert row["embedding_revision"] == states[index].revision


def test_without_a_bundle_there_are_states_but_no_vectors(shop, online, store, replay):
    summary = materialize(shop.root, None, online, progress=False)
    assert (summary.user_embeddings, summary.batch_scores) == (0, 0)
    assert summary.users == len(replay.states)


def test_rows_of_the_stream_stay_and_a_second_run_changes_nothing(shop, bundle, online, store, replay):
    user = min(replay.states)
    state = windows.UserState(revision=10**6)
    streamed = {"state": windows.encode(state), "offsets": b"somewhere", "revision": state.revision, "watermark_ms": 1}
    store.write([Write(USER_STATE, (user,), streamed)])
    summary = materialize(shop.root, bundle, online, progress=False)
    assert summary.left_to_stream == 1
    assert summary.users == len(replay.states) - 1
    assert cells(store, USER_STATE, (user,)) == [streamed]
    assert cells(store, USER_EMBEDDING, (user,)) == [{}], "the vector belongs to whoever has the state"
    other = max(replay.states)
    before = cells(store, USER_STATE, (other,)) + cells(store, USER_EMBEDDING, (other,))
    materialize(shop.root, bundle, online, progress=False)
    assert cells(store, USER_STATE, (other,)) + cells(store, USER_EMBEDDING, (other,)) == before


def test_what_came_over_the_topics_is_left_to_the_stream(shop, online, store, replay, tmp_path):
    """The log of a system that has been running: imported first, then streamed."""
    root = tmp_path / "log"
    shutil.copytree(shop.root, root)
    log = EventLog(root)
    streamed = Event(event_id="new", user_id="streamed", item_id="i", kind="click", event_time=from_ms(NOW_MS))
    rows = event_rows.to_table(event_rows.EVENTS, [streamed], [event_rows.Source("t", 0, 9, NOW_MS)])
    log.write(event_rows.EVENTS, rows, f"{0xABC:016x}-p0-{9:012d}-{9:012d}")
    assert "streamed" in log.events()["user_id"].to_pylist()
    summary = materialize(root, None, online, progress=False)
    assert (summary.users, summary.watermark_ms) == (len(replay.states), replay.watermark_ms)
    assert cells(store, USER_STATE, ("streamed",)) == [{}]
    by_item = {stats.item_id: stats.revision for stats in replay.item_stats()}
    found = cells(store, ITEM_STATS, *[(item, "-1") for item in by_item])
    assert [row["revision"] for row in found] == list(by_item.values())


def test_only_events_before_the_time_count(shop, online, store):
    times = shop.events()["event_time"].cast("int64").to_pylist()
    before_ms = times[len(times) // 2]
    summary = materialize(shop.root, None, online, before_ms=before_ms, progress=False)
    assert summary.watermark_ms < before_ms


def test_without_redis_it_says_so(shop):
    nowhere = load_settings(overrides={"redis": {"url": "redis://127.0.0.1:9/0"}})
    with pytest.raises(StageError, match="redis"):
        materialize(shop.root, None, nowhere, progress=False)
