"""Clients of the other processes: candidate and ranker over gRPC, each behind its breaker.

The only place where their failures become ours. Invariant: every call carries what is left of its stage's budget, is
cancelled with its request, and tells the breaker how it went.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from core.errors import StageError, StageTimeoutError
from core.grpc_runtime import channel
from headrace.v1.candidate_service_pb2 import RetrieveCandidatesRequest, RetrieveCandidatesResponse
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub
from headrace.v1.ranker_service_pb2 import RankCandidatesRequest, RankCandidatesResponse, UserCandidates
from headrace.v1.ranker_service_pb2_grpc import RankerServiceStub
from serving.breaker import CircuitBreaker
from serving.budget import Budget


class RefusedError(StageError):
    """The dependency is well, and says that it cannot work on this very request."""


class NotLoadedError(RefusedError):
    """The dependency does not hold the version that was asked for."""


_KINDS: dict[grpc.StatusCode, type[StageError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: StageTimeoutError,
    grpc.StatusCode.INVALID_ARGUMENT: RefusedError,
    grpc.StatusCode.NOT_FOUND: NotLoadedError,
}


@contextmanager
def guarded(breaker: CircuitBreaker, *, is_fair: bool) -> Iterator[None]:
    """Runs a call through the breaker.

    Args:
        breaker: of the dependency.
        is_fair: False where the caller left so little time that being late says nothing about the dependency.

    Raises:
        BreakerOpenError: the dependency is left alone for now.
    """
    breaker.enter()
    try:
        yield
    except RefusedError:
        # One caller's odd request must not shut the dependency off for the others.
        breaker.succeeded()
        raise
    except StageTimeoutError as error:
        if is_fair:
            breaker.failed(str(error))
        else:
            breaker.abandoned()
        raise
    except StageError as error:
        breaker.failed(str(error))
        raise
    except BaseException:
        breaker.abandoned()
        raise
    else:
        breaker.succeeded()


class GrpcClient:
    """One dependency over one channel."""

    def __init__(self, name: str, target: str, breaker: CircuitBreaker) -> None:
        self._name = name
        self._target = target
        self._breaker = breaker
        self._channel = channel(target)

    async def close(self) -> None:
        await self._channel.close(None)

    def connect(self) -> None:
        """Starts connecting, so that the first request does not pay for it."""
        self._channel.get_state(try_to_connect=True)

    async def _call(self, method: Callable[..., Any], request: Any, stage: str, budget: Budget) -> Any:
        deadline = budget.stage(stage)
        if deadline.expired():
            raise StageTimeoutError(self._name, "no time was left to ask")
        with guarded(self._breaker, is_fair=budget.is_fair):
            try:
                return await method(request, timeout=deadline.remaining_seconds())
            except grpc.aio.AioRpcError as error:
                where = f"{self._target} answered {error.code().name}: {error.details()}"
                raise _KINDS.get(error.code(), StageError)(self._name, where) from error


class CandidateClient(GrpcClient):
    """Retrieval."""

    def __init__(self, target: str, breaker: CircuitBreaker) -> None:
        super().__init__("candidate", target, breaker)
        self._stub = CandidateServiceStub(self._channel)

    async def retrieve(self, request: RetrieveCandidatesRequest, budget: Budget) -> RetrieveCandidatesResponse:
        response: RetrieveCandidatesResponse = await self._call(
            self._stub.RetrieveCandidates, request, "retrieve", budget
        )
        return response


class RankerClient(GrpcClient):
    """Scoring."""

    def __init__(self, target: str, breaker: CircuitBreaker) -> None:
        super().__init__("ranker", target, breaker)
        self._stub = RankerServiceStub(self._channel)

    async def score(self, user: UserCandidates, bundle_version: str, budget: Budget) -> RankCandidatesResponse:
        """Scores one user's candidates with a bundle of this version, "" = with the ranker's current one.

        Raises:
            NotLoadedError: the ranker does not hold that version.
            StageError: the answer does not fit the question, or there is none.
        """
        request = RankCandidatesRequest(users=[user], bundle_version=bundle_version)
        response: RankCandidatesResponse = await self._call(self._stub.RankCandidates, request, "rank", budget)
        count = len(user.item_ids)
        if len(response.users) != 1 or len(response.users[0].scores) != count:
            raise StageError("ranker", f"{self._target} did not score every candidate")
        if len(response.users[0].cut) not in (0, count):
            raise StageError("ranker", f"{self._target} does not say of every candidate whether it was cut")
        return response
