"""The online store on a real Redis Cluster: what a single Redis does not have.

Rows and markers over several primaries, a changed primary that shows itself before a command reaches it, failover, and
reads of the request path. That the stream's state is that of a single pass, whatever happens to a node, is tested for
both kinds of Redis in tests/parity/test_state_parity.py.
"""

import pytest
from redis.crc import key_slot

from core.deadline import Deadline
from core.errors import StageError
from core.topics import Topics
from features.definitions import USER_EMBEDDING, USER_PROFILE, USER_STATE
from features.stores import feast_repo
from features.stores.layout import row_key
from features.stores.online import OnlineStore, StoreChangedError, Write
from serving.store_reader import UserStore
from tests.parity.test_state_parity import assert_states_equal_single_pass, draw, send

SLOTS = 16384
USERS = [f"user-{number}" for number in range(300)]
MARKER = {(7, 0): 10, (8, 0): 20}


def state(user_id: str, raw: bytes, **more: object) -> Write:
    return Write(USER_STATE, (user_id,), {"state": raw}, **more)


def test_rows_on_all_nodes_are_read_written_and_removed(shared_cluster) -> None:
    store = OnlineStore(shared_cluster.settings(), "rows")
    keys = [(user_id,) for user_id in USERS]
    store.ping()
    assert store.write([state(user_id, user_id.encode()) for user_id in USERS]) == [True] * len(USERS)
    assert [row.cells for row in store.read(USER_STATE, keys, ["state"])] == [
        {"state": user_id.encode()} for user_id in USERS
    ]
    counts = [node.client().dbsize() for node in shared_cluster.nodes[:3]]
    assert min(counts) > 50, counts
    OnlineStore(shared_cluster.settings(), "more-rows").write([state("another", b"")])
    assert sorted(store.keys_of(USER_STATE, batch=10)) == sorted(USERS)
    assert store.delete(USER_STATE, keys[:100]) == 100
    assert store.delete(USER_STATE, keys) == 200
    assert list(store.keys_of(USER_STATE)) == []
    assert store.read(USER_STATE, []) == []
    store.close()


def test_a_guarded_write_takes_effect_only_on_the_bytes_that_were_seen(shared_cluster) -> None:
    store = OnlineStore(shared_cluster.settings(), "guards")
    keys = [(user_id,) for user_id in USERS]
    cells = {"state": b"one", "offsets": b"1"}
    first = [Write(USER_STATE, key, cells, "offsets") for key in keys]
    assert store.write(first) == [True] * len(USERS)
    assert store.write(first) == [False] * len(USERS)
    rows = store.read(USER_STATE, keys, ["offsets"])
    second = [
        Write(USER_STATE, key, {"state": b"two", "offsets": b"2"}, "offsets", row.raw["offsets"] if index % 3 else b"?")
        for index, (key, row) in enumerate(zip(keys, rows, strict=True))
    ]
    assert store.write(second) == [index % 3 != 0 for index in range(len(USERS))]
    assert [row.cells["state"] for row in store.read(USER_STATE, keys)] == [
        b"two" if index % 3 else b"one" for index in range(len(USERS))
    ]
    for index, (key, row) in enumerate(zip(keys[:30], store.read(USER_STATE, keys[:30]), strict=True)):
        only = Write(USER_STATE, key, {"offsets": b"3"}, "offsets", row.raw["offsets"] if index % 3 else b"?")
        assert store.replace([only]) == (index % 3 != 0)
    left = store.read(USER_STATE, keys[:30])
    assert [row.cells for row in left if "state" not in row.cells] == [{"offsets": b"3"}] * 20


def test_markers_and_what_was_told(shared_cluster) -> None:
    store, other = (OnlineStore(shared_cluster.settings(), "markers") for _ in range(2))
    assert store.read_marker(0) == {}
    assert store.read_positions("told:0") is None
    assert store.write_marker(0, MARKER, {})
    assert other.read_markers([0, 1]) == [MARKER, {}]
    assert other.write_marker(0, {(7, 0): 30}, MARKER)
    assert not store.write_marker(0, {(7, 0): 40}, MARKER)
    assert store.read_marker(0) == {(7, 0): 30}
    assert store.write_marker(0, MARKER)
    assert other.read_marker(0) == MARKER
    store.write_positions("told:0", {(7, 0): 5})
    assert other.read_positions("told:0") == {(7, 0): 5}


def test_the_oldest_copy_of_a_marker_counts_and_all_are_moved_from_there(shared_cluster) -> None:
    store = OnlineStore(shared_cluster.settings(), "copies")
    store.write_marker(0, MARKER)
    copies = [key for node in shared_cluster.nodes[:3] for key in node.client().keys("*copies:marker:0")]
    assert len(copies) == 3
    older = OnlineStore(shared_cluster.settings(), "older")
    older.write_marker(0, {(7, 0): 4})
    on_second = shared_cluster.nodes[1].client()
    (from_key,) = on_second.keys("*older:marker:0")
    (to_key,) = on_second.keys("*copies:marker:0")
    on_second.set(to_key, on_second.get(from_key))
    assert not store.write_marker(0, {(7, 0): 50}, MARKER)
    assert store.read_marker(0) == {(7, 0): 4}
    assert store.write_marker(0, {(7, 0): 60}, {(7, 0): 4})
    assert store.read_marker(0) == {(7, 0): 60}
    on_second.delete(to_key)
    assert store.read_marker(0) == {}


