"""How the thin store reaches Redis: one Redis here, a cluster of them in features.stores.cluster.

Below features.stores.online, which knows rows and markers. Invariant: what is sent together goes out as one buffer per
Redis and is never sent twice, and a Redis that is another one than before raises AnotherRedisError while connecting,
before a command reaches it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from core.settings import RedisSettings

Command = tuple[bytes | str | int, ...]


class AnotherRedisError(redis.ConnectionError):
    """Raised while connecting, so that the command is not sent."""


class Link(Protocol):
    """What the store asks of its Redis. Not thread-safe. Errors are those of redis-py."""

    def send(self, commands: Sequence[Command], at: bytes = b"") -> list[Any]:
        """Sends commands on one key each and returns their answers in order; with `at`, to where that key is."""

    def homes(self) -> Sequence[bytes]:
        """For each Redis that keeps rows, a beginning of keys that are kept there."""

    def close(self) -> None: ...


class RedisLink:
    """One Redis, one connection."""

    def __init__(self, settings: RedisSettings, scripts: Sequence[str]) -> None:
        self._scripts = scripts
        self._run_id: bytes | None = None
        self._pool = redis.ConnectionPool.from_url(
            settings.url.get_secret_value(), redis_connect_func=self._on_connect, **connection_options(settings)
        )

    def send(self, commands: Sequence[Command], at: bytes = b"") -> list[Any]:  # noqa: ARG002 - all is in one place
        # As a pipeline of redis-py does, at a fraction of its cost, and without asking for the script each time.
        if not commands:
            return []
        connection: Any = self._pool.get_connection()
        try:
            connection.send_packed_command([packed(commands)])
            return [connection.read_response() for _ in commands]
        except BaseException:
            # Answers may be left in it; and a new one has the scripts again.
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def homes(self) -> Sequence[bytes]:
        return (b"",)

    def close(self) -> None:
        self._pool.disconnect()

    def _on_connect(self, connection: Any) -> None:
        run_id = greet(connection, self._scripts)
        before, self._run_id = self._run_id, run_id
        if before is not None and run_id != before:
            # Now, before the command that wanted this connection: a marker must not be set on rows that are gone.
            raise AnotherRedisError


def packed(commands: Sequence[Command]) -> bytes:
    """Commands as they go over the wire, in one buffer: redis-py would make a system call for every few of them."""
    pack: Callable[[Command], bytes] = hiredis.pack_command  # type: ignore[assignment]
    return b"".join(map(pack, commands))


def connection_options(settings: RedisSettings) -> dict[str, Any]:
    return {
        "socket_timeout": settings.timeout_ms / 1000,
        "socket_connect_timeout": settings.timeout_ms / 1000,
        # A silent retry or reconnect would hide a Redis that lost its last seconds.
        "retry": Retry(NoBackoff(), 0),
    }


def greet(connection: Any, scripts: Sequence[str]) -> bytes:
    """Makes a new connection ready, scripts and all; returns the line that tells this Redis from others."""
    connection.on_connect()
    commands = [("INFO", "server"), *(("SCRIPT", "LOAD", script) for script in scripts)]
    connection.send_packed_command(connection.pack_commands(commands))
    info, *_ = [connection.read_response() for _ in commands]
    text = info if isinstance(info, bytes) else str(info).encode()
    return next((line for line in text.split(b"\r\n") if line.startswith(b"run_id:")), b"")
