"""A Redis Cluster behind the thin store (`ClusterLink`, sync) and behind the request path's reader (`ClusterReads`).

Beside features.stores.link, chosen by `redis.cluster`. Not redis-py's own cluster client: that one follows redirections
and swallows what connecting raises, which hides a primary that is another one than before. Invariant: every primary is
known by its run_id from the first command on, and after any error the owners of the slots are read anew, so a restarted
or newly promoted primary raises AnotherRedisError before a command reaches it.
"""

import asyncio
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import redis
from redis.asyncio import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import ClusterDownError

from core.settings import RedisSettings
from features.stores.link import AnotherRedisError, Command, connection_options, greet, packed

Address = tuple[str, int]


class ClusterLink:
    """One connection per primary."""

    def __init__(self, settings: RedisSettings, scripts: Sequence[str]) -> None:
        self._url = settings.url.get_secret_value()
        self._options = connection_options(settings)
        self._scripts = scripts
        # Every node that was heard of, to ask for the others.
        self._nodes: list[Address] = []
        # Primary by slot; empty when it has to be asked for.
        self._owners: list[Address] = []
        self._homes: list[bytes] = []
        self._pools: dict[Address, redis.ConnectionPool] = {}
        self._run_ids: dict[Address, bytes] = {}
        self._all_known = False

    def send(self, commands: Sequence[Command], at: bytes = b"") -> list[Any]:
        if not commands:
            return []
        self._learn()
        parts = _by_owner(self._owners, commands, at)
        answers: list[Any] = [None] * len(commands)
        connections: list[tuple[Address, Any]] = []
        try:
            # All of them before the first command: it is now that a primary shows itself as another one.
            connections.extend((address, self._pools[address].get_connection()) for address in parts)
            for address, connection in connections:
                connection.send_packed_command([packed([commands[index] for index in parts[address]])])
            for address, connection in connections:
                for index in parts[address]:
                    answers[index] = connection.read_response()
            return answers
        except BaseException:
            # The slot may be another primary's by now; and answers may be left in the connections.
            self._owners = []
            for _, connection in connections:
                connection.disconnect()
            raise
        finally:
            for address, connection in connections:
                self._pools[address].release(connection)

    def homes(self) -> Sequence[bytes]:
        self._learn()
        return self._homes

    def close(self) -> None:
        for pool in self._pools.values():
            pool.disconnect()

    def _learn(self) -> None:
        """Which primary owns which slot, and that each of them is the one that it was."""
        if self._owners:
            return
        host, slots = self._ask_for_slots()
        owners, self._nodes = _owners(slots, host), _nodes(slots, host)
        firsts = {address: owners.index(address) for address in dict.fromkeys(owners)}
        for address in self._pools.keys() - firsts.keys():
            self._pools.pop(address).disconnect()
            # Should it come back, then as another one: it lacks what its replacement was last told.
            self._run_ids.pop(address, None)
        for address in firsts:
            if address not in self._pools:
                self._pools[address] = self._pool(address, redis_connect_func=self._on_connect)
            self._pools[address].release(self._pools[address].get_connection())
        self._owners, self._homes, self._all_known = owners, [_home(first) for first in firsts.values()], True

    def _ask_for_slots(self) -> tuple[str, list[Any]]:
        problem: Exception = redis.ConnectionError("no node")
        for address in (*self._nodes, None):
            pool = self._pool(address)
            try:
                connection: Any = pool.get_connection()
                connection.send_command("CLUSTER", "SLOTS")
                return connection.host, connection.read_response()
            except redis.RedisError as error:
                problem = error
            finally:
                pool.disconnect()
        raise problem

    def _pool(self, address: Address | None, **more: Any) -> redis.ConnectionPool:
        pool = redis.ConnectionPool.from_url(self._url, **self._options, **more)
        if address is not None:
            pool.connection_kwargs.update(host=address[0], port=address[1])
        return pool

    def _on_connect(self, connection: Any) -> None:
        address = connection.host, connection.port
        run_id = greet(connection, self._scripts)
        before, self._run_ids[address] = self._run_ids.get(address), run_id
        if self._all_known and run_id != before:
            raise AnotherRedisError


