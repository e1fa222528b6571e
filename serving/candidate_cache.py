"""What was just retrieved for a user, used again while nothing that it was made from has changed.

In front of the retriever: a page that asks for several surfaces, or is loaded twice, retrieves once. Invariant: the key
holds the state's revision, the vector's, the release and all of the request that retrieval reads, so an event of the
user or a new bundle never meets an old answer; what is incomplete is not kept; an erased user leaves nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from core.clock import Clock
from headrace.v1 import types_pb2 as types
from serving import metrics
from serving.query import Query, Staged, UserFeatures
from serving.stages.retrieve import Retriever

_INCOMPLETE = frozenset(
    {
        types.DEGRADED_REASON_RETRIEVAL_UNAVAILABLE,
        types.DEGRADED_REASON_RETRIEVAL_TIMEOUT,
        types.DEGRADED_REASON_FEW_CANDIDATES,
    }
)


class _Kept(NamedTuple):
    key: tuple[object, ...]
    found: Staged
    index_version: str
    embedding_version: str
    bundle_versions: frozenset[str]
    at: float


class CachingRetriever:
    """A retriever that remembers each user's last answer for a moment.

    Args:
        retriever: asked where nothing fits.
        seconds: how long an answer may be used again; new items are found that much later.
        users: how many are remembered, those who asked last.
        clock: for the age.
    """

    def __init__(self, retriever: Retriever, seconds: float, users: int, clock: Clock) -> None:
        self._retriever = retriever
        self._seconds = seconds
        self._users = users
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    async def retrieve(self, query: Query, user: UserFeatures) -> Staged:
        if self._seconds <= 0 or query.page.snapshot is not None or query.probe_item_id:
            return await self._retriever.retrieve(query, user)
        key = _key(query, user)
        kept = self._kept.get(query.user_id)
        if kept is not None and kept.key == key and self._clock.monotonic() - kept.at <= self._seconds:
            metrics.retrievals_saved.inc()
            trace = query.trace
            trace.index_version, trace.embedding_version = kept.index_version, kept.embedding_version
            trace.bundle_versions |= kept.bundle_versions
            return kept.found
        found = await self._retriever.retrieve(query, user)
        if _INCOMPLETE.isdisjoint(query.trace.reasons):
            self._keep(query, key, found)
        return found

    def forget(self, user_ids: Iterable[str]) -> None:
        """These users were erased."""
        for user_id in user_ids:
            self._kept.pop(user_id, None)

    def _keep(self, query: Query, key: tuple[object, ...], found: Staged) -> None:
        trace = query.trace
        self._kept[query.user_id] = _Kept(
            key,
            found,
            trace.index_version,
            trace.embedding_version,
            frozenset(trace.bundle_versions),
            self._clock.monotonic(),
        )
        self._kept.move_to_end(query.user_id)
        if len(self._kept) > self._users:
            self._kept.popitem(last=False)


def _key(query: Query, user: UserFeatures) -> tuple[object, ...]:
    request = query.request
    return (
        query.release.version,
        user.state.revision,
        user.embedding_version,
        user.embedding_revision,
        tuple(user.batch_item_ids),
        user.segment,
        query.num_candidates,
        request.filter.SerializeToString(deterministic=True),
        request.context.SerializeToString(deterministic=True),
        # Events that Kafka has not seen move the revision, but two clicks on different items move it alike.
        b"".join(event.SerializeToString(deterministic=True) for event in request.session_events),
    )
