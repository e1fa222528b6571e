"""A whole recommender whose every dependency can be hurt from outside: killed, frozen, made slow or flaky, restarted.

Real Kafka and Redis and our own processes under one supervisor, a proxy in front of each of candidate, ranker, Redis
and Kafka, and one more between the stream and Redis. Invariant: nothing here reaches into a process; what hurts it is
a signal or the network.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.fault_proxy import FaultProxy, Mode
from core.kafka import client_config, wait_for_kafka
from core.settings import Settings, load_settings
from core.topics import Topics
from devstack.addresses import Values, to_environment, with_values
from devstack.kafka_local import kafka_home, local_kafka_spec
from devstack.ports import LOOPBACK, Ports
from devstack.processes import ProcessSpec, http_problem, python_module
from devstack.redis_server import redis_problem, redis_spec, redis_url
from devstack.supervisor import Supervisor
from devstack.topics import ensure_topics

DEPENDENCIES = ("candidate", "ranker", "redis", "kafka", "streams")
FAULTS = ("down", "hanging", "slow", "flaky", "restarted")
_START_SECONDS = 180.0
# How often a dependency that is on its way back is asked.
_PROBE_SECONDS = 0.05
_PROBE_TIMEOUT_SECONDS = 1.0
_WORKERS = ("candidate", "ranker", "streams", "serving")
_COMPUTE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


class FaultStack:
    """The processes and the lines between them, by name."""

    def __init__(self, home: Path) -> None:
        self._ports = Ports()
        take = self._ports.take
        self._port = {name: take(name) for name in ("candidate", "ranker", "serving", "redis", "kafka")}
        self._admin = {name: take(f"{name} (admin)") for name in _WORKERS}
        between = {name: take(f"{name} (proxy)") for name in DEPENDENCIES}
        self._proxies = {name: FaultProxy(between[name], self._port[name]) for name in DEPENDENCIES[:4]}
        # The stream has no port of its own: what is slow or flaky of it is its way to the online store.
        self._proxies["streams"] = FaultProxy(between["streams"], self._port["redis"])
        values = self._values(home, between)
        self.settings: Settings = with_values(load_settings(), values, {})
        environment, logs = {**to_environment(values), **_COMPUTE}, home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._supervisor = Supervisor(self._specs(home, between["streams"]), logs, environment=lambda: environment)

    @property
    def serving_address(self) -> str:
        return f"{LOOPBACK}:{self._port['serving']}"

    # --- start and end ---

    async def open(self) -> None:
        for proxy in self._proxies.values():
            await proxy.open()
        await asyncio.to_thread(self._supervisor.start_all, _START_SECONDS)

    async def close(self) -> None:
        await asyncio.to_thread(self._supervisor.stop_all)
        for proxy in self._proxies.values():
            await proxy.close()
        self._ports.close()

    # --- faults ---

    async def strike(self, name: str, fault: str) -> None:
        """Begins a fault. `restarted` is over by itself: the process is asked to end and started again."""
        if fault == "down":
            await asyncio.to_thread(self._supervisor.kill, name, signal.SIGKILL, restart=False)
        elif fault == "hanging":
            await asyncio.to_thread(self._supervisor.kill, name, signal.SIGSTOP, restart=False)
        elif fault == "restarted":
            await asyncio.to_thread(self._supervisor.stop, name)
            self._supervisor.start(name)
        else:
            self._proxies[name].mode = Mode(fault)

    async def heal(self, name: str, fault: str) -> None:
        """Ends a fault; returns at once."""
        if fault == "down":
            self._supervisor.start(name)
        elif fault == "hanging":
            await asyncio.to_thread(self._supervisor.kill, name, signal.SIGCONT, restart=False)
            self._supervisor.start(name)
        elif fault != "restarted":
            self._proxies[name].mode = Mode.CLEAR

    async def answering(self, names: Iterable[str]) -> float:
        """Waits until these dependencies themselves answer, asked past the proxies; returns when (monotonic)."""
        await asyncio.gather(*(asyncio.to_thread(self._wait, name) for name in names))
        return time.monotonic()

    async def restart_serving(self) -> None:
        """Kills the front door, and waits until a new one answers at its port."""
        await asyncio.to_thread(self._supervisor.kill, "serving", signal.SIGKILL, restart=False)
        self._supervisor.start("serving")
        await asyncio.to_thread(self._supervisor.wait_ready, "serving", _START_SECONDS)

    def _wait(self, name: str) -> None:
        problem, end = self._probe(name), time.monotonic() + _START_SECONDS
        while problem():
            if time.monotonic() > end:
                raise TimeoutError(f"{name} does not come back: {problem()}")
            time.sleep(_PROBE_SECONDS)

    def _probe(self, name: str) -> Callable[[], str | None]:
        """What asks a dependency whether it does its work."""
        if name == "redis":
            return lambda: redis_problem(self._port["redis"])
        if name == "kafka":
            return self._kafka_problem
        if name == "streams":
            return lambda: http_problem(self._admin["streams"], "/ready")
        return lambda: _health_problem(f"{LOOPBACK}:{self._port[name]}")

    def _kafka_problem(self) -> str | None:
        """Whether the broker gives its newest offset: for that it must lead the partition."""
        events = Topics(self.settings.kafka.topic_prefix).events
        # A new client each time: one that saw the broker die waits before it tries again.
        admin = AdminClient(client_config(self.settings.kafka) | {"log_level": 0})
        where = TopicPartition(events, 0)
        newest: Any = OffsetSpec
        try:
            asked = admin.list_offsets({where: newest.latest()}, request_timeout=_PROBE_TIMEOUT_SECONDS)
            asked[where].result(_PROBE_TIMEOUT_SECONDS)
        except (KafkaException, TimeoutError) as error:
            return str(error) or "no answer in time"
        return None

    # --- what is run, and what it is told ---

    def _values(self, home: Path, between: dict[str, int]) -> Values:
        return {
            "kafka": {"bootstrap_servers": f"{LOOPBACK}:{between['kafka']}", "replication": 1},
            "redis": {"url": redis_url(between["redis"])},
            "registry": {"path": str(home / "bundles")},
            "streams": {
                "admin_port": self._admin["streams"],
                "event_log_path": str(home / "event_log"),
                "instance_id": "streams",
            },
            "candidate": {"port": self._port["candidate"], "admin_port": self._admin["candidate"]},
            "ranker": {"port": self._port["ranker"], "admin_port": self._admin["ranker"]},
            "serving": {
                "port": self._port["serving"],
                "admin_port": self._admin["serving"],
                "state_path": str(home / "serving"),
                "candidate_target": f"{LOOPBACK}:{between['candidate']}",
                "ranker_target": f"{LOOPBACK}:{between['ranker']}",
            },
        }

    def _specs(self, home: Path, streams_redis_port: int) -> list[ProcessSpec]:
        kafka = local_kafka_spec(
            kafka_home(),
            home / "kafka",
            self._port["kafka"],
            self._ports.take("controller"),
            self._proxies["kafka"].port,
        )
        own = {"streams": {"HEADRACE_REDIS__URL": redis_url(streams_redis_port)}}
        return [
            redis_spec(home / "redis", self._port["redis"]),
            replace(kafka, on_ready=self._kafka_ready),
            *(
                ProcessSpec(
                    name,
                    python_module(name),
                    env=own.get(name, {}),
                    admin_port=self._admin[name],
                    wave=1,
                    start_timeout_seconds=_START_SECONDS,
                )
                for name in _WORKERS
            ),
        ]

    def _kafka_ready(self) -> None:
        wait_for_kafka(self.settings.kafka, _START_SECONDS)
        ensure_topics(self.settings.kafka)


@asynccontextmanager
async def fault_stack(home: Path) -> AsyncIterator[FaultStack]:
    stack = FaultStack(home)
    try:
        await stack.open()
        yield stack
    finally:
        await stack.close()


def _health_problem(address: str) -> str | None:
    with suppress(grpc.RpcError), grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest()
        response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_PROBE_TIMEOUT_SECONDS)
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return None
    return f"{address} does not serve"
