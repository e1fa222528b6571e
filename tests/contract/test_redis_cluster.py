"""The online store on a real Redis Cluster: three primaries and a replica, killed, emptied, set back and failed over.

What holds of one Redis holds of a cluster: the rules of rows and markers, the state of a single pass whatever happens
to a node that keeps what it acknowledged, a changed primary that shows itself before a command reaches it, and reads of
the request path. A node that lost something gets the states of its users again; not the statistics of its items, which
were counted along with users whose rows other nodes still have.
"""

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot

from core.deadline import Deadline
from core.errors import ConfigError, StageError
from core.settings import RedisSettings, Settings, load_settings
from core.topics import Topics
from devstack.ports import Ports
from features.definitions import USER_EMBEDDING, USER_PROFILE, USER_STATE
from features.stores import feast_repo
from features.stores.layout import row_key
from features.stores.online import OnlineStore, StoreChangedError, Write
from serving.store_reader import UserStore
from tests.conftest import RedisServer, wait_until
from tests.parity.test_state_parity import assert_states_equal_single_pass, assert_store_equals_single_pass, draw, send

SLOTS = 16384
USERS = [f"user-{number}" for number in range(300)]
MARKER = {(7, 0): 10, (8, 0): 20}


class Cluster:
    """Primaries with equal shares of the slots; nodes[3] is a replica of nodes[0]."""

    cluster = True

    def __init__(self, folder: Path, ports: Ports) -> None:
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--appendfsync", "always"]
        self.nodes = [RedisServer(folder / str(number), _port(ports), *options) for number in range(4)]
        self.url = self.nodes[1].url
        for node in self.nodes:
            node.start()
        first, replica = self.nodes[0].client(), self.nodes[3].client()
        for number, node in enumerate(self.nodes[:3]):
            slots = range(number * SLOTS // 3, (number + 1) * SLOTS // 3)
            node.client().execute_command("CLUSTER ADDSLOTS", *slots)
            node.client().execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            first.execute_command("CLUSTER MEET", "127.0.0.1", node.port)
        wait_until(lambda: all(self._state(node, "cluster_known_nodes:4") for node in self.nodes), what="four nodes")
        replica.execute_command("CLUSTER REPLICATE", first.execute_command("CLUSTER MYID"))
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", what="the replica")
        self.wait_ok()

    def wait_ok(self) -> None:
        wait_until(lambda: all(self._state(node, "cluster_state:ok") for node in self.nodes), what="the cluster")

    @staticmethod
    def _state(node: RedisServer, line: str) -> bool:
        with node.client() as client:
            # redis-py would make a dict of it, and of dicts that it does not know nothing.
            return line.encode() in client.execute_command(b"CLUSTER", b"INFO")

    def settings(self) -> RedisSettings:
        return self.all_settings("").redis

    def all_settings(self, project: str) -> Settings:
        redis_settings = {"url": self.url, "cluster": True}
        return load_settings(overrides={"redis": redis_settings, "features": {"project": project}})


def _port(ports: Ports) -> int:
    """A free port whose cluster bus has its own, 10000 above."""
    for _ in range(100):
        with suppress(ConfigError):
            port = ports.take("redis", random.randrange(20_000, 32_000))
            ports.take("bus", port + 10_000)
            return port
    raise AssertionError("no ports")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """For tests that kill nodes."""
    yield from _cluster(tmp_path / "cluster")


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from _cluster(tmp_path_factory.mktemp("cluster"))


def _cluster(folder: Path) -> Iterator[Cluster]:
    ports = Ports()
    made = Cluster(folder, ports)
    try:
        yield made
    finally:
        for node in made.nodes:
            node.stop()
        ports.close()


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


async def test_serving_goes_on_with_the_node_that_took_over(cluster) -> None:
    store = OnlineStore(cluster.settings(), "serving")
    store.write([state(user_id, b"here") for user_id in USERS])
    cluster.nodes[0].client().execute_command("WAIT", 1, 5000)
    reader = UserStore(cluster.settings(), "serving")
    assert (await reader.read(USERS[0], Deadline.after_ms(5000))).state == b"here"
    fail_over(cluster)
    failures = 0
    for user_id in USERS:
        try:
            assert (await reader.read(user_id, Deadline.after_ms(5000))).state == b"here"
        except StageError:
            failures += 1
    # A read that found the old owner; the next one knew better.
    assert failures == 1
    await reader.close()


@pytest.mark.parametrize("poll_max_events", [7, 1000])
def test_the_stream_gives_the_state_of_a_single_pass(
    shared_cluster, stream_settings, start_reader, kafka_producer, poll_max_events
) -> None:
    settings = stream_settings(shared_cluster, poll_max_events=poll_max_events, state_cache_users=10)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=poll_max_events)
    part = start_reader(settings)
    part.wait_for(send(kafka_producer, sent.messages))
    assert_store_equals_single_pass(settings, sent)


