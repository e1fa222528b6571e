"""Real Redis servers for tests, one alone or a cluster: to be killed, emptied, set back and failed over.

Started by the fixtures of tests/conftest.py. Invariant: both take the same blows under the same names.
"""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from core.errors import ConfigError
from core.settings import RedisSettings, Settings, load_settings
from devstack.child import tied
from devstack.ports import Ports
from devstack.redis_server import redis_spec, redis_url

SLOTS = 16384


def wait_until(condition: Callable[[], object], timeout_seconds: float = 20, what: str = "") -> object:
    """Asks again and again; returns the first true answer."""
    end = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"{what or condition} did not come true in {timeout_seconds} s"
        time.sleep(0.005)
    return result


class RedisServer:
    """A redis-server with its append-only file on, as the stack runs it."""

    cluster = False

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.folder, self.port, self.url = folder, port, redis_url(port)
        self._spec = redis_spec(folder, port)
        self._command = (*self._spec.command, *options)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(tied(self._command), stdout=subprocess.DEVNULL)
        wait_until(lambda: self._spec.ready_problem() is None, what="redis")

    def kill(self) -> None:
        """kill -9: what was written is in the append-only file."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def keep_aof(self) -> Path:
        """A copy of the append-only file as it is now."""
        copy = self.folder / "kept.aof"
        shutil.copy(self.folder / "appendonly.aof", copy)
        return copy

    def restore_aof(self, copy: Path) -> None:
        """The server (stopped) will come up as it was when the copy was made."""
        shutil.copy(copy, self.folder / "appendonly.aof")

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)

    def empty(self) -> None:
        self.client().flushall()

    def stop(self) -> None:
        if self._process is not None:
            self.kill()


class Cluster:
    """Primaries with equal shares of the slots; nodes[3] is a replica of nodes[0], nodes[2] the one that suffers."""

    cluster = True

    def __init__(self, folder: Path, ports: Ports) -> None:
        # What a machine under load does not do in time is no failure: only a test promotes the replica.
        options = [
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "15000",
            "--cluster-replica-no-failover",
            "yes",
        ]
        options += ["--appendfsync", "always"]
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
        wait_until(lambda: all(self._state(node, "cluster_known_nodes:4") for node in self.nodes), 60, "four nodes")
        replica.execute_command("CLUSTER REPLICATE", first.execute_command("CLUSTER MYID"))
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", 60, "the replica")
        self.wait_ok()

    def wait_ok(self) -> None:
        wait_until(lambda: all(self._state(node, "cluster_state:ok") for node in self.nodes), 60, "the cluster")

    @staticmethod
    def _state(node: RedisServer, line: str) -> bool:
        with node.client() as client:
            # redis-py would make a dict of it, and of dicts that it does not know nothing.
            return line.encode() in client.execute_command(b"CLUSTER", b"INFO")

    def kill(self) -> None:
        """kill -9 of one primary."""
        self.nodes[2].kill()

    def start(self) -> None:
        self.nodes[2].start()

    def keep_aof(self) -> Path:
        return self.nodes[2].keep_aof()

    def restore_aof(self, copy: Path) -> None:
        self.nodes[2].restore_aof(copy)

    def empty(self) -> None:
        """One primary forgets everything."""
        self.nodes[2].empty()

    def fail_over(self) -> None:
        """The first node dies and its replica takes its place."""
        self.nodes[0].kill()
        self.nodes[3].client().execute_command("CLUSTER FAILOVER", "TAKEOVER")
        self.nodes[0] = self.nodes[3]
        wait_until(
            lambda: all(str(self.nodes[0].port) in _primaries(node.client()) for node in self.nodes),
            timeout_seconds=60,
            what="a takeover",
        )
        self.wait_ok()

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

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


def _primaries(client: redis.Redis) -> set[str]:
    with client:
        return {str(slots[2][1]) for slots in client.execute_command(b"CLUSTER", b"SLOTS")}


@contextmanager
def single_redis(folder: Path) -> Iterator[RedisServer]:
    ports = Ports()
    server = RedisServer(folder, ports.take("redis"))
    server.start()
    try:
        yield server
    finally:
        server.stop()
        ports.close()


@contextmanager
def redis_cluster(folder: Path) -> Iterator[Cluster]:
    ports = Ports()
    made = Cluster(folder, ports)
    try:
        yield made
    finally:
        made.stop()
        ports.close()
