"""Wires the candidate service: bundle, feed, sources, executor, gRPC.

Invariant: ready means the bundle is loaded and warm and the item topics are caught up with, or Kafka is away and that
was said once.
"""

import asyncio
import contextlib

import torch

from candidate import metrics
from candidate.executor import Job, WorkExecutor
from candidate.feed import AWAY_SECONDS, Snapshots
from candidate.index.recall import RecallMonitor
from candidate.retriever import Retriever
from candidate.service import CandidateService
from candidate.shards import Shards
from candidate.snapshot import Snapshot
from candidate.sources import (
    AnnSource,
    CandidateSource,
    CoVisitationSource,
    ItemToItemSource,
    NewSource,
    TrendingSource,
)
from candidate.stored_users import StoredUsers
from core.clock import SystemClock
from core.deadline import Deadline
from core.grpc_runtime import GrpcServer
from core.process import Process, freeze_heap
from core.settings import Settings
from core.telemetry import get_logger
from features import windows
from features.transforms import stable_hash
from features.windows import UserEvent, UserState
from headrace.v1.candidate_service_pb2 import RetrieveCandidatesRequest
from headrace.v1.candidate_service_pb2_grpc import add_CandidateServiceServicer_to_server

_log = get_logger("candidate")

SERVICE = "headrace.v1.CandidateService"
_WARM_UP_ROUNDS, _WARM_UP_ITEMS, _WARM_UP_MS = 20, 20, 60_000


async def serve(settings: Settings, process: Process) -> None:
    """Runs until the process is told to stop."""
    own = settings.candidate
    torch.set_num_threads(1)
    is_ready = False
    process.readiness.add("snapshot", lambda: None if is_ready else "loading the bundle and the item topics")
    process.open_admin(own.host, own.admin_port)
    snapshots = await asyncio.to_thread(Snapshots, settings)
    executor, encoding = (WorkExecutor(n, own.queue_max) for n in (own.worker_threads, own.encode_threads))
    retriever = Retriever(settings, make_sources(), SystemClock())
    server = GrpcServer(own.host, own.port, [SERVICE])
    shards = Shards(own) if len(own.shard_targets) > 1 else None
    users = StoredUsers(settings)
    service = CandidateService(snapshots, retriever, executor, shards, encoding, users)
    add_CandidateServiceServicer_to_server(service, server.grpc)
    watcher: asyncio.Task[None] | None = None
    recall = RecallMonitor(
        lambda: snapshots.current.index, metrics.index_recall.set, interval_seconds=own.recall_interval_ms / 1000
    )
    try:
        server.start()
        snapshots.feeds.start()
        await asyncio.to_thread(warm_up, retriever, snapshots.current, settings)
        if not await asyncio.to_thread(snapshots.feeds.catch_up, AWAY_SECONDS, process.stopping.is_set):
            _log.warning("kafka is away: serving the bundle's items, news follow when it is back")
        freeze_heap()
        recall.start()
        watcher = asyncio.create_task(snapshots.watch())
        is_ready = True
        server.set_serving(True)
        _log.info("ready", bundle=snapshots.current.manifest.bundle_version, port=server.port)
        await process.stopping.wait()
    finally:
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        await server.stop()
        if shards is not None:
            await shards.close()
        await asyncio.to_thread(recall.stop)
        executor.close()
        encoding.close()
        users.close()
        await asyncio.to_thread(snapshots.close)


def make_sources() -> list[CandidateSource]:
    """The sources, in the order in which they are asked."""
    return [AnnSource(), ItemToItemSource(), CoVisitationSource(), TrendingSource(), NewSource()]


def warm_up(retriever: Retriever, snapshot: Snapshot, settings: Settings) -> None:
    """Answers some requests of a made-up user: libraries load, memory is there, caches are warm."""
    state = UserState()
    items = [item.item_id for item in snapshot.catalog.items[:_WARM_UP_ITEMS]]
    for index, item_id in enumerate(items):
        event = UserEvent("warm-up", stable_hash(f"warm-up {index}"), item_id, "click", 1_700_000_000_000 + index)
        windows.apply(state, [event], settings.features)
    request = RetrieveCandidatesRequest(user_id="warm-up", state=windows.encode(state), num_candidates=500)
    for _ in range(_WARM_UP_ROUNDS):
        retriever.retrieve(request, snapshot, Job(Deadline.after_ms(_WARM_UP_MS)))