@pytest.mark.filterwarnings("ignore")
def test_the_feast_sdk_reads_what_was_written(shared_cluster, tmp_path) -> None:
    settings = shared_cluster.all_settings("sdk")
    OnlineStore(settings.redis, "sdk").write([state(user_id, user_id.encode()) for user_id in USERS])
    feast_repo.apply_feature_repo(settings, tmp_path / "registry.db")
    read = feast_repo.feature_store(settings, tmp_path / "registry.db").get_online_features(
        features=["user_state:state"], entity_rows=[{"user_id": user_id} for user_id in USERS]
    )
    assert read.to_dict()["state"] == [user_id.encode() for user_id in USERS]


async def test_serving_reads_what_was_written(shared_cluster) -> None:
    store = OnlineStore(shared_cluster.settings(), "serving")
    writes = [state(user_id, user_id.encode(), guard="offsets") for user_id in USERS]
    writes += [Write(USER_EMBEDDING, (user_id,), {"embedding_version": user_id}) for user_id in USERS]
    writes += [Write(USER_PROFILE, (user_id,), {"profile_segment": f"of-{user_id}"}) for user_id in USERS[:200]]
    store.write(writes)
    reader = UserStore(shared_cluster.settings(), "serving")
    for user_id in USERS:
        row = await reader.read(user_id, Deadline.after_ms(5000))
        assert (row.state, row.embedding_version) == (user_id.encode(), user_id)
    assert (await reader.read("nobody", Deadline.after_ms(5000))).state_time_ms is None
    assert await reader.read_offsets(USERS[0], Deadline.after_ms(5000)) == {}
    segments = await reader.read_segments(USERS, Deadline.after_ms(5000))
    assert segments == [f"of-{user_id}" for user_id in USERS[:200]] + [""] * 100
    await reader.close()


async def test_serving_goes_on_with_the_node_that_took_over(own_cluster) -> None:
    store = OnlineStore(own_cluster.settings(), "serving")
    store.write([state(user_id, b"here") for user_id in USERS])
    own_cluster.nodes[0].client().execute_command("WAIT", 1, 5000)
    reader = UserStore(own_cluster.settings(), "serving")
    assert (await reader.read(USERS[0], Deadline.after_ms(5000))).state == b"here"
    own_cluster.fail_over()
    failures = 0
    for user_id in USERS:
        try:
            assert (await reader.read(user_id, Deadline.after_ms(5000))).state == b"here"
        except StageError:
            failures += 1
    # A read that found the old owner; the next one knew better.
    assert failures == 1
    await reader.close()


def test_a_failover_in_the_middle_loses_no_state(own_cluster, stream_settings, start_reader, kafka_producer) -> None:
    settings = stream_settings(own_cluster, poll_max_events=20)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=24)
    middle = len(sent.messages) // 2
    part = start_reader(settings)
    written = send(kafka_producer, sent.messages[: middle // 2])
    part.wait_for(written, 60)
    written += send(kafka_producer, sent.messages[middle // 2 : middle])
    own_cluster.fail_over()
    written += send(kafka_producer, sent.messages[middle:])
    part.wait_for(written, 60)
    assert_states_equal_single_pass(settings, sent)


def test_a_restarted_node_shows_itself_before_a_command_reaches_it(own_cluster) -> None:
    store = OnlineStore(own_cluster.settings(), "restart")
    assert all(store.write([state(user_id, b"before") for user_id in USERS]))
    own_cluster.nodes[1].kill()
    own_cluster.nodes[1].start()
    own_cluster.wait_ok()
    with pytest.raises(StoreChangedError):
        store.write([state(user_id, b"after") for user_id in USERS])
    rows = store.read(USER_STATE, [(user_id,) for user_id in USERS])
    assert {row.cells["state"] for row in rows} == {b"before"}


def test_a_promoted_replica_shows_itself_before_a_command_reaches_it(own_cluster) -> None:
    store = OnlineStore(own_cluster.settings(), "failover")
    store.write([state(user_id, b"before") for user_id in USERS])
    own_cluster.nodes[0].client().execute_command("WAIT", 1, 5000)
    own_cluster.fail_over()
    problems = []
    for _ in range(3):
        try:
            store.write([state(user_id, b"after") for user_id in USERS])
        except StageError as error:
            problems.append(type(error))
            rows = OnlineStore(own_cluster.settings(), "failover").read(USER_STATE, [(user_id,) for user_id in USERS])
            assert {row.cells["state"] for row in rows} == {b"before"}
    # The first finds nobody where the primary was.
    assert problems == [StageError, StoreChangedError]


def test_a_slot_that_moved_is_an_error_once(own_cluster) -> None:
    store = OnlineStore(own_cluster.settings(), "moved")
    store.write([state(user_id, b"x") for user_id in USERS])
    slot, source, target = SLOTS - 1, own_cluster.nodes[2].client(), own_cluster.nodes[1].client()
    source_id, target_id = (client.execute_command("CLUSTER MYID") for client in (source, target))
    target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
    source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target_id)
    keys = source.execute_command(b"CLUSTER", b"GETKEYSINSLOT", slot, 1000)
    if keys:
        source.execute_command("MIGRATE", "127.0.0.1", own_cluster.nodes[1].port, "", 0, 5000, "KEYS", *keys)
    for client in (target, source):
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", target_id)
    user_id = _user_in(slot, "moved")
    with pytest.raises(StageError, match="Moved"):
        store.write([state(user_id, b"y")])
    assert store.write([state(user_id, b"y")]) == [True]


def _user_in(slot: int, project: str) -> str:
    return next(
        user_id
        for number in range(1_000_000)
        if key_slot(row_key(project, USER_STATE.join_keys, (user_id := f"u{number}",))) == slot
    )
