"""What the online store knows of a user, for requests that bring a user_id alone.

Asked by the gRPC adapter before anything else. Serving never needs it: it has read the row already. Invariant: one
connection on a thread of its own, which stands in nobody's way while Redis is slow or away.
"""

from typing import Any

from candidate.executor import WorkExecutor
from core.deadline import Deadline
from core.settings import Settings
from features.definitions import USER_EMBEDDING, USER_STATE
from features.stores.online import OnlineStore, StoreChangedError
from headrace.v1.candidate_service_pb2 import RetrieveCandidatesRequest


class StoredUsers:
    """Looks users up."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._executor = WorkExecutor(1, settings.candidate.queue_max)
        self._store: OnlineStore | None = None

    async def fill(self, request: RetrieveCandidatesRequest, deadline: Deadline) -> RetrieveCandidatesRequest:
        """The request with the user's state and vector in it, where there are any.

        Raises:
            StageError: Redis did not answer, or not in time.
        """
        cells = await self._executor.run(deadline, lambda _: self._read(request.user_id))
        filled = RetrieveCandidatesRequest()
        filled.CopyFrom(request)
        filled.look_up = False
        # What the store does not have stays at its default.
        filled.MergeFrom(RetrieveCandidatesRequest(**cells))
        return filled

    def close(self) -> None:
        self._executor.close()
        if self._store is not None:
            self._store.close()

    def _read(self, user_id: str) -> dict[str, Any]:
        if self._store is None:
            self._store = OnlineStore(self._settings.redis, self._settings.features.project)
        try:
            return self._cells(self._store, user_id)
        except StoreChangedError:
            # Told once to whoever writes; a reader just reads on.
            return self._cells(self._store, user_id)

    def _cells(self, store: OnlineStore, user_id: str) -> dict[str, Any]:
        """By the names of the request's fields."""
        (state,) = store.read(USER_STATE, [(user_id,)], ("state",))
        (vector,) = store.read(USER_EMBEDDING, [(user_id,)], ("vector", "embedding_version", "embedding_revision"))
        cells = {**state.cells, **vector.cells}
        if "vector" in cells:
            cells["embedding"] = cells.pop("vector")
        return cells
