"""The gRPC adapter of CandidateService: checks, the executor, metrics. The work is in candidate/retriever.py.

Invariant: nothing blocks the event loop; a call whose deadline is over, or that was cancelled, costs no more work.
"""

import time
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from candidate import metrics
from candidate.executor import WorkExecutor
from candidate.feed import Snapshots
from candidate.requests import check_encode, check_retrieve
from candidate.retriever import Retriever
from candidate.shards import Shards, is_from_shard
from candidate.stored_users import StoredUsers
from core.codec import from_ms
from core.errors import RecommenderError
from core.grpc_runtime import request_deadline
from headrace.v1 import candidate_service_pb2 as pb
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceServicer

# For callers that set no deadline.
_RETRIEVE_MS, _ENCODE_MS = 1_000, 10_000

Context = grpc.ServicerContext
T = TypeVar("T")


class CandidateService(CandidateServiceServicer):
    """Candidates, vectors, facts."""

    def __init__(
        self,
        snapshots: Snapshots,
        retriever: Retriever,
        executor: WorkExecutor,
        shards: Shards | None = None,
        encoding: WorkExecutor | None = None,
        users: StoredUsers | None = None,
    ) -> None:
        """`encoding` runs EncodeUsers, whose batches nobody who waits for candidates should stand behind."""
        self._snapshots = snapshots
        self._retriever = retriever
        self._executor, self._encoding = executor, encoding or executor
        self._users = users
        # Those that have the rest of the index, where it is spread.
        self._shards = shards

    async def RetrieveCandidates(
        self, request: pb.RetrieveCandidatesRequest, context: Context
    ) -> pb.RetrieveCandidatesResponse:
        with _measured("RetrieveCandidates"):
            check_retrieve(request)
            snapshot = self._snapshots.current
            deadline = request_deadline(context, _RETRIEVE_MS)
            if request.look_up and self._users is not None:
                request = await self._users.fill(request, deadline)

            async def alone(part: pb.RetrieveCandidatesRequest) -> pb.RetrieveCandidatesResponse:
                return await self._executor.run(deadline, lambda job: self._retriever.retrieve(part, snapshot, job))

            if self._shards is None or is_from_shard(context):
                return await alone(request)
            return await self._shards.retrieve(request, deadline, alone)

    async def EncodeUsers(self, request: pb.EncodeUsersRequest, context: Context) -> pb.EncodeUsersResponse:
        with _measured("EncodeUsers"):
            check_encode(request)
            snapshot = self._snapshots.current
            deadline = request_deadline(context, _ENCODE_MS)
            return await self._encoding.run(deadline, lambda job: self._retriever.encode(request, snapshot, job))

    async def GetIndexInfo(
        self,
        request: pb.GetIndexInfoRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> pb.GetIndexInfoResponse:
        snapshot = self._snapshots.current
        index = snapshot.index
        return pb.GetIndexInfoResponse(
            bundle_version=snapshot.manifest.bundle_version,
            index_version=snapshot.manifest.index_version,
            embedding_version=snapshot.embedding_version,
            main_item_count=index.main_count,
            delta_item_count=index.delta_count,
            tombstone_count=index.tombstone_count,
            dimension=snapshot.dimension,
            index_kind=index.info.kind,
            build_time=from_ms(index.info.build_time_ms),
        )


@contextmanager
def _measured(method: str) -> Any:
    started = time.perf_counter()
    try:
        yield
    except RecommenderError as error:
        metrics.refused.labels(method, type(error).__name__).inc()
        raise
    finally:
        metrics.request_ms.labels(method).observe((time.perf_counter() - started) * 1000)
