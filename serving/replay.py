"""A past answer made again from its record, and whether it is the same.

Behind the ReplayRecommendation RPC. The same re-ranker and selector run over what the record says came in: candidates,
scores, the user's state, the moment's signals. Invariant: nothing that differs goes unnamed, and nothing is logged.
"""

import asyncio
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core import bundle as bundles
from core.clock import Clock
from core.deadline import Deadline
from core.errors import ArtifactError, NotFoundError
from core.pace import beside_calls
from core.settings import Settings
from features import windows
from features.catalog import Floats
from features.transforms import stable_hash
from headrace.v1 import types_pb2 as types
from headrace.v1.answer_record_pb2 import AnswerRecord
from headrace.v1.recommender_service_pb2 import RecommendResponse, ReplayRecommendationResponse
from serving.answer import assemble
from serving.answer_log import AnswerLog
from serving.budget import Budget
from serving.query import Candidates, Page, Query, Ranking, RankInputs, Signals, UserFeatures
from serving.release import Release, Releases, load_release
from serving.stages.rerank import BlendingReRanker
from serving.stages.select import Selector
from serving.trace import Trace

_RANKED = (types.SERVING_TIER_RANKED, types.SERVING_TIER_RERANKED_BATCH)
# Scores are compared as they are shown.
_CLOSE = 1e-6


def record_of(
    query: Query, user: UserFeatures, ranking: Ranking, response: RecommendResponse, settings_digest: int
) -> AnswerRecord:
    """What is needed to make this answer again."""
    inputs = ranking.inputs
    candidates = ranking.candidates if inputs is None else inputs.candidates
    record = AnswerRecord(
        request=query.request,
        response=response,
        state=user.state_bytes,
        segment=user.segment,
        now_ms=query.now_ms,
        num_items=query.num_items,
        rules_digest=rules_digest(query.release),
        settings_digest=settings_digest,
        shown_item_ids=query.page.shown_item_ids,
        item_ids=query.release.ids(candidates.rows),
        retrieval_scores=candidates.retrieval.tobytes(),
        fused_scores=candidates.fused.tobytes(),
        batch_scores=candidates.batch.tobytes(),
        source_bits=candidates.source_bits.tobytes(),
    )
    if inputs is None:
        record.list_scores = ranking.scores.tobytes()
        return record
    record.trending = inputs.signals.trending.tobytes()
    if candidates.ranked is not None:
        record.ranker_scores = candidates.ranked.tobytes()
    if inputs.signals.fatigue is not None:
        record.fatigue = inputs.signals.fatigue.tobytes()
    return record


def rules_digest(release: Release) -> int:
    """Changes with the rules."""
    return stable_hash(release.rules.model_dump_json())


