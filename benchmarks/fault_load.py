"""Steady requests at the front door, and a judgement of every answer.

The client's side of the fault matrix. Invariant: requests are sent on time whatever became of those before; every one
of them is counted, and what is wrong with its answer is said in words.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import grpc

from benchmarks.fault_table import Case
from core.grpc_runtime import channel
from devstack.backend import reason_names, tier_name
from headrace.v1.recommender_service_pb2 import RecommendRequest, RecommendResponse
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub

# In milliseconds; None: the caller sets none, and the front door's own default of 250 ms holds.
DEADLINES_MS: tuple[float | None, ...] = (100.0, 250.0, None)
_DEFAULT_DEADLINE_MS = 250.0
# For the client's own way back from the network to here.
_GRACE_MS = 10.0
_NUM_ITEMS, _EXCLUDED = 20, 5
# Answers of a good day in a row that make a recovery.
_GOOD_IN_A_ROW = 5


@dataclass(frozen=True)
class World:
    """What the answers are judged by."""

    # Users that are known: with a history and batch scores.
    users: Sequence[str]
    # user_id -> items that may not come back to this user.
    seen: Mapping[str, frozenset[str]]
    unavailable: frozenset[str]


@dataclass
class Verdict:
    """The counts of one case."""

    answers: int = 0
    failed: int = 0
    empty: int = 0
    late: int = 0
    wrong: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    # What was wrong, in words -> how often.
    problems: Counter[str] = field(default_factory=Counter)
    elapsed_ms: list[float] = field(default_factory=list)

    def blame(self, problem: str) -> None:
        self.wrong += 1
        self.problems[problem] += 1


class Load:
    """Asks at a steady rate until told to stop; one case at a time."""

    def __init__(self, address: str, world: World, case: Case, per_second: float) -> None:
        self.verdict = Verdict()
        self._world, self._case = world, case
        self._interval = 1 / per_second
        self._channel = channel(address)
        self._stub = RecommenderServiceStub(self._channel)
        self._excluded: dict[str, tuple[str, ...]] = {}
        self._on_since, self._on_until = float("inf"), 0.0
        self._good = 0
        self._good_since = float("inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None

    # --- what the case tells it ---

    def fault_is_on(self) -> None:
        """From now on the dependency is certainly away."""
        self._on_since, self._on_until = time.monotonic(), float("inf")

    def fault_is_over(self) -> None:
        self._on_until = time.monotonic()

    async def ranked_again(self, since: float, patience_seconds: float) -> float | None:
        """Seconds from `since` to the first of several answers of a good day in a row; None = not in time."""
        while self._good < _GOOD_IN_A_ROW:
            if time.monotonic() - since > patience_seconds:
                return None
            await asyncio.sleep(0.01)
        return max(0.0, self._good_since - since)

    async def fresh_again(self, user_id: str, revision: int, since: float, patience_seconds: float) -> float | None:
        """Seconds from `since` to the first answer with a newer state of this user; None = not in time."""
        while time.monotonic() - since < patience_seconds:
            answer = await self.ask(user_id)
            if answer is not None and answer.state_revision > revision:
                return time.monotonic() - since
            await asyncio.sleep(0.02)
        return None

    async def ask(self, user_id: str) -> RecommendResponse | None:
        """One request beside the load, not judged."""
        with suppress(grpc.aio.AioRpcError):
            request = RecommendRequest(user_id=user_id, dry_run=True)
            answer: RecommendResponse = await self._stub.Recommend(request, timeout=1.0, wait_for_ready=True)
            return answer
        return None

    # --- the load ---

    async def start(self) -> None:
        await asyncio.wait_for(self._channel.channel_ready(), 10)
        self._sender = asyncio.create_task(self._send())

    async def stop(self) -> Verdict:
        if self._sender is not None:
            self._sender.cancel()
            with suppress(asyncio.CancelledError):
                await self._sender
        await asyncio.gather(*self._tasks)
        await self._channel.close(None)
        return self.verdict

    async def _send(self) -> None:
        begin, number = time.monotonic(), 0
        while True:
            task = asyncio.create_task(self._one(number))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            number += 1
            await asyncio.sleep(max(0.0, begin + number * self._interval - time.monotonic()))

    async def _one(self, number: int) -> None:
        user_id = self._world.users[number % len(self._world.users)]
        deadline_ms = DEADLINES_MS[number % len(DEADLINES_MS)]
        excluded = self._excluded.get(user_id, ())
        request = RecommendRequest(user_id=user_id, num_items=_NUM_ITEMS)
        request.filter.exclude_item_ids.extend(excluded)
        self.verdict.answers += 1
        sent = time.monotonic()
        try:
            answer = await self._stub.Recommend(request, timeout=deadline_ms and deadline_ms / 1000)
        except grpc.aio.AioRpcError as error:
            self.verdict.failed += 1
            self.verdict.problems[f"{error.code().name}: {error.details()}"[:120]] += 1
            self._good = 0
            return
        self._judge(answer, user_id, excluded, deadline_ms or _DEFAULT_DEADLINE_MS, sent)
        # Next time some of what was good now is excluded: it would come again otherwise.
        self._excluded[user_id] = tuple(item.item_id for item in answer.items[:_EXCLUDED])

    def _judge(
        self, answer: RecommendResponse, user_id: str, excluded: Sequence[str], deadline_ms: float, sent: float
    ) -> None:
        verdict, now = self.verdict, time.monotonic()
        elapsed_ms = (now - sent) * 1000
        tier, reasons = tier_name(answer), frozenset(reason_names(answer))
        ids = [item.item_id for item in answer.items]
        verdict.tiers[tier] += 1
        verdict.reasons.update(reasons)
        verdict.elapsed_ms.append(elapsed_ms)
        if elapsed_ms > deadline_ms + _GRACE_MS:
            verdict.late += 1
            verdict.problems[f"late: {elapsed_ms:.0f} ms of {deadline_ms:.0f}"] += 1
        if not ids:
            verdict.empty += 1
        elif len(ids) != _NUM_ITEMS:
            verdict.blame(f"{len(ids)} items")
        if len(set(ids)) != len(ids):
            verdict.blame("an item twice")
        if not self._world.unavailable.isdisjoint(ids):
            verdict.blame("an unavailable item")
        if not set(excluded).isdisjoint(ids):
            verdict.blame("an excluded item")
        if "seen_unknown" not in reasons and not self._world.seen.get(user_id, frozenset()).isdisjoint(ids):
            verdict.blame("a seen item, and no word of it")
        during = sent > self._on_since and now < self._on_until
        if (objection := self._case.objection(tier, reasons, during=during)) is not None:
            verdict.blame(objection)
        self._note_good(is_good=tier == "RANKED" and not reasons)

    def _note_good(self, *, is_good: bool) -> None:
        if not is_good:
            self._good = 0
            return
        if not self._good:
            self._good_since = time.monotonic()
        self._good += 1
