"""Items that come and go while users ask: `python -m benchmarks.liveness [--items N] [--quick] [--json]`.

The candidate service as it runs (`python -m candidate`), fed by the items topic on Kafka (KAFKA_HOME; the embedded
broker where there is none), asked over gRPC. First queries alone (idle), then for a minute 200 upserts and deletes a
second beside the same queries. The index merges what has changed whenever 500 items have (`index_delta_max_items`;
2,000 by default), so many rebuilds and swaps fall into that minute. Figures: benchmarks/liveness.md. Invariant: a
change's clock starts before it is handed to the producer and stops when an answer shows it, polling included; a
change is looked for by the item's own vector, among all items, through the index alone.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.retrieve_world import item_id, publish_world
from benchmarks.stream_cluster import Cluster, running_cluster
from candidate.encoder import encode_items
from candidate.snapshot import read_item_vectors
from candidate.towers import Towers, load_towers
from core.bundle import ReleaseBundle
from core.errors import RecommenderError
from core.grpc_runtime import blocking_channel, channel
from core.kafka import KafkaProducer
from core.settings import load_settings
from core.topics import Topics
from devstack.kafka_local import kafka_home
from devstack.stack import EMBEDDED, LOCAL
from headrace.v1.candidate_service_pb2 import GetIndexInfoRequest, GetIndexInfoResponse, RetrieveCandidatesRequest
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub
from headrace.v1.events_pb2 import Item

Floats = npt.NDArray[np.float32]

K, _PROBE_K = 500, 20
_CHANGES_PER_SECOND, _QUERIES_PER_SECOND = 200, 60
# One change in so many is looked for.
_PROBE_EVERY = 20
_DELTA_MAX_ITEMS = 500
_USERS = 400
_POLL_SECONDS, _WATCH_SECONDS = 0.004, 0.02
_PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Plan:
    """How large, how long."""

    items: int
    idle_seconds: float
    load_seconds: float


FULL, QUICK = Plan(100_000, 20, 60), Plan(40_000, 5, 10)


@dataclass
class Answers:
    """Queries at a fixed rate: when each was due (monotonic), and milliseconds from then to its answer."""

    due: list[float] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)
    failed: int = 0

    def p99(self, windows: Sequence[tuple[float, float]] | None = None) -> float:
        """Of all, or of those that were under way in one of some spans of time."""
        took = [
            ms
            for due, ms in zip(self.due, self.took_ms, strict=True)
            if windows is None or any(due < end and due + ms / 1000 > begin for begin, end in windows)
        ]
        return round(float(np.percentile(took, 99)), 2) if took else float("nan")


@dataclass
class Seen:
    """What became of the changes that were looked for."""

    upsert_ms: list[float] = field(default_factory=list)
    delete_ms: list[float] = field(default_factory=list)
    failed: int = 0


class Service:
    """The running service, for its clients."""

    def __init__(self, cluster: Cluster, bundle: ReleaseBundle) -> None:
        self.settings = cluster.settings
        self.target = f"{self.settings.candidate.host}:{self.settings.candidate.port}"
        self.version = bundle.manifest.embedding_version
        self._cluster = cluster

    def request(self, vector: Floats, count: int) -> RetrieveCandidatesRequest:
        """The nearest items to a vector, through the index alone."""
        return RetrieveCandidatesRequest(
            user_id="liveness",
            embedding=vector.tolist(),
            embedding_version=self.version,
            num_candidates=count,
            source_quotas={"ann": count},
            columns=True,
        )

    def metric(self, name: str) -> float:
        """One of its own metrics as it is now."""
        return self._cluster.metrics("candidate").get(f"headrace_candidate_{name}", 0.0)

    def rebuilds(self) -> tuple[float, float]:
        """How many there were, and the milliseconds that they took."""
        return self.metric("index_rebuild_ms_count"), self.metric("index_rebuild_ms_sum")


class Changes:
    """Upserts and deletes in turn, at a fixed rate; some of them are looked for, each on a connection beside."""

    def __init__(self, service: Service, towers: Towers, vectors: Floats, seed: int = 3) -> None:
        self._service, self._towers, self._vectors = service, towers, vectors
        self._producer = KafkaProducer(service.settings.kafka)
        self._topic = Topics(service.settings.kafka.topic_prefix).items
        # Old items go first, then those that came.
        self._order = np.random.default_rng(seed).permutation(len(vectors))
        self.upserts = self.deletes = self.never_seen = 0
        self.seen = Seen()
        self._pending: dict[tuple[str, bool], tuple[float, RetrieveCandidatesRequest]] = {}
        self._stopping = threading.Event()
        self._prober = threading.Thread(target=self._probe, name="prober", daemon=True)

    def run(self, seconds: float) -> None:
        """Sends for so long, then waits for what is looked for."""
        self._prober.start()
        count = int(seconds * _CHANGES_PER_SECOND)
        items = [_new_item(number) for number in range(count // 2)]
        looked_for = items[:: _PROBE_EVERY // 2]
        vector_of = dict(
            zip([item.item_id for item in looked_for], encode_items(self._towers, looked_for), strict=True)
        )
        begin = time.monotonic()
        for number in range(count):
            wait = begin + number / _CHANGES_PER_SECOND - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            if number % 2:
                self._delete(number // 2)
            else:
                self._upsert(items[number // 2], vector_of.get(items[number // 2].item_id))
        end = time.monotonic() + _PATIENCE_SECONDS
        while self._pending and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        self._stopping.set()
        self._prober.join()
        self._producer.close()
        # What never showed counts as the whole patience.
        self.never_seen = len(self._pending)
        for _, is_upsert in self._pending:
            (self.seen.upsert_ms if is_upsert else self.seen.delete_ms).append(_PATIENCE_SECONDS * 1000)

    def _upsert(self, item: Item, vector: Floats | None) -> None:
        if vector is not None:
            self._expect(item.item_id, vector, is_upsert=True)
        self._producer.post(self._topic, item.item_id.encode(), item.SerializeToString())
        self.upserts += 1

    def _delete(self, number: int) -> None:
        row = int(self._order[number])
        if number % (_PROBE_EVERY // 2) == 0:
            self._expect(item_id(row), self._vectors[row], is_upsert=False)
        self._producer.post(self._topic, item_id(row).encode(), None)
        self.deletes += 1

    def _expect(self, name: str, vector: Floats, *, is_upsert: bool) -> None:
        self._pending[(name, is_upsert)] = (time.monotonic(), self._service.request(vector, _PROBE_K))

    def _probe(self) -> None:
        connection = blocking_channel(self._service.target)
        stub = CandidateServiceStub(connection)
        while not self._stopping.is_set():
            for (name, is_upsert), (sent, request) in list(self._pending.items()):
                try:
                    answer = stub.RetrieveCandidates(request, timeout=5)
                except grpc.RpcError:
                    self.seen.failed += 1
                    continue
                if (name in answer.item_ids) == is_upsert:
                    took_ms = (time.monotonic() - sent) * 1000
                    (self.seen.upsert_ms if is_upsert else self.seen.delete_ms).append(took_ms)
                    del self._pending[(name, is_upsert)]
            time.sleep(_POLL_SECONDS)
        connection.close()


class Watch:
    """When the index was swapped, by GetIndexInfo; a rebuild ran before each swap for as long as the service says."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._before = service.rebuilds()
        self.swaps: list[float] = []
        self.last: GetIndexInfoResponse = GetIndexInfoResponse()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[list[tuple[float, float]], float]:
        """The spans of time of rebuilds and swaps, and the mean time of a rebuild in ms."""
        self._stopping.set()
        self._thread.join()
        count, total_ms = (now - before for now, before in zip(self._service.rebuilds(), self._before, strict=True))
        mean_ms = total_ms / max(1.0, count)
        # Twice the mean: some take longer.
        return [(swap - 2 * mean_ms / 1000 - _WATCH_SECONDS, swap + _WATCH_SECONDS) for swap in self.swaps], mean_ms

    def _run(self) -> None:
        connection = blocking_channel(self._service.target)
        stub, built = CandidateServiceStub(connection), None
        while not self._stopping.wait(_WATCH_SECONDS):
            self.last = stub.GetIndexInfo(GetIndexInfoRequest(), timeout=5)
            if built is not None and self.last.build_time != built:
                self.swaps.append(time.monotonic())
            built = self.last.build_time
        connection.close()


