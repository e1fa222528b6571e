"""The path of a request: hydrate, retrieve, filter, rank, rerank, select, log.

Each stage is a protocol of its own in `serving.stages`; here they are run in order, timed, and what they remove is
noted. Invariant: `recommend` returns an answer inside the request's deadline whatever is down: where the stages cannot
make one, the ladder does.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from core.clock import Clock
from headrace.v1 import types_pb2 as types
from headrace.v1.recommender_service_pb2 import Recommendation, RecommendResponse
from serving.answer import assemble
from serving.answer_log import AnswerLog
from serving.ladder import Ladder, LastGood
from serving.query import Candidates, Query, Ranking, UserFeatures
from serving.replay import record_of
from serving.shown import Shown
from serving.stages.filter import CandidateFilter
from serving.stages.hydrate import Hydrator
from serving.stages.log import ImpressionLog
from serving.stages.rank import Ranker
from serving.stages.rerank import ReRanker
from serving.stages.retrieve import Retriever
from serving.stages.select import Selector

_NOTHING = Candidates.of_rows(np.empty(0, np.int32))
# With less time than this left, re-ranking (about 1 ms of arithmetic) would make the answer late.
_RERANK_NEEDS_MS = 2.0


@dataclass(frozen=True, slots=True)
class Stages:
    """One implementation of each stage."""

    hydrator: Hydrator
    retriever: Retriever
    filter: CandidateFilter
    ranker: Ranker
    reranker: ReRanker
    selector: Selector
    impressions: ImpressionLog


class Pipeline:
    """Runs the stages."""

    def __init__(
        self,
        stages: Stages,
        ladder: Ladder,
        last_good: LastGood,
        shown: Shown,
        answers: AnswerLog,
        rungs: tuple[str, ...],
        clock: Clock,
    ) -> None:
        self._stages = stages
        self._ladder = ladder
        self._last_good = last_good
        self._shown = shown
        self._answers = answers
        self._rungs = rungs
        self._clock = clock

    async def recommend(self, query: Query) -> RecommendResponse:
        """The path of a request, top to bottom."""
        user = await self._hydrate(query)
        found = await self._retrieve(query, user)
        eligible = self._filter(query, user, found)
        scored = await self._rank(query, user, eligible)
        ranking = self._rerank(query, user, scored)
        items = self._select(query, user, ranking)
        return self._log(query, user, ranking, items)

    def recommend_from_ladder(self, query: Query) -> RecommendResponse:
        """An answer without asking anybody: for overload, for no time, for bugs."""
        user = UserFeatures(query.user_id, segment=query.request.context.tags.get("segment", ""))
        query.trace.degrade(types.DEGRADED_REASON_SEEN_UNKNOWN)
        ranking = self._descend(query, user)
        items = self._select(query, user, ranking)
        return self._log(query, user, ranking, items)

    async def _hydrate(self, query: Query) -> UserFeatures:
        with query.trace.stage("hydrate"):
            user = await self._stages.hydrator.hydrate(query)
        if not user.is_known and user.status != types.FEATURE_STATUS_UNSPECIFIED:
            query.trace.degrade(types.DEGRADED_REASON_UNKNOWN_USER)
        return user

    async def _retrieve(self, query: Query, user: UserFeatures) -> Candidates:
        if not user.is_known:
            return _NOTHING
        with query.trace.stage("retrieve") as report:
            kept, removed = await self._stages.retriever.retrieve(query, user)
            report.note(len(kept), removed)
        return kept

    def _filter(self, query: Query, user: UserFeatures, candidates: Candidates) -> Candidates:
        if not user.is_known:
            return _NOTHING
        with query.trace.stage("filter") as report:
            kept, removed = self._stages.filter.filter(query, user, candidates)
            report.note(len(kept), removed)
        return kept

    async def _rank(self, query: Query, user: UserFeatures, candidates: Candidates) -> Candidates:
        if not len(candidates) or "ranked" not in self._rungs:
            return candidates
        with query.trace.stage("rank") as report:
            kept, removed = await self._stages.ranker.rank(query, user, candidates)
            report.note(len(kept), removed)
        return kept

    def _rerank(self, query: Query, user: UserFeatures, candidates: Candidates) -> Ranking:
        if not self._is_rankable(query, candidates):
            return self._descend(query, user)
        with query.trace.stage("rerank") as report:
            ranking = self._stages.reranker.rerank(query, user, candidates)
            report.note(len(ranking.candidates))
        self._last_good.remember(query, ranking)
        return ranking

    def _is_rankable(self, query: Query, candidates: Candidates) -> bool:
        if not len(candidates):
            return False
        if query.budget.deadline.remaining_ms() < _RERANK_NEEDS_MS:
            query.trace.degrade(types.DEGRADED_REASON_DEADLINE_SHORT)
            return False
        # Without the ranker, something must speak for the items: popular ones alone are the ladder's business.
        return candidates.ranked is not None or ("reranked_batch" in self._rungs and bool(candidates.fused.any()))

    def _descend(self, query: Query, user: UserFeatures) -> Ranking:
        with query.trace.stage("ladder") as report:
            ranking = self._ladder.descend(query, user)
            report.note(len(ranking.candidates))
        return ranking

    def _select(self, query: Query, user: UserFeatures, ranking: Ranking) -> list[Recommendation]:
        with query.trace.stage("select") as report:
            items, removed = self._stages.selector.select(query, user, ranking)
            report.note(len(items), removed)
        return items

    def _log(
        self, query: Query, user: UserFeatures, ranking: Ranking, items: list[Recommendation]
    ) -> RecommendResponse:
        response = assemble(query, user, ranking, items, self._clock.now_ms())
        self._stages.impressions.log(query, response)
        if not query.request.dry_run:
            self._shown.note(query.user_id, [item.item_id for item in items], query.now_ms)
            if self._answers.is_kept:
                digest = self._stages.reranker.settings_digest
                self._answers.keep(partial(record_of, query, user, ranking, response, digest))
        return response
