"""What retrieving candidates costs: `python -m benchmarks.retrieve [--quick] [--json]`.

The candidate service as it runs (`python -m candidate`, five sources, 500 candidates) over 100,000 made-up items: one
caller, then several at once, of one process and of two replicas, beside a gRPC server that answers the same bytes and
does nothing else. Figures: benchmarks/retrieve.md. Invariant: all are asked by the same client with the same requests,
one after the other, and the client reads the whole reply.
"""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from benchmarks.retrieve_world import item_id, publish_world, user_states
from candidate.snapshot import read_item_vectors
from core.bundle import ReleaseBundle
from core.errors import StageError
from core.grpc_runtime import GrpcServer, channel
from core.settings import Settings, load_settings
from devstack.child import tied
from devstack.ports import Ports
from features import windows
from headrace.v1.candidate_service_pb2 import RetrieveCandidatesRequest
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub
from headrace.v1.types_pb2 import ItemFilter

K, _USERS, _EVENTS, _EXCLUDED = 500, 256, 30, 1000
_METHOD = "/headrace.v1.CandidateService/RetrieveCandidates"
_START_SECONDS, _CALL_SECONDS = 120.0, 10.0


@dataclass(frozen=True)
class Plan:
    """How much is asked."""

    items: int
    warm_up_calls: int
    calls: int
    busy_seconds: float
    callers: int


FULL, QUICK = Plan(100_000, 500, 5000, 15.0, 16), Plan(100_000, 100, 500, 3.0, 16)


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    settings = load_settings()
    say(f"making {plan.items:,} items")
    bundle = publish_world(folder / "bundles", plan.items, settings)
    requests = make_requests(bundle, plan, settings)
    with _candidate(folder) as target:
        say(f"one caller, {plan.calls:,} calls of each kind; then {plan.callers} callers, {plan.busy_seconds:.0f} s")
        kinds = {name: uvloop.run(_alone(target, of_kind, plan)) for name, of_kind in requests.items()}
        busy = uvloop.run(_busy([target], requests["stored vector"], plan))
        reply = uvloop.run(_one(target, requests["stored vector"][0]))
        say("the same callers, two replicas")
        with _candidate(folder) as other:
            busy_two = uvloop.run(_busy([target, other], requests["stored vector"], plan))
    with _echo(reply) as target:
        say("the same of a server that answers the same bytes")
        echo = uvloop.run(_alone(target, requests["stored vector"], plan))
        echo_busy = uvloop.run(_busy([target], requests["stored vector"], plan))
    main = kinds["stored vector"]
    return {
        "items": plan.items,
        "k": K,
        "p50_ms": main["p50_ms"],
        "p99_ms": main["p99_ms"],
        "rps": busy,
        "rps_two_replicas": busy_two,
        "echo_p50_ms": echo["p50_ms"],
        "echo_p99_ms": echo["p99_ms"],
        "echo_rps": echo_busy,
        "reply_bytes": len(reply),
        "callers": plan.callers,
        "kinds": kinds,
        "load_average": round(os.getloadavg()[0], 1),
    }


def make_requests(bundle: ReleaseBundle, plan: Plan, settings: Settings) -> dict[str, list[RetrieveCandidatesRequest]]:
    """Requests of some users, in the ways that they may come."""
    rng, vectors = np.random.default_rng(5), read_item_vectors(bundle)
    plain, encoded, narrow = [], [], []
    for state in user_states(_USERS, _EVENTS, plan.items, settings):
        common: dict[str, Any] = {"user_id": "u", "state": windows.encode(state), "num_candidates": K, "columns": True}
        # Between two items, as users are.
        stored = vectors[rng.integers(plan.items)] + vectors[rng.integers(plan.items)]
        version = bundle.manifest.embedding_version
        known = {"embedding": stored.tolist(), "embedding_version": version, "embedding_revision": state.revision}
        excluded = [item_id(row) for row in rng.integers(0, plan.items, _EXCLUDED).tolist()]
        some = [f"category-{number}" for number in range(10)]
        plain.append(RetrieveCandidatesRequest(**common, **known))
        encoded.append(RetrieveCandidatesRequest(**common))
        item_filter = ItemFilter(categories_any=some, exclude_item_ids=excluded)
        narrow.append(RetrieveCandidatesRequest(**common, **known, filter=item_filter, exclude_seen=True))
    return {"stored vector": plain, "encoded from history": encoded, "filter, 1,000 excluded": narrow}


async def _one(target: str, request: RetrieveCandidatesRequest) -> bytes:
    async with channel(target) as connection:
        response = await CandidateServiceStub(connection).RetrieveCandidates(request, timeout=_CALL_SECONDS)
        if len(response.item_ids) != K or response.missing_sources:
            raise StageError("candidate", f"{len(response.item_ids)} candidates, missing {response.missing_sources}")
        return bytes(response.SerializeToString())