async def ask(service: Service, users: Floats, seconds: float) -> Answers:
    """Queries at a fixed rate, whatever becomes of those before: who waits for a slow answer counts, too."""
    answers, connection = Answers(), channel(service.target)
    stub = CandidateServiceStub(connection)
    requests = [service.request(user, K) for user in users]

    async def one(number: int, due: float) -> None:
        try:
            answer = await stub.RetrieveCandidates(requests[number % len(requests)], timeout=5)
            complete = len(answer.item_ids) == K and not answer.missing_sources
        except grpc.RpcError:
            complete = False
        answers.due.append(due)
        answers.took_ms.append((time.monotonic() - due) * 1000)
        answers.failed += not complete

    begin, running = time.monotonic(), set()
    for number in range(int(seconds * _QUERIES_PER_SECOND)):
        due = begin + number / _QUERIES_PER_SECOND
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    await connection.close(None)
    return answers


def run(plan: Plan, home: Path) -> dict[str, Any]:
    say(f"a bundle of {plan.items:,} items")
    settings = load_settings()
    bundle = publish_world(home / "bundles", plan.items, settings)
    towers, vectors = load_towers(bundle.path), read_item_vectors(bundle)
    kafka = LOCAL if kafka_home() is not None else EMBEDDED
    own = {"candidate": {"HEADRACE_CANDIDATE__INDEX_DELTA_MAX_ITEMS": str(_DELTA_MAX_ITEMS)}}
    with running_cluster(home, ("candidate",), kafka, own) as cluster:
        cluster.wait_ready("candidate")
        return measure(plan, Service(cluster, bundle), towers, vectors) | {"kafka": kafka}


