"""Rank: the ranker service scores the candidates.

Fourth stage. Invariant: without an answer in time the candidates go on unscored, and the trace says why.
"""

from typing import Protocol

import numpy as np

from core.codec import from_ms
from core.errors import StageError
from features.catalog import Rows
from features.feature_log import MAX_CANDIDATES
from headrace.v1 import types_pb2 as types
from headrace.v1.ranker_service_pb2 import RankCandidatesResponse, UserCandidates
from serving.clients import NotLoadedError, RankerClient
from serving.feature_log import is_logged
from serving.query import SOURCE_BIT, Candidates, Query, Staged, UserFeatures
from serving.trace import Removed


class Ranker(Protocol):
    """Scores candidates."""

    async def rank(self, query: Query, user: UserFeatures, candidates: Candidates) -> Staged:
        """Never fails: without scores the candidates come back as they are."""
        ...


class ServiceRanker:
    """Asks the ranker service, for scores of the query's own release.

    Args:
        client: of the ranker.
        feature_log_share: of so many answers what the ranker read is noted in the trace.
    """

    def __init__(self, client: RankerClient, feature_log_share: float) -> None:
        self._client = client
        self._feature_log_share = feature_log_share

    async def rank(self, query: Query, user: UserFeatures, candidates: Candidates) -> Staged:
        question = _question(query, user, candidates)
        if is_logged(query, self._feature_log_share):
            question.log_features_of = MAX_CANDIDATES
        try:
            response = await self._ask(query, question)
        except StageError as error:
            query.trace.blame(error)
            return Staged(candidates)
        query.trace.model_version = response.model_version
        query.trace.bundle_versions.add(response.bundle_version)
        if response.users[0].HasField("features"):
            query.trace.features = response.users[0].features
            query.trace.features.session_events.extend(user.session_events)
        return _scored(query, candidates, response)

    async def _ask(self, query: Query, question: UserCandidates) -> RankCandidatesResponse:
        try:
            return await self._client.score(question, query.release.version, query.budget)
        except NotLoadedError:
            # During a swap the ranker may be a moment behind: the answer then says that its versions are mixed.
            return await self._client.score(question, "", query.budget)


def _question(query: Query, user: UserFeatures, candidates: Candidates) -> UserCandidates:
    return UserCandidates(
        user_id=user.user_id,
        state=user.state_bytes,
        # A vector of other towers would mean nothing to the model; the stream encodes the user again by itself.
        embedding=user.vector if user.embedding_version == query.release.manifest.embedding_version else (),
        item_ids=query.release.ids(candidates.rows),
        scores=candidates.retrieval.tolist(),
        source_bits=as_trained(candidates.source_bits).tolist(),
        context=query.request.context,
        request_time=from_ms(query.now_ms),
    )


def as_trained(source_bits: Rows) -> Rows:
    """Source bits as the model knows them: it has not met batch scores, and takes what no source brought as if ANN had.

    See `offline.training.ranker_candidates.CandidateSources.provenance`. Shape [C].
    """
    known = source_bits & ~SOURCE_BIT["batch"]
    bits: Rows = np.where(known == 0, SOURCE_BIT["ann"], known).astype(np.int32)
    return bits


def _scored(query: Query, candidates: Candidates, response: RankCandidatesResponse) -> Staged:
    ranked = response.users[0]
    if any(ranked.cut):
        query.trace.cut = candidates.rows[np.array(ranked.cut, np.bool_)]
        query.trace.degrade(types.DEGRADED_REASON_DEADLINE_SHORT)
    scored = candidates.with_ranked(np.array(ranked.scores, np.float32))
    request = query.request
    if not request.HasField("min_score") or len(ranked.click_scores) != len(candidates):
        return Staged(scored)
    clicks = np.array(ranked.click_scores, np.float32)
    weak = clicks < request.min_score
    if not weak.any():
        return Staged(scored)
    removed = Removed("scores lower than min_score", candidates.rows[weak], scores=clicks[weak])
    return Staged(scored.take(~weak), (removed,))
