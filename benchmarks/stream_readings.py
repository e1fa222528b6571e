"""What the stream has come to: reads Kafka, Redis and Parquet, and counts the differences from a single pass.

Adapters around stream_truth. Invariant: everything is read from where others would read it; nothing asks a worker.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from benchmarks import stream_truth
from benchmarks.stream_cluster import PARTITIONS, Cluster
from benchmarks.stream_truth import Logged, Place, SinglePass
from core.grpc_runtime import blocking_channel
from core.kafka import client_config, headers_of
from core.topics import dead_letter
from features import item_stats, windows
from features.definitions import ITEM_STATS, USER_EMBEDDING, USER_STATE
from features.item_stats import ItemPartial
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, LogTable
from features.stores.online import OnlineStore
from features.windows import UserState
from headrace.v1.candidate_service_pb2 import EncodeUsersRequest, UserToEncode
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub
from headrace.v1.events_pb2 import DeadLetter, ItemStats

T = TypeVar("T")

_BATCH = 500
# A fetch that waits at the end of one partition would hold up the next.
_FETCH_WAIT_MS = 10
_ENCODE_BATCH = 64
_ENCODE_SECONDS = 30
# The same state in another batch gives the same vector but for the order of its sums.
_SAME_VECTOR = 1e-3
_SETTLE_POLL_SECONDS = 0.2


@dataclass
class Differences:
    """What is wrong, counted; all of it should be 0."""

    user_state_mismatches: int = 0
    item_stat_mismatches: int = 0
    stale_vectors: int = 0
    dead_letter_mismatches: int = 0
    log_missing: int = 0
    log_doubled: int = 0
    log_foreign: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def read_topic(cluster: Cluster, topic: str) -> Iterator[Logged]:
    """All that lies in a topic now, partition by partition, each in order."""
    config = {"group.id": "benchmarks", "enable.auto.commit": False, "fetch.wait.max.ms": _FETCH_WAIT_MS}
    consumer = Consumer({**client_config(cluster.quiet_kafka), **config})
    try:
        for partition in range(cluster.partitions):
            where = TopicPartition(topic, partition, OFFSET_BEGINNING)
            _, end = consumer.get_watermark_offsets(where, timeout=10)
            consumer.assign([where])
            at = 0
            while at < end:
                # Not more than there are: it would wait for them.
                for message in consumer.consume(min(5000, end - at), 1.0):
                    if message.error() is not None:
                        continue
                    at = (message.offset() or 0) + 1
                    place = Place(topic, partition, at - 1)
                    yield Logged(place, message.key(), message.value(), _headers(headers_of(message)))
    finally:
        consumer.close()


def ends(cluster: Cluster) -> dict[tuple[int, int], int]:
    """Newest offset of each user-keyed topic-partition that has one, as markers name them."""
    consumer = Consumer({**client_config(cluster.quiet_kafka), "group.id": "benchmarks"})
    found = {}
    try:
        for topic in cluster.topics.user_keyed:
            for partition in range(cluster.partitions):
                _, end = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
                if end:
                    found[cluster.sources[topic], partition] = end - 1
    finally:
        consumer.close()
    return found


def wait_for_markers(
    cluster: Cluster, store: OnlineStore, timeout_seconds: float, poll_seconds: float = _SETTLE_POLL_SECONDS
) -> bool:
    """True when all markers have reached the ends of the topics."""
    wanted, limit = ends(cluster), time.monotonic() + timeout_seconds
    while time.monotonic() < limit:
        markers = store.read_markers(range(cluster.partitions))
        if all(markers[where[1]].get(where, -1) >= end for where, end in wanted.items()):
            return True
        time.sleep(poll_seconds)
    return False


def stored_states(store: OnlineStore) -> dict[str, UserState]:
    users = list(store.keys_of(USER_STATE))
    states = {}
    for batch in _batches(users, _BATCH):
        rows = store.read(USER_STATE, [(user_id,) for user_id in batch], ("state",))
        for user_id, row in zip(batch, rows, strict=True):
            blob = row.cells.get("state", b"")
            states[user_id] = windows.decode(blob if isinstance(blob, bytes) else b"")
    return states


def user_mismatches(store: OnlineStore, truth: SinglePass) -> dict[str, list[str]]:
    """Users whose state differs, and in which fields."""
    stored, wrong = stored_states(store), {}
    for user_id in stored.keys() | truth.states.keys():
        differences = stream_truth.state_differences(
            stored.get(user_id, UserState()), truth.states.get(user_id, UserState())
        )
        if differences:
            wrong[user_id] = differences
    return wrong


def item_mismatches(store: OnlineStore, truth: SinglePass) -> dict[str, list[str]]:
    """Items of which any partition's sums differ, and in which fields."""
    wrong: dict[str, list[str]] = {}
    items = sorted({item_id for item_id, _ in truth.partials})
    keys = [(item_id, partition) for item_id in items for partition in range(PARTITIONS)]
    for batch in _batches(keys, _BATCH):
        rows = store.read(ITEM_STATS, [(item_id, str(partition)) for item_id, partition in batch], ("stats",))
        for key, row in zip(batch, rows, strict=True):
            blob = row.cells.get("stats")
            stored = item_stats.decode(ItemStats.FromString(blob)) if isinstance(blob, bytes) else ItemPartial()
            if differences := stream_truth.partial_differences(stored, truth.partials.get(key, ItemPartial())):
                wrong.setdefault(key[0], []).append(f"{key[1]}: {', '.join(differences)}")
    return wrong