class ClusterReads:
    """The commands of redis.asyncio.Redis that the request path uses, each sent to the primary that owns its key.

    Belongs to one event loop. Redirections are errors, as all others are; the next read knows better.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._url, self._options = url, options
        self._nodes: list[Address] = []
        self._clients: dict[Address, Any] = {}
        # Primary by slot, or on the way.
        self._owners: asyncio.Future[list[Address]] | None = None

    async def hmget(self, key: bytes, fields: Sequence[bytes]) -> Any:
        return (await self.send([(b"HMGET", key, *fields)]))[0]

    async def hget(self, key: bytes, field: bytes) -> Any:
        return (await self.send([(b"HGET", key, field)]))[0]

    def pipeline(self, *, transaction: bool) -> "_Reads":  # noqa: ARG002 - reads need none
        return _Reads(self)

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Answers in order; the nodes are asked at the same time."""
        owners = self._owners
        if owners is None:
            owners = self._owners = asyncio.ensure_future(self._learn())
            owners.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            # A request that gives up waiting leaves it to the next one.
            parts = _by_owner(await asyncio.shield(owners), commands)
            found = await asyncio.gather(
                *(self._ask(address, [commands[index] for index in part]) for address, part in parts.items())
            )
        except (redis.RedisError, OSError):
            # Once for all the requests that fail together.
            if self._owners is owners:
                self._owners = None
            raise
        answers: list[Any] = [None] * len(commands)
        for part, values in zip(parts.values(), found, strict=True):
            for index, value in zip(part, values, strict=True):
                answers[index] = value
        return answers

    async def aclose(self) -> None:
        if self._owners is not None:
            self._owners.cancel()
        for client in self._clients.values():
            await client.aclose()

    async def _ask(self, address: Address, commands: Sequence[Command]) -> list[Any]:
        client = self._clients[address]
        if len(commands) == 1:
            return [await client.execute_command(*commands[0])]
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute()
        return answers

    async def _learn(self) -> list[Address]:
        problem: Exception = redis.ConnectionError("no node")
        for address in (*self._nodes, None):
            client = self._client(address)
            try:
                host = client.connection_pool.connection_kwargs["host"]
                # Not by its name: redis-py would make something else of the answer.
                slots = await client.execute_command(b"CLUSTER", b"SLOTS")
            except (redis.RedisError, OSError) as error:
                problem = error
                continue
            finally:
                await client.aclose()
            owners, self._nodes = _owners(slots, host), _nodes(slots, host)
            primaries = set(owners)
            for gone in self._clients.keys() - primaries:
                await self._clients.pop(gone).aclose()
            for new in primaries - self._clients.keys():
                self._clients[new] = self._client(new)
            return owners
        raise problem

    def _client(self, address: Address | None) -> Any:
        client = Redis.from_url(self._url, **self._options)
        if address is not None:
            client.connection_pool.connection_kwargs.update(host=address[0], port=address[1])
        return client


class _Reads:
    """Reads that go out together."""

    def __init__(self, reads: ClusterReads) -> None:
        self._reads = reads
        self._commands: list[Command] = []

    def hget(self, key: bytes, field: bytes) -> None:
        self._commands.append((b"HGET", key, field))

    async def execute(self) -> list[Any]:
        return await self._reads.send(self._commands)


def _by_owner(owners: Sequence[Address], commands: Sequence[Command], at: bytes = b"") -> dict[Address, list[int]]:
    """Numbers of the commands that each primary gets, in order."""
    parts: dict[Address, list[int]] = {}
    for index, command in enumerate(commands):
        key: Any = at or command[3 if command[0] == b"EVALSHA" else 1]
        parts.setdefault(owners[key_slot(key)], []).append(index)
    return parts


def _owners(slots: Iterable[Sequence[Any]], asked: str) -> list[Address]:
    """Primary by slot, of what CLUSTER SLOTS says."""
    owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    for first, last, primary, *_ in slots:
        owners[first : last + 1] = [_address(primary, asked)] * (last + 1 - first)
    covered = [address for address in owners if address is not None]
    if len(covered) < len(owners):
        raise ClusterDownError(f"{len(owners) - len(covered)} slots have no owner")
    return covered


def _nodes(slots: Iterable[Sequence[Any]], asked: str) -> list[Address]:
    return list(dict.fromkeys(_address(node, asked) for _, _, *nodes in slots for node in nodes))


def _address(node: Sequence[Any], asked: str) -> Address:
    # A node that does not know its own address leaves it empty.
    host = node[0].decode() if isinstance(node[0], bytes) else node[0]
    return host or asked, int(node[1])


@cache
def _home(slot: int) -> bytes:
    """The shortest beginning that puts keys into a slot."""
    number = 0
    while key_slot(b"%d" % number) != slot:
        number += 1
    return b"{%d}" % number
