"""The load of benchmarks.liveness: queries at a fixed rate, changes at a fixed rate, and who looks for them.

Invariant: every clock starts when something is due or before it is sent, and stops when an answer shows it.
"""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
import numpy.typing as npt

from benchmarks.retrieve_world import item_id
from benchmarks.stream_cluster import Cluster
from candidate.encoder import encode_items
from candidate.towers import Towers
from core.bundle import ReleaseBundle
from core.grpc_runtime import blocking_channel, channel
from core.kafka import KafkaProducer
from core.topics import Topics
from headrace.v1.candidate_service_pb2 import GetIndexInfoRequest, GetIndexInfoResponse, RetrieveCandidatesRequest
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub
from headrace.v1.events_pb2 import Item

Floats = npt.NDArray[np.float32]

K, _PROBE_K = 500, 20
CHANGES_PER_SECOND, QUERIES_PER_SECOND = 200, 60
# One change in so many is looked for, and how often: questions, too, which must stay few beside the users'.
PROBE_EVERY = 40
_POLL_SECONDS, _WATCH_SECONDS = 0.05, 0.02
_PATIENCE_SECONDS = 20.0


@dataclass
class Answers:
    """Queries at a fixed rate: when each was due (monotonic), and milliseconds from then to its answer."""

    due: list[float] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)
    failed: int = 0

    def p99(self, windows: Sequence[tuple[float, float]] | None = None) -> float | None:
        """Of all, or of those that were under way in one of some spans of time; None where there were none."""
        took = [
            ms
            for due, ms in zip(self.due, self.took_ms, strict=True)
            if windows is None or any(due < end and due + ms / 1000 > begin for begin, end in windows)
        ]
        return round(float(np.percentile(took, 99)), 2) if took else None


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
    """Upserts and deletes in turn, for so long; some of them are looked for, each on a connection beside.

    What is sent is made before it starts: the queries' clocks run in this process, too.
    """

    def __init__(self, service: Service, towers: Towers, vectors: Floats, seconds: float, seed: int = 3) -> None:
        self._service, self._vectors = service, vectors
        self._items = [_new_item(number) for number in range(int(seconds * CHANGES_PER_SECOND) // 2)]
        looked_for = self._items[:: PROBE_EVERY // 2]
        made = encode_items(towers, looked_for)
        self._vector_of = dict(zip([item.item_id for item in looked_for], made, strict=True))
        self._producer = KafkaProducer(service.settings.kafka)
        self._topic = Topics(service.settings.kafka.topic_prefix).items
        # Old items go first, then those that came.
        self._order = np.random.default_rng(seed).permutation(len(vectors))
        self.upserts = self.deletes = self.never_seen = 0
        self.seen = Seen()
        self._pending: dict[tuple[str, bool], tuple[float, RetrieveCandidatesRequest]] = {}
        self._stopping = threading.Event()
        self._prober = threading.Thread(target=self._probe, name="prober", daemon=True)

    def run(self) -> None:
        """Sends all, then waits for what is looked for."""
        self._prober.start()
        begin = time.monotonic()
        for number in range(2 * len(self._items)):
            wait = begin + number / CHANGES_PER_SECOND - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            if number % 2:
                self._delete(number // 2)
            else:
                self._upsert(self._items[number // 2])
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

    def _upsert(self, item: Item) -> None:
        vector = self._vector_of.get(item.item_id)
        if vector is not None:
            self._expect(item.item_id, vector, is_upsert=True)
        self._producer.post(self._topic, item.item_id.encode(), item.SerializeToString())
        self.upserts += 1

    def _delete(self, number: int) -> None:
        row = int(self._order[number])
        if number % (PROBE_EVERY // 2) == 0:
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
    for number in range(int(seconds * QUERIES_PER_SECOND)):
        due = begin + number / QUERIES_PER_SECOND
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    await connection.close(None)
    return answers


def _new_item(number: int) -> Item:
    """An item of categories that no other has together: two of one vector could not be told apart."""
    topics = np.random.default_rng(number).choice(1000, 6, replace=False).tolist()
    return Item(item_id=f"new-{number}", title=f"new {number}", categories=[f"topic-{topic}" for topic in topics])
