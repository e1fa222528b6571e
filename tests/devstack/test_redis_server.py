"""The embedded Redis: real server, real data, real kill."""

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from core.errors import ConfigError
from devstack import redis_server
from devstack.keeper import State
from devstack.ports import Ports
from devstack.redis_server import redis_binary, redis_problem, redis_spec, redis_url
from devstack.supervisor import Supervisor


@pytest.fixture
def server(tmp_path: Path, ports: Ports) -> Iterator[tuple[Supervisor, int]]:
    port = ports.take("redis")
    # A blank in the path: Redis splits its settings at blanks.
    supervisor = Supervisor([redis_spec(tmp_path / "my stack", port)], tmp_path, say=lambda _name, _text: None)
    supervisor.start_all(30)
    yield supervisor, port
    supervisor.stop_all()


def test_what_was_written_is_there_after_a_kill(server: tuple[Supervisor, int]) -> None:
    supervisor, port = server
    with redis.Redis.from_url(redis_url(port)) as client:
        with client.pipeline(transaction=False) as pipeline:
            for n in range(1000):
                pipeline.hset(f"user-{n}", mapping={"revision": n})
            pipeline.execute()
        first_run = client.info("server")["run_id"]
    os.kill(supervisor.pid("redis"), signal.SIGKILL)
    assert supervisor.wait_state("redis", State.RESTARTING, 5)
    supervisor.wait_ready("redis", 30)
    with redis.Redis.from_url(redis_url(port)) as client:
        assert client.info("server")["run_id"] != first_run
        assert client.dbsize() == 1000
        assert client.hget("user-999", "revision") == b"999"


def test_it_listens_on_loopback_only_and_its_folder_is_ours(server: tuple[Supervisor, int], tmp_path: Path) -> None:
    _, port = server
    with redis.Redis.from_url(redis_url(port)) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.config_get("appendonly")["appendonly"] == "yes"
        assert client.config_get("appendfsync")["appendfsync"] == "everysec"
    assert stat.S_IMODE((tmp_path / "my stack").stat().st_mode) == 0o700


def test_no_answer_is_a_problem(ports: Ports) -> None:
    assert "Connection refused" in (redis_problem(ports.take("redis")) or "")


def test_a_binary_that_cannot_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(redis_server, "find_spec", lambda _name: found)
    with pytest.raises(ConfigError, match="is missing; install it again"):
        redis_binary()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "redis-server").touch(mode=0o644)
    with pytest.raises(ConfigError, match="is not executable; `chmod"):
        redis_binary()
