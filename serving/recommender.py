"""Takes a request to its answer: checks it, gives it a release and a budget, lets it in or sheds it, counts it.

Between the transports (gRPC now) and the pipeline. Invariant: a valid request is always answered; overload, lack of
time and bugs lead to a lower rung of the ladder, not to an error.
"""

import asyncio
from collections import Counter, deque
from typing import NamedTuple
from uuid import uuid4

import numpy as np

from core.clock import Clock
from core.codec import to_ms
from core.deadline import Deadline
from core.settings import ServingSettings
from core.telemetry import get_logger
from headrace.v1 import types_pb2 as types
from headrace.v1.recommender_service_pb2 import RecommendRequest, RecommendResponse
from headrace.v1.types_pb2 import DegradedReason
from serving import metrics
from serving.budget import Budget
from serving.load import LoadControl
from serving.paging import read_cursor
from serving.pipeline import Pipeline
from serving.query import Query
from serving.release import Releases
from serving.stages.log import tier_name
from serving.trace import Trace
from serving.validation import check_recommend

_log = get_logger("recommender")
# Latencies of so many answers make the p95 that WatchServing tells.
_RECENT = 1000
# How often it is looked how late the event loop is.
_TICK_SECONDS = 0.01
# Of the time given, what the stages have while requests are shed.
_PRESSED_SHARE = 0.6
# Of the time that is left, how much a request that is shed may wait for its turn.
_SHED_WAIT_SHARE = 0.4
# Candidates below which the sources could not even fill a long answer.
_LEAST_CANDIDATES = 50
# With less time than this nobody is asked: one hop to another process and back takes 1 ms at best.
_SHORTEST_MS = 4.0


class Answered(NamedTuple):
    """A request as it was worked on, and the answer."""

    query: Query
    response: RecommendResponse


class Recommender:
    """Answers requests."""

    def __init__(self, pipeline: Pipeline, releases: Releases, settings: ServingSettings, clock: Clock) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._clock = clock
        # Held by the request that is shed just now.
        self.shed_turn = asyncio.Lock()
        self._recent_ms: deque[float] = deque(maxlen=_RECENT)
        self.load = LoadControl(settings.max_concurrent_requests, clock)
        self.releases = releases
        self.answers_by_tier: Counter[str] = Counter()

    async def recommend(
        self, request: RecommendRequest, deadline: Deadline, *, probe_item_id: str = "", field_prefix: str = ""
    ) -> Answered:
        """Answers one request within `deadline`, or within the settings' where that is earlier.

        A longer deadline is only used to wait for tokens: nobody is served better by a slower answer.

        Raises:
            InvalidRequestError: the request cannot be served as it is.
        """
        start = self._clock.monotonic()
        now_ms = self._clock.now_ms()
        check_recommend(request, now_ms, field_prefix)
        if not request.tokens:
            deadline = deadline.capped_ms(self._settings.deadline_ms)
        if self.load.is_pressed:
            # On a full machine everything takes longer than it seems, the way back to the caller as well.
            deadline = deadline.capped_ms(_PRESSED_SHARE * deadline.remaining_ms())
        query = self._query(request, deadline, now_ms, probe_item_id, field_prefix)
        response = await self._answer(query)
        self._observe(query, response, (self._clock.monotonic() - start) * 1000)
        return Answered(query, response)

    async def warm_up(self, request: RecommendRequest) -> None:
        """Runs a request through all stages without counting it."""
        deadline = Deadline.after_ms(self._settings.deadline_ms, self._clock)
        await self._answer(self._query(request, deadline, self._clock.now_ms()))

    async def watch_loop(self) -> None:
        """Tells the load control how late the loop is, until cancelled. A request waits for its handler as long."""
        while True:
            start = self._clock.monotonic()
            await asyncio.sleep(_TICK_SECONDS)
            self.load.tick(max(0.0, (self._clock.monotonic() - start - _TICK_SECONDS) * 1000))
            metrics.loop_lag_ms.set(self.load.lag_ms)
            metrics.quality.set(self.load.quality)
            metrics.admission_limit.set(self.load.limit)

    def p95_ms(self) -> float:
        """Of the most recent answers; 0 before the first."""
        return float(np.percentile(self._recent_ms, 95)) if self._recent_ms else 0.0

    def _query(
        self, request: RecommendRequest, deadline: Deadline, now_ms: int, probe_item_id: str = "", prefix: str = ""
    ) -> Query:
        context, release = request.context, self.releases.current
        on = self._settings.on(context.surface)
        num_items = request.num_items or on.num_items
        return Query(
            request,
            str(uuid4()),
            num_items,
            to_ms(context.as_of_time) if context.HasField("as_of_time") else now_ms,
            release,
            Budget(deadline, self._settings.stage_budget_ms),
            Trace(self._clock),
            self._num_candidates(num_items),
            on,
            probe_item_id,
            read_cursor(request.cursor, request.user_id, release.catalog, f"{prefix}cursor"),
        )

    def _num_candidates(self, num_items: int) -> int:
        wanted = round(self._settings.num_candidates * self.load.quality)
        return min(self._settings.num_candidates, max(wanted, _LEAST_CANDIDATES, num_items))

    async def _answer(self, query: Query) -> RecommendResponse:
        given_ms = query.budget.deadline.remaining_ms()
        if given_ms < _SHORTEST_MS:
            query.trace.degrade(types.DEGRADED_REASON_DEADLINE_SHORT)
            return self._pipeline.recommend_from_ladder(query)
        if not self.load.enter():
            return await self._shed(query)
        try:
            async with asyncio.timeout(query.budget.last_call.remaining_seconds()):
                return await self._pipeline.recommend(query)
        except TimeoutError:
            query.trace.degrade(types.DEGRADED_REASON_OVERLOADED)
            return self._pipeline.recommend_from_ladder(query)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - never empty: a bug costs quality, not the answer
            metrics.unexpected_errors.inc()
            _log.error("a bug was covered up by a lower rung", error=repr(error), where=_place(error))
            return self._pipeline.recommend_from_ladder(query)
        finally:
            self.load.leave(given_ms - query.budget.deadline.remaining_ms(), given_ms)

    async def _shed(self, query: Query) -> RecommendResponse:
        """An answer from the ladder, one a turn of the loop: what is ranked takes ten turns, and must get on.

        Callers that ask again at once would otherwise have all of the loop's time for answers that are not ranked.
        """
        query.trace.degrade(types.DEGRADED_REASON_OVERLOADED)
        try:
            async with asyncio.timeout(_SHED_WAIT_SHARE * query.budget.deadline.remaining_seconds()):
                await self.shed_turn.acquire()
        except TimeoutError:
            return self._pipeline.recommend_from_ladder(query)
        try:
            return self._pipeline.recommend_from_ladder(query)
        finally:
            # In the next turn: nobody else is shed in this one.
            asyncio.get_running_loop().call_soon(self.shed_turn.release)

    def _observe(self, query: Query, response: RecommendResponse, elapsed_ms: float) -> None:
        tier = tier_name(response.served_tier)
        self._recent_ms.append(elapsed_ms)
        self.answers_by_tier[tier] += 1
        metrics.answers.labels(tier).inc()
        metrics.answer_ms.labels(tier).observe(elapsed_ms)
        for reason in response.degraded_reasons:
            metrics.degraded.labels(DegradedReason.Name(reason).removeprefix("DEGRADED_REASON_").lower()).inc()
        for report in query.trace.stages:
            metrics.stage_ms.labels(report.name).observe(report.elapsed_ms)
            if report.removed:
                metrics.removed_candidates.labels(report.name).inc(report.removed_count)


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
