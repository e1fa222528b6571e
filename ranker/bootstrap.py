"""Wires the ranker service: bundle, feed, batcher, gRPC.

Invariant: ready means the bundle is loaded and warm and the item topics are caught up with, or Kafka is away and that
was said once.
"""

import asyncio
import contextlib

import torch

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import StageError
from core.grpc_runtime import GrpcServer
from core.kafka import wait_for_kafka
from core.process import Process, freeze_heap
from core.settings import Settings
from core.telemetry import get_logger
from headrace.v1.ranker_service_pb2_grpc import add_RankerServiceServicer_to_server
from ranker.batcher import Batcher
from ranker.release import UserJob, score_jobs
from ranker.releases import Releases, tell_first
from ranker.scorer import Scores
from ranker.service import RankerService
from ranker.shadow import Shadow

_log = get_logger("ranker")

SERVICE = "headrace.v1.RankerService"
# Kafka may be away for hours; the bundle is enough to answer from.
KAFKA_WAIT_SECONDS, CATCH_UP_SECONDS = 2.0, 10.0


async def serve(settings: Settings, process: Process) -> None:
    """Runs until the process is told to stop."""
    own = settings.ranker
    # Beside other busy processes a second thread makes the slowest calls many times slower.
    torch.set_num_threads(1)
    is_ready = False
    process.readiness.add("release", lambda: None if is_ready else "loading the bundle and the item topics")
    process.open_admin(own.host, own.admin_port)
    clock = SystemClock()
    releases = await asyncio.to_thread(Releases, settings, clock)
    batcher = make_batcher(settings)
    server = GrpcServer(own.host, own.port, [SERVICE])
    shadow = Shadow(lambda jobs: score_jobs(jobs, settings), own.shadow_queue_max)
    add_RankerServiceServicer_to_server(RankerService(releases, batcher, clock, shadow), server.grpc)
    watcher: asyncio.Task[None] | None = None
    try:
        server.start()
        batcher.start()
        releases.feed.start()
        await catch_up(releases, process, settings)
        freeze_heap()
        tell_first(releases.current)
        watcher = asyncio.create_task(releases.watch())
        is_ready = True
        server.set_serving(True)
        release = releases.current
        _log.info(
            "ready",
            bundle=release.version,
            model=release.model_version,
            device=str(release.scorer.device),
            port=server.port,
        )
        await process.stopping.wait()
    finally:
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        await server.stop()
        await batcher.close()
        await asyncio.to_thread(shadow.close)
        await asyncio.to_thread(releases.close)


def make_batcher(settings: Settings) -> Batcher[UserJob, Scores]:
    own = settings.ranker
    return Batcher(
        lambda jobs: score_jobs(jobs, settings),
        max_batch_size=own.max_batch_size,
        max_wait_ms=own.max_wait_ms,
        queue_max=own.queue_max,
        worker_threads=own.worker_threads,
    )


async def catch_up(releases: Releases, process: Process, settings: Settings) -> None:
    """Waits for the item topics, but not for ever, and hardly at all where no broker answers."""
    try:
        await asyncio.to_thread(wait_for_kafka, settings.kafka, KAFKA_WAIT_SECONDS)
    except StageError as error:
        _log.warning("kafka is away: serving the bundle's items, news follow when it is back", problem=str(error))
        return
    end = Deadline.after_ms(CATCH_UP_SECONDS * 1000)
    while not releases.feed.has_caught_up and not process.stopping.is_set():
        if end.expired():
            _log.warning("the item topics are slow: serving the bundle's items, news follow as they come")
            return
        await asyncio.to_thread(releases.feed.wait, 0.05)
