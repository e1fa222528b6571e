"""The whole recommender on one machine: Redis and Kafka, then streams, candidate and ranker, then serving.

`headrace up`, the demo and the end-to-end tests run it. Invariant: everything lies below `home` (one stack per
home), and when the `with` block is left, however, no process of the stack is left.
"""

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

from core.errors import ConfigError, NotFoundError, StageError
from core.kafka import wait_for_kafka
from core.settings import Settings, load_settings
from devstack.addresses import Values, to_environment, to_toml, with_values
from devstack.kafka_broker import FETCH_WAIT_MAX_MS, PARTITIONS, SESSION_TIMEOUT_MS, broker_spec, read_announcement
from devstack.kafka_local import kafka_home, local_kafka_spec
from devstack.keeper import Say
from devstack.ports import LOOPBACK, Ports
from devstack.processes import ProcessSpec, python_module
from devstack.redis_server import redis_spec, redis_url, redis_url_problem
from devstack.signals import signals_call, signals_leave
from devstack.supervisor import Supervisor, say_on_stderr
from devstack.topics import ensure_topics, topic_problems

DEFAULT_HOME = Path(".headrace")
EMBEDDED, LOCAL = "embedded", "local"
_KAFKA_TIMEOUT_SECONDS = 10
_WAIT_SECONDS = 0.5
_TOPICS_SECONDS, _TOPICS_ELSEWHERE_SECONDS = 5.0, 20.0
# The processes with a gRPC port, and all with an admin port.
_GRPC = ("candidate", "ranker", "serving")
_WORKERS = ("streams", "candidate", "ranker")
# One compute thread per process: several that spin on the same cores cost far more than they give.
_COMPUTE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Stack:
    """Starts everything on entering, returns when it is ready, stops everything on leaving.

    Args:
        home: folder for data, logs and (unless the settings name another) bundles.
        kafka: "embedded", "local" (from KAFKA_HOME) or the host:port of a running one.
        redis_url: a running Redis; none is started then.
        ports: "free" picks free ones, "fixed" takes those of the settings.
        bundles: the registry of release bundles.
        extra_env: HEADRACE_<SECTION>__<KEY> for all processes, above everything else.
        processes: what to run instead of the recommender's own processes, beside Redis and Kafka.
        say: told of each event as (process, text), from several threads.
        verbose: the processes' logs also go to stderr.
        fresh: begin without the data of earlier stacks in `home` (Redis, local Kafka).
    """

    def __init__(
        self,
        home: Path = DEFAULT_HOME,
        *,
        kafka: str = EMBEDDED,
        redis_url: str | None = None,
        ports: Literal["free", "fixed"] = "free",
        bundles: Path | None = None,
        extra_env: Mapping[str, str] | None = None,
        config: Path | None = None,
        processes: Sequence[ProcessSpec] | None = None,
        say: Say = say_on_stderr,
        verbose: bool = False,
        fresh: bool = False,
    ) -> None:
        self.home = home.absolute()
        self.folder = self.home / "stack"
        self.logs = self.home / "logs"
        self.settings_file = self.folder / "settings.toml"
        self._kafka, self._redis_url, self._fixed = kafka, redis_url, ports == "fixed"
        self._extra_env = dict(extra_env or {})
        self._config = config.absolute() if config is not None else None
        self._base = load_settings(config)
        self._processes, self._say, self._verbose, self._fresh = processes, say, verbose, fresh
        self._ports = Ports()
        self._values = self._paths(bundles)
        self._announce: Path | None = None
        self._supervisor: Supervisor | None = None
        self._exit = ExitStack()

    # --- what the stack is, for its clients ---

    @property
    def settings(self) -> Settings:
        """Settings with the addresses of this stack, for clients in this process."""
        return with_values(self._base, self._values, self._extra_env)

    @property
    def names(self) -> tuple[str, ...]:
        return self._running.names

    def address(self, name: str) -> str:
        """host:port of "serving", "candidate", "ranker" (gRPC), "kafka" or "redis"."""
        settings = self.settings
        if name == "kafka":
            return settings.kafka.bootstrap_servers
        if name == "redis":
            url = urlsplit(settings.redis.url.get_secret_value())
            return f"{url.hostname}:{url.port or 6379}"
        if name not in _GRPC:
            raise NotFoundError(f"{name} has no address; there are kafka, redis, {', '.join(_GRPC)}")
        return f"{LOOPBACK}:{getattr(settings, name).port}"

    def admin_address(self, name: str) -> str:
        """host:port of /live, /ready and /metrics."""
        if name not in (*_WORKERS, "serving"):
            raise NotFoundError(f"{name} has no admin port; there are {', '.join((*_WORKERS, 'serving'))}")
        return f"{LOOPBACK}:{getattr(self.settings, name).admin_port}"

    # --- its processes ---

    def pid(self, name: str) -> int:
        return self._running.pid(name)

    def kill(self, name: str, number: int = signal.SIGKILL, *, restart: bool = True) -> None:
        """Sends a signal; with `restart` False the process is left alone until `start`."""
        self._running.kill(name, number, restart=restart)

    def start(self, name: str) -> None:
        self._running.start(name)

    def stop(self, name: str) -> None:
        self._running.stop(name)

    def wait_ready(self, name: str, timeout_seconds: float = 60) -> None:
        self._running.wait_ready(name, timeout_seconds)

    def wait(self) -> None:
        """Returns never: until Ctrl-C or a signal ends it."""
        pause = threading.Event()
        # In turns: a signal that comes just before a wait begins is heard when that wait ends.
        while not pause.wait(_WAIT_SECONDS):
            pass

    @property
    def _running(self) -> Supervisor:
        if self._supervisor is None:
            raise NotFoundError("the stack has not been started; use it as `with Stack(...) as stack`")
        return self._supervisor

    # --- start and end ---

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(signals_leave())
            undo.enter_context(only_one(self.folder))
            undo.callback(self._ports.close)
            if self._fresh:
                for name in ("redis", "kafka"):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            self._rotate_logs()
            self._supervisor = Supervisor(
                self._specs(), self.logs, environment=self._environment, say=self._say, verbose=self._verbose
            )
            undo.callback(self._stop)
            if self._redis_url is not None and (problem := redis_url_problem(self._redis_url)):
                raise StageError("redis", problem)
            if self._kafka not in (EMBEDDED, LOCAL):
                wait_for_kafka(self.settings.kafka, _KAFKA_TIMEOUT_SECONDS)
                self._prepare_topics()
            self._write_settings()
            self._supervisor.start_all()
            self._exit = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def _stop(self) -> None:
        with signals_call(self._running.kill_all):
            self._running.stop_all()

    def _rotate_logs(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for log in self.logs.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))

    # --- what is run, and what it is told ---

    def _paths(self, bundles: Path | None) -> Values:
        values: Values = {"kafka": {}, "redis": {}, "registry": {}, "streams": {}}
        values["candidate"], values["ranker"], values["serving"] = {}, {}, {}
        values["registry"]["path"] = str(bundles.absolute() if bundles else bundles_below(self.home, self._base))
        if self._base.streams.event_log_path == str(DEFAULT_HOME / "event_log"):
            values["streams"]["event_log_path"] = str(self.home / "event_log")
        if self._base.serving.state_path == str(DEFAULT_HOME / "serving"):
            values["serving"]["state_path"] = str(self.home / "serving")
        return values

    def _specs(self) -> list[ProcessSpec]:
        infrastructure = [*self._redis_specs(), *self._kafka_specs()]
        needs = tuple(spec.name for spec in infrastructure)
        for name in (*_WORKERS, "serving"):
            section = getattr(self._base, name)
            self._values[name]["admin_port"] = self._take(f"{name} (admin)", section.admin_port)
            if name in _GRPC:
                self._values[name]["port"] = self._take(name, section.port)
        for name in ("candidate", "ranker"):
            self._values["serving"][f"{name}_target"] = f"{LOOPBACK}:{self._values[name]['port']}"
        if self._processes is not None:
            return [*infrastructure, *self._processes]
        # Serving comes up beside the workers: it answers without them, and they take seconds to import.
        waves = {**dict.fromkeys(_WORKERS, 1), "serving": 2}
        return [
            *infrastructure,
            *(
                ProcessSpec(
                    name,
                    python_module(name),
                    admin_port=self._values[name]["admin_port"],
                    depends_on=needs,
                    wave=wave,
                )
                for name, wave in waves.items()
            ),
        ]

    def _take(self, name: str, fixed_port: int) -> int:
        return self._ports.take(name, fixed_port if self._fixed else 0)

    def _redis_specs(self) -> list[ProcessSpec]:
        if self._redis_url is not None:
            self._values["redis"].update(url=self._redis_url, cluster=self._base.redis.cluster)
            return []
        port = self._take("redis", urlsplit(self._base.redis.url.get_secret_value()).port or 6379)
        self._values["redis"].update(url=redis_url(port), cluster=False)
        return [redis_spec(self.folder / "redis", port)]

    def _kafka_specs(self) -> list[ProcessSpec]:
        values, folder = self._values["kafka"], self.folder / "kafka"
        values["log_id"] = ""
        if self._kafka == EMBEDDED:
            values.update(partitions=PARTITIONS, fetch_wait_max_ms=FETCH_WAIT_MAX_MS, replication=1)
            self._values["streams"]["session_timeout_ms"] = SESSION_TIMEOUT_MS
            spec, self._announce = broker_spec(folder)
        elif self._kafka == LOCAL:
            named = self._base.kafka.bootstrap_servers.rpartition(":")[2]
            port, controller_port = self._take("kafka", int(named)), self._ports.take("kafka (controller)")
            values.update(bootstrap_servers=f"{LOOPBACK}:{port}", replication=1)
            # There is one worker, and the broker is its own: after a kill of either it goes on at once.
            self._values["streams"]["instance_id"] = "streams"
            spec = local_kafka_spec(kafka_home(), folder, port, controller_port)
        else:
            if not _is_address(self._kafka):
                raise ConfigError(f'kafka "{self._kafka}": give embedded, local or HOST:PORT[,HOST:PORT…]')
            values["bootstrap_servers"] = self._kafka
            return []
        return [replace(spec, on_ready=self._kafka_ready)]

    def _kafka_ready(self) -> None:
        """Runs each time the broker has come up, before anything that needs it."""
        before = self._values["kafka"].get("log_id", "")
        if self._announce is not None and (announced := read_announcement(self._announce)) is not None:
            self._values["kafka"].update(bootstrap_servers=announced.bootstrap_servers, log_id=announced.log_id)
        wait_for_kafka(self.settings.kafka, _KAFKA_TIMEOUT_SECONDS)
        self._prepare_topics()
        self._write_settings()
        if before and before != self._values["kafka"]["log_id"]:
            # The embedded broker forgot everything and is elsewhere: who talked to the old one begins anew.
            self._say("kafka", "is a new, empty log; everything that reads it is started again")
            for name in (name for name in self._running.names if name not in ("kafka", "redis")):
                self._running.restart(name)

    def _prepare_topics(self) -> None:
        # Ctrl-C reaches our own brokers, too: one that has just gone must not be waited for.
        seconds = _TOPICS_SECONDS if self._kafka in (EMBEDDED, LOCAL) else _TOPICS_ELSEWHERE_SECONDS
        ensure_topics(self.settings.kafka, seconds)
        for problem in topic_problems(self.settings.kafka, seconds):
            self._say("kafka", problem)

    def _environment(self) -> dict[str, str]:
        config = {} if self._config is None else {"HEADRACE_CONFIG": str(self._config)}
        compute = {name: os.environ.get(name, value) for name, value in _COMPUTE.items()}
        return {**compute, "PYTHONUNBUFFERED": "1", **config, **to_environment(self._values), **self._extra_env}

    def _write_settings(self) -> None:
        self.settings_file.touch(0o600)
        self.settings_file.write_text(to_toml(self._values), "utf-8")


def bundles_below(home: Path, settings: Settings) -> Path:
    """The registry of bundles: the one that the settings name, where they name another than the default."""
    named = settings.registry.path
    return (home / "bundles" if named == DEFAULT_HOME / "bundles" else named).absolute()


def _is_address(text: str) -> bool:
    return all(host and port.isdigit() for host, _, port in (part.rpartition(":") for part in text.split(",")))


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the kernel lets go of it when this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; give a folder that can be written to with --home") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ConfigError(
                f"another stack (process {lock.read().strip() or '?'}) runs in {folder.parent}; stop it, or give "
                "another folder with --home"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