class Replayer:
    """Makes answers again."""

    def __init__(
        self,
        log: AnswerLog,
        releases: Releases,
        reranker: BlendingReRanker,
        selector: Selector,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._log = log
        self._releases = releases
        self._reranker = reranker
        self._selector = selector
        self._settings = settings
        self._clock = clock
        self._older: Release | None = None
        self._loading = asyncio.Lock()

    async def replay(self, recommendation_id: str, user_id: str = "") -> ReplayRecommendationResponse:
        """The logged answer, the rebuilt one, and where they differ.

        Raises:
            NotFoundError: this process keeps no record of the answer, or not of this user.
            ArtifactError: the bundle that it was made with is gone.
        """
        record = await asyncio.to_thread(self._log.find, recommendation_id)
        if record is None or (user_id and record.request.user_id != user_id):
            raise NotFoundError(
                f"no record of recommendation {recommendation_id}; each replica keeps its own last answers "
                "(serving.replay_log_mb), until it is started again"
            )
        release = await self._release(record.response.versions.bundle_version)
        rebuilt = self._rebuild(record, release)
        differences = _differences(record.response, rebuilt)
        if differences:
            differences += self._causes(record, release)
        return ReplayRecommendationResponse(
            matches=not differences, logged=record.response, rebuilt=rebuilt, differences=differences
        )

    async def _release(self, version: str) -> Release:
        async with self._loading:
            for release in (self._releases.current, self._older):
                if release is not None and release.version == version:
                    return release
            folder = Path(self._settings.registry.path) / version
            if not folder.is_dir():
                raise ArtifactError(f"bundle {version} is gone from the registry; its answers cannot be made again")
            with beside_calls():
                self._older = await asyncio.to_thread(lambda: load_release(bundles.open_bundle(folder), self._settings))
            return self._older

    def _rebuild(self, record: AnswerRecord, release: Release) -> RecommendResponse:
        state = windows.decode(record.state)
        user = UserFeatures(record.request.user_id, state, record.state, segment=record.segment)
        serving = self._settings.serving
        query = Query(
            record.request,
            record.response.recommendation_id,
            record.num_items,
            record.now_ms,
            release,
            Budget(Deadline.after_ms(serving.deadline_ms, self._clock), serving.stage_budget_ms),
            Trace(self._clock),
            len(record.item_ids),
            serving.on(record.request.context.surface),
            page=Page(tuple(record.shown_item_ids)),
        )
        ranking = self._ranking(record, query, user)
        items, _ = self._selector.select(query, user, ranking)
        return assemble(query, user, ranking, items, record.now_ms)

    def _ranking(self, record: AnswerRecord, query: Query, user: UserFeatures) -> Ranking:
        rows = query.release.catalog.rows(record.item_ids)
        known = rows >= 0
        ranked = _floats(record.ranker_scores) if record.ranker_scores else None
        candidates = Candidates(
            rows,
            _floats(record.retrieval_scores),
            _floats(record.fused_scores),
            _floats(record.batch_scores),
            np.frombuffer(record.source_bits, np.int32),
            ranked,
        ).take(known)
        if record.response.served_tier not in _RANKED:
            scores: npt.NDArray[np.float64] = np.frombuffer(record.list_scores, np.float64)[known]
            return Ranking(candidates, scores, record.response.served_tier, np.ones(len(scores)))
        fatigue = _floats(record.fatigue)[known] if record.fatigue else None
        signals = Signals(_floats(record.trending)[known], fatigue)
        return self._reranker.order(query, user, RankInputs(candidates, signals))

    def _causes(self, record: AnswerRecord, release: Release) -> list[str]:
        """What is known to have changed since."""
        causes = []
        if missing := int((release.catalog.rows(record.item_ids) < 0).sum()):
            causes.append(f"{missing} candidates are not in the catalogue any more")
        if record.rules_digest != rules_digest(release):
            causes.append("the rules have changed since")
        if record.settings_digest != self._reranker.settings_digest:
            causes.append("the settings have changed since")
        return causes


def _differences(logged: RecommendResponse, rebuilt: RecommendResponse) -> list[str]:
    """In words, the first few."""
    found = []
    if logged.served_tier != rebuilt.served_tier:
        found.append(f"tier {logged.served_tier} was served, {rebuilt.served_tier} is rebuilt")
    if logged.state_revision != rebuilt.state_revision:
        found.append(f"state revision {logged.state_revision} was served, {rebuilt.state_revision} is rebuilt")
    if len(logged.items) != len(rebuilt.items):
        found.append(f"{len(logged.items)} items were served, {len(rebuilt.items)} are rebuilt")
    for before, after in zip(logged.items, rebuilt.items, strict=False):
        if before.item_id != after.item_id:
            found.append(f"position {before.position}: {before.item_id} was served, {after.item_id} is rebuilt")
        elif abs(before.score - after.score) > _CLOSE or abs(before.propensity - after.propensity) > _CLOSE:
            found.append(f"position {before.position}: {before.item_id} with another score or propensity")
    return found[:20]


def _floats(raw: bytes) -> Floats:
    return np.frombuffer(raw, np.float32)