def test_a_node_killed_in_the_middle_loses_nothing(cluster, stream_settings, start_reader, kafka_producer) -> None:
    settings = stream_settings(cluster, poll_max_events=20)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=21)
    middle = len(sent.messages) // 2
    part = start_reader(settings)
    written = send(kafka_producer, sent.messages[:middle])
    cluster.nodes[2].kill()
    written += send(kafka_producer, sent.messages[middle:])
    cluster.nodes[2].start()
    part.wait_for(written, 60)
    assert_store_equals_single_pass(settings, sent)


def test_a_node_that_comes_back_without_its_newest_states_gets_them_again(
    cluster, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(cluster, state_cache_users=10)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=22)
    third, node = len(sent.messages) // 3, cluster.nodes[2]
    part = start_reader(settings)
    part.wait_for(send(kafka_producer, sent.messages[:third]))
    kept = node.keep_aof()
    part.wait_for(send(kafka_producer, sent.messages[third : 2 * third]))
    node.kill()
    node.restore_aof(kept)
    node.start()
    part.wait_for(send(kafka_producer, sent.messages[2 * third :]))
    assert_states_equal_single_pass(settings, sent)


def test_a_node_that_was_emptied_gets_its_states_again(cluster, stream_settings, start_reader, kafka_producer) -> None:
    settings = stream_settings(cluster, state_cache_users=10)
    sent = draw(Topics(settings.kafka.topic_prefix), 1200, seed=23)
    middle = len(sent.messages) // 2
    part = start_reader(settings)
    part.wait_for(send(kafka_producer, sent.messages[:middle]))
    cluster.nodes[2].client().flushall()
    part.wait_for(send(kafka_producer, sent.messages[middle:]))
    assert_states_equal_single_pass(settings, sent)


def test_a_failover_in_the_middle_loses_no_state(cluster, stream_settings, start_reader, kafka_producer) -> None:
    settings = stream_settings(cluster, poll_max_events=20)
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=24)
    middle = len(sent.messages) // 2
    part = start_reader(settings)
    written = send(kafka_producer, sent.messages[: middle // 2])
    part.wait_for(written, 60)
    written += send(kafka_producer, sent.messages[middle // 2 : middle])
    fail_over(cluster)
    written += send(kafka_producer, sent.messages[middle:])
    part.wait_for(written, 60)
    assert_states_equal_single_pass(settings, sent)


def fail_over(cluster: Cluster) -> None:
    """The first node dies and its replica takes its place."""
    cluster.nodes[0].kill()
    cluster.nodes[3].client().execute_command("CLUSTER FAILOVER", "TAKEOVER")
    cluster.nodes[0] = cluster.nodes[3]
    wait_until(
        lambda: all(str(cluster.nodes[0].port) in primaries(node.client()) for node in cluster.nodes),
        timeout_seconds=60,
        what="a takeover",
    )
    cluster.wait_ok()


def primaries(client: redis.Redis) -> set[str]:
    with client:
        return {str(slots[2][1]) for slots in client.execute_command(b"CLUSTER", b"SLOTS")}


def test_a_restarted_node_shows_itself_before_a_command_reaches_it(cluster) -> None:
    store = OnlineStore(cluster.settings(), "restart")
    assert all(store.write([state(user_id, b"before") for user_id in USERS]))
    cluster.nodes[1].kill()
    cluster.nodes[1].start()
    cluster.wait_ok()
    with pytest.raises(StoreChangedError):
        store.write([state(user_id, b"after") for user_id in USERS])
    rows = store.read(USER_STATE, [(user_id,) for user_id in USERS])
    assert {row.cells["state"] for row in rows} == {b"before"}


def test_a_promoted_replica_shows_itself_before_a_command_reaches_it(cluster) -> None:
    store = OnlineStore(cluster.settings(), "failover")
    store.write([state(user_id, b"before") for user_id in USERS])
    cluster.nodes[0].client().execute_command("WAIT", 1, 5000)
    fail_over(cluster)
    problems = []
    for _ in range(3):
        try:
            store.write([state(user_id, b"after") for user_id in USERS])
        except StageError as error:
            problems.append(type(error))
            rows = OnlineStore(cluster.settings(), "failover").read(USER_STATE, [(user_id,) for user_id in USERS])
            assert {row.cells["state"] for row in rows} == {b"before"}
    # The first finds nobody where the primary was.
    assert problems == [StageError, StoreChangedError]


def test_a_slot_that_moved_is_an_error_once(cluster) -> None:
    store = OnlineStore(cluster.settings(), "moved")
    store.write([state(user_id, b"x") for user_id in USERS])
    slot, source, target = SLOTS - 1, cluster.nodes[2].client(), cluster.nodes[1].client()
    source_id, target_id = (client.execute_command("CLUSTER MYID") for client in (source, target))
    target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
    source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target_id)
    keys = source.execute_command(b"CLUSTER", b"GETKEYSINSLOT", slot, 1000)
    if keys:
        source.execute_command("MIGRATE", "127.0.0.1", cluster.nodes[1].port, "", 0, 5000, "KEYS", *keys)
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