async def _alone(target: str, requests: Sequence[RetrieveCandidatesRequest], plan: Plan) -> dict[str, float]:
    waits: list[float] = []
    async with channel(target) as connection:
        stub = CandidateServiceStub(connection)
        for number in range(plan.warm_up_calls + plan.calls):
            started = time.perf_counter()
            await stub.RetrieveCandidates(requests[number % len(requests)], timeout=_CALL_SECONDS)
            waits.append((time.perf_counter() - started) * 1000)
    p50, p90, p99 = np.percentile(waits[plan.warm_up_calls :], [50, 90, 99]).tolist()
    return {"p50_ms": round(p50, 2), "p90_ms": round(p90, 2), "p99_ms": round(p99, 2)}


async def _busy(targets: Sequence[str], requests: Sequence[RetrieveCandidatesRequest], plan: Plan) -> float:
    """Answers a second, with several callers that each wait for their own; they take turns among the targets."""
    done, end = 0, time.monotonic() + plan.busy_seconds

    async def call(first: int, stub: Any) -> None:
        nonlocal done
        number = first
        while time.monotonic() < end:
            await stub.RetrieveCandidates(requests[number % len(requests)], timeout=_CALL_SECONDS)
            done, number = done + 1, number + 1

    async with AsyncExitStack() as open_channels:
        channels = [await open_channels.enter_async_context(channel(target)) for target in targets]
        stubs = [CandidateServiceStub(one) for one in channels]
        started = time.monotonic()
        await asyncio.gather(*(call(17 * caller, stubs[caller % len(stubs)]) for caller in range(plan.callers)))
        return round(done / (time.monotonic() - started), 1)


@contextmanager
def _candidate(folder: Path) -> Iterator[str]:
    """The service, without Kafka: nothing changes meanwhile."""
    ports = Ports()
    port, admin_port = ports.take("candidate"), ports.take("admin")
    environment = {
        **os.environ,
        "HEADRACE_REGISTRY__PATH": str(folder / "bundles"),
        "HEADRACE_CANDIDATE__PORT": str(port),
        "HEADRACE_CANDIDATE__ADMIN_PORT": str(admin_port),
        "HEADRACE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1",
    }
    log_path = folder / f"candidate-{port}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(tied([sys.executable, "-m", "candidate"]), env=environment, stderr=log)
    try:
        _wait_ready(process, f"http://127.0.0.1:{admin_port}/ready", log_path)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        ports.close()


def _wait_ready(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):  # noqa: S310 - our own loopback port
                return
        except OSError:
            time.sleep(0.1)
    raise StageError("candidate", f"did not become ready; see {log}:\n{log.read_text('utf-8')[-2000:]}")


@contextmanager
def _echo(reply: bytes) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_echo, args=(reply, theirs), daemon=True)
    process.start()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve_echo(reply: bytes, told: Connection) -> None:
    async def answer(_: bytes, __: Any) -> bytes:
        return reply

    async def serve() -> None:
        server = GrpcServer("127.0.0.1", 0, [])
        service, method = _METHOD[1:].split("/")
        handlers = {method: grpc.unary_unary_rpc_method_handler(answer)}
        server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        server.start()
        told.send(server.port)
        await asyncio.Event().wait()

    uvloop.run(serve())


def say(text: str) -> None:
    print(f"{'retrieve':>10}  {text}", file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], console: Console) -> None:
    title = f"RetrieveCandidates, k = {result['k']}, {result['items']:,} items, {result['reply_bytes']:,} bytes a reply"
    table = Table(title=title, title_justify="left")
    for column in ("what", "p50 ms", "p90 ms", "p99 ms", f"replies/s, {result['callers']} callers"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, kind in result["kinds"].items():
        busy = f"{result['rps']:,}" if name == "stored vector" else ""
        table.add_row(name, *(f"{kind[f'p{p}_ms']:.2f}" for p in (50, 90, 99)), busy)
    table.add_row("stored vector, two replicas", "", "", "", f"{result['rps_two_replicas']:,}")
    table.add_row(
        "a server that does nothing",
        f"{result['echo_p50_ms']:.2f}",
        "",
        f"{result['echo_p99_ms']:.2f}",
        f"{result['echo_rps']:,}",
    )
    console.print(table)


def main() -> int:
    command = Command("retrieve", __doc__, "a tenth of the calls")
    return command.run(lambda given, work: run(QUICK if given.quick else FULL, work), print_result)


if __name__ == "__main__":
    sys.exit(main())