def measure(plan: Plan, service: Service, towers: Towers, vectors: Floats) -> dict[str, Any]:
    users = _users(vectors)
    asyncio.run(ask(service, users, 2))
    say(f"{_QUERIES_PER_SECOND} queries/s alone for {plan.idle_seconds:.0f} s")
    idle = asyncio.run(ask(service, users, plan.idle_seconds))
    say(f"beside {_CHANGES_PER_SECOND} upserts and deletes a second for {plan.load_seconds:.0f} s")
    watch, changes = Watch(service), Changes(service, towers, vectors)
    thread = threading.Thread(target=changes.run, args=(plan.load_seconds,), name="changes")
    thread.start()
    loaded = asyncio.run(ask(service, users, plan.load_seconds))
    thread.join()
    windows, rebuild_ms = watch.stop()
    seen = changes.seen
    return {
        "items": plan.items,
        "index_kind": watch.last.index_kind,
        "upserts": changes.upserts,
        "deletes": changes.deletes,
        "queries": len(idle.due) + len(loaded.due),
        "failed": idle.failed + loaded.failed + seen.failed,
        "upsert_visible_p50_ms": _quantile(seen.upsert_ms, 50),
        "upsert_visible_p99_ms": _quantile(seen.upsert_ms, 99),
        "delete_gone_p50_ms": _quantile(seen.delete_ms, 50),
        "delete_gone_p99_ms": _quantile(seen.delete_ms, 99),
        "probes": len(seen.upsert_ms) + len(seen.delete_ms),
        "never_seen": changes.never_seen,
        "p99_idle_ms": idle.p99(),
        "p99_load_ms": loaded.p99(),
        "p99_rebuild_ms": loaded.p99(windows),
        "swaps": len(watch.swaps),
        "rebuild_mean_ms": round(rebuild_ms, 1),
        "recall_measured": round(service.metric("index_recall"), 4),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _users(vectors: Floats) -> Floats:
    """Each between two items."""
    pairs = np.random.default_rng(4).choice(len(vectors), (_USERS, 2))
    between = vectors[pairs].sum(axis=1)
    return np.asarray(between / np.linalg.norm(between, axis=1, keepdims=True), np.float32)


def _new_item(number: int) -> Item:
    """An item of categories that no other has together: two of one vector could not be told apart."""
    topics = np.random.default_rng(number).choice(1000, 6, replace=False).tolist()
    return Item(item_id=f"new-{number}", title=f"new {number}", categories=[f"topic-{topic}" for topic in topics])


def _quantile(values: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 1) if values else float("nan")


def say(text: str) -> None:
    print(f"{'liveness':>10}  {text}", file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(title="Items that come and go while users ask", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.liveness", description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, help=f"items of the bundle; else {FULL.items:,}")
    parser.add_argument("--work", type=Path, help="folder for data and logs, kept; else a scratch folder")
    parser.add_argument("--quick", action="store_true", help="fewer items, ten seconds of load")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    plan = Plan(arguments.items or plan.items, plan.idle_seconds, plan.load_seconds)
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-liveness-") as scratch:
            result = run(plan, arguments.work or Path(scratch))
    except RecommenderError as error:
        print(f"benchmarks.liveness: {error}", file=sys.stderr)
        return 1
    print_result(result, Console(stderr=arguments.json))
    if arguments.json:
        print(json.dumps(result | {"quick": arguments.quick}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