def stale_vectors(cluster: Cluster, store: OnlineStore, truth: SinglePass, *, encode: bool) -> set[str]:
    """Users whose vector is missing, of another revision or (with `encode`) not what the service makes of the state."""
    users = sorted(user_id for user_id, state in truth.states.items() if state.revision)
    stale: set[str] = set()
    channel = blocking_channel(cluster.settings.serving.candidate_target)
    try:
        stub = CandidateServiceStub(channel)
        for batch in _batches(users, _ENCODE_BATCH):
            rows = store.read(USER_EMBEDDING, [(user_id,) for user_id in batch], ("vector", "embedding_revision"))
            for user_id, row in zip(batch, rows, strict=True):
                if row.cells.get("embedding_revision") != truth.states[user_id].revision:
                    stale.add(user_id)
            if not encode:
                continue
            asked = [UserToEncode(user_id=user, state=windows.encode(truth.states[user])) for user in batch]
            answer = stub.EncodeUsers(EncodeUsersRequest(users=asked), timeout=_ENCODE_SECONDS)
            for encoded, row in zip(answer.users, rows, strict=True):
                ours = np.asarray(row.cells.get("vector", ()), np.float32)
                theirs = np.asarray(encoded.embedding, np.float32)
                if ours.shape != theirs.shape or np.abs(ours - theirs).max(initial=0.0) > _SAME_VECTOR:
                    stale.add(encoded.user_id)
    finally:
        channel.close()
    return stale


def logged_places(cluster: Cluster, tables: Sequence[LogTable] = (EVENTS, FEEDBACK, IMPRESSIONS)) -> Iterator[Place]:
    """Source position of every row of the event log, doubles included."""
    log = EventLog(cluster.settings.streams.event_log_path)
    for table in tables:
        for path in log.files(table):
            rows = pq.read_table(path, columns=["topic", "partition", "offset"], partitioning=None).to_pydict()
            yield from map(Place, rows["topic"], rows["partition"], rows["offset"])


def dead_letters(cluster: Cluster) -> dict[Place, tuple[bytes, bytes]]:
    """Key and value by source position; a letter that was sent twice counts once."""
    letters = {}
    for topic in cluster.topics.user_keyed:
        for logged in read_topic(cluster, dead_letter(topic)):
            letter = DeadLetter.FromString(logged.value or b"")
            letters[Place(letter.topic, letter.partition, letter.offset)] = (letter.key, letter.value)
    return letters


def _headers(headers: Any) -> list[tuple[str, bytes | None]]:
    return list(headers or ())


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
