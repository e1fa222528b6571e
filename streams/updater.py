"""The embedding updater: users whose state moved get a new vector through CandidateService.EncodeUsers.

The reader marks users; a thread of its own drains them in micro-batches, and sweeps the store for vectors that are
missing, older than their state or of another tower. Invariant: dirty is derived from the rows (state revision against
embedding revision and version), so what this process forgets the next sweep finds; a vector of an older revision
never replaces a newer one of the same version.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import grpc

from core.clock import Clock, SystemClock
from core.errors import StageError
from core.grpc_runtime import blocking_channel
from core.settings import Settings
from core.telemetry import get_logger
from features.definitions import USER_EMBEDDING, USER_STATE
from features.stores.layout import Cell
from features.stores.online import ABSENT, OnlineStore, Row, StoreChangedError, Write, read_offsets
from headrace.v1.candidate_service_pb2 import (
    EncodedUser,
    EncodeUsersRequest,
    EncodeUsersResponse,
    GetIndexInfoRequest,
    UserToEncode,
)
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub
from streams import metrics

_log = get_logger("streams.updater")

_BACKOFF_SECONDS = (0.05, 2.0)
_IDLE_SECONDS = 0.5
# While users act without a pause, every so many batches is one for those that a sweep found.
_LIVE_TURNS = 4
# What the service says of a request that no retry will mend. A full queue is none of these: it empties.
_REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
_VECTOR = ("embedding_version", "embedding_revision")


class RefusedError(StageError):
    """The candidate service does not encode these users; smaller requests may tell which of them it is."""


class EmbeddingUpdater:
    """The set of dirty users, and the thread that drains it.

    Args:
        settings: of the whole process.
        store: for this thread alone.
        owns: says whether this worker reads a partition; others sweep theirs.
        clock: the time.
    """

    def __init__(
        self, settings: Settings, store: OnlineStore, owns: Callable[[int], bool], clock: Clock | None = None
    ) -> None:
        self._settings = settings.streams
        self._target = settings.serving.candidate_target
        self._store = store
        self._owns = owns
        self._clock = clock or SystemClock()
        # user -> when it became dirty. The ones that just acted come before those that a sweep found.
        self._dirty: dict[str, float] = {}
        self._found: dict[str, float] = {}
        self._version: str | None = None
        self._turn = 0
        self._sweep: Iterator[str] | None = None
        self._sweep_due: float | None = 0.0
        self._backoff_seconds = _BACKOFF_SECONDS[0]
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embedding-updater", daemon=True)
        metrics.OLDEST_DIRTY.set_function(self.oldest_dirty_ms)
        metrics.DIRTY_USERS.set_function(lambda: len(self._dirty) + len(self._found))

    # --- from any thread ---

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def mark(self, users: Iterable[str]) -> None:
        """These users' states have, or may have, a new revision."""
        now = self._clock.monotonic()
        with self._changed:
            for user_id in users:
                if len(self._dirty) >= self._settings.dirty_users_max and user_id not in self._dirty:
                    # Full: a sweep finds the others again.
                    self._sweep_due = min(now + _BACKOFF_SECONDS[1], self._sweep_due or now + _BACKOFF_SECONDS[1])
                    break
                self._dirty.setdefault(user_id, now)
            self._changed.notify_all()

    def sweep_soon(self) -> None:
        """Looks at the whole store (again): this worker has taken over users of another one."""
        with self._changed:
            # A sweep under way may be past them already; the next one begins when it has ended.
            self._sweep_due = self._clock.monotonic()
            self._changed.notify_all()

    def forget(self, user_id: str) -> None:
        """The user was erased."""
        with self._changed:
            self._dirty.pop(user_id, None)
            self._found.pop(user_id, None)

    def oldest_dirty_ms(self) -> float:
        """How long the longest waiting user has waited; 0 when nobody waits."""
        with self._changed:
            oldest = min(next(iter(self._dirty.values()), float("inf")), next(iter(self._found.values()), float("inf")))
        return max(0.0, (self._clock.monotonic() - oldest) * 1000) if oldest != float("inf") else 0.0

    # --- the thread ---

    def _run(self) -> None:
        channel = blocking_channel(self._target)
        stub = CandidateServiceStub(channel)
        try:
            while not self._stopping.is_set():
                batch = self._take()
                try:
                    if batch:
                        self._encode(stub, list(batch))
                    else:
                        self._sweep_on(stub)
                    self._backoff_seconds = _BACKOFF_SECONDS[0]
                except StageError as error:
                    self._put_back(batch)
                    self._wait_after(error)
                except Exception as error:  # noqa: BLE001 - vectors can wait, the thread must not end
                    _log.error("unexpected error, going on", error=repr(error))
                    self._put_back(batch)
                    self._wait_after(StageError("updater", repr(error)))
        finally:
            channel.close()

    def _take(self) -> dict[str, float]:
        """The next users to encode; empty when only a sweep is to be done."""
        size = self._settings.encode_batch_users
        with self._changed:
            if not self._dirty and not self._found and not self._sweeping():
                self._changed.wait(_IDLE_SECONDS)
            if 0 < len(self._dirty) < size:
                # A burst of events comes in several batches; one encoding serves them all.
                self._changed.wait_for(
                    lambda: len(self._dirty) >= size or self._stopping.is_set(), self._settings.encode_wait_ms / 1000
                )
            self._turn += 1
            others = bool(self._found) or self._sweeping()
            live = self._dirty and not (others and self._turn % _LIVE_TURNS == 0)
            source = self._dirty if live else self._found
            batch = dict(islice(source.items(), size))
            for user_id in batch:
                del source[user_id]
        return batch

    def _put_back(self, batch: dict[str, float]) -> None:
        with self._changed:
            self._dirty = {**batch, **self._dirty}

    def _wait_after(self, error: StageError) -> None:
        if isinstance(error, StoreChangedError):
            self._sweep_due = 0.0
        pause = self._backoff_seconds
        self._backoff_seconds = min(2 * pause, _BACKOFF_SECONDS[1])
        # Once as it begins; the metrics tell how long it lasts.
        tell = _log.warning if pause == _BACKOFF_SECONDS[0] else _log.debug
        tell("vectors wait", problem=str(error), users=len(self._dirty), pause_seconds=pause)
        self._stopping.wait(pause)

    # --- encoding ---

    def _encode(self, stub: CandidateServiceStub, users: list[str]) -> None:
        keys = [(user_id,) for user_id in users]
        states = self._store.read(USER_STATE, keys, ("state", "revision"))
        vectors = self._store.read(USER_EMBEDDING, keys, _VECTOR)
        stale = [
            (user_id, state, vector)
            for user_id, state, vector in zip(users, states, vectors, strict=True)
            if _is_stale(state, vector, self._version)
        ]
        if stale:
            self._encode_rows(stub, stale)

    def _encode_rows(self, stub: CandidateServiceStub, stale: list[tuple[str, Row, Row]]) -> None:
        try:
            answer = self._call(stub, [(user_id, state) for user_id, state, _ in stale])
        except RefusedError as error:
            if len(stale) == 1:
                metrics.ENCODE_FAILURES.inc()
                _log.error("the candidate service refuses a user", user=stale[0][0], problem=str(error))
                return
            middle = len(stale) // 2
            self._encode_rows(stub, stale[:middle])
            self._encode_rows(stub, stale[middle:])
            return
        version = answer.embedding_version
        if self._version is not None and version != self._version:
            _log.info("new towers, all vectors are stale", embedding_version=version, before=self._version)
            self._sweep, self._sweep_due = None, 0.0
        self._version = version
        writes = [
            _write(encoded, version, vector)
            for encoded, (_, _, vector) in zip(answer.users, stale, strict=True)
            if not _is_newer(vector, version, encoded.revision)
        ]
        beaten = [write.key[0] for write, done in zip(writes, self._store.write(writes), strict=True) if not done]
        self._clear_erased(writes)
        metrics.USERS_ENCODED.inc(len(writes) - len(beaten))
        if beaten:
            self.mark(beaten)

    def _clear_erased(self, writes: Sequence[Write]) -> None:
        """Users who were erased while the service encoded them must not get the vector of what they were."""
        keys = [write.key for write in writes]
        states = self._store.read(USER_STATE, keys, ("revision",))
        erased = [key for key, state in zip(keys, states, strict=True) if "revision" not in state.cells]
        if erased:
            self._store.clear(USER_EMBEDDING, erased)

    def _call(self, stub: CandidateServiceStub, users: Sequence[tuple[str, Row]]) -> EncodeUsersResponse:
        request = EncodeUsersRequest(users=[UserToEncode(user_id=user_id, state=_state(row)) for user_id, row in users])
        begin = self._clock.monotonic()
        try:
            answer: EncodeUsersResponse = stub.EncodeUsers(request, timeout=self._settings.encode_timeout_ms / 1000)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        if [encoded.user_id for encoded in answer.users] != [user_id for user_id, _ in users]:
            raise RefusedError("candidate", "EncodeUsers answered for other users than asked")
        metrics.ENCODE_MS.observe((self._clock.monotonic() - begin) * 1000)
        return answer

    def _translated(self, error: grpc.RpcError) -> StageError:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        details = error.details() if isinstance(error, grpc.Call) else str(error)
        kind = RefusedError if code in _REFUSALS else StageError
        return kind("candidate", f"{self._target} answers {code.name}: {details}")

    # --- the sweep ---

    def _sweeping(self) -> bool:
        return self._sweep is not None or (self._sweep_due is not None and self._clock.monotonic() >= self._sweep_due)

    def _sweep_on(self, stub: CandidateServiceStub) -> None:
        """Looks at some more rows of the store, so that live users wait for a few rows at most."""
        if not self._sweeping():
            return
        if self._sweep is None:
            try:
                info = stub.GetIndexInfo(GetIndexInfoRequest(), timeout=self._settings.encode_timeout_ms / 1000)
            except grpc.RpcError as error:
                raise self._translated(error) from error
            self._version = info.embedding_version
            interval = self._settings.sweep_interval_seconds
            with self._changed:
                self._sweep = iter(self._store.keys_of(USER_STATE))
                self._sweep_due = self._clock.monotonic() + interval if interval else None
        try:
            users = list(islice(self._sweep, self._settings.encode_batch_users))
        except StageError:
            self._sweep, self._sweep_due = None, 0.0
            raise
        if not users:
            self._sweep = None
            return
        keys = [(user_id,) for user_id in users]
        states = self._store.read(USER_STATE, keys, ("revision", "offsets"))
        vectors = self._store.read(USER_EMBEDDING, keys, _VECTOR)
        now = self._clock.monotonic()
        with self._changed:
            for user_id, state, vector in zip(users, states, vectors, strict=True):
                if self._is_ours(state) and _is_stale(state, vector, self._version):
                    self._found.setdefault(user_id, now)

    def _is_ours(self, state: Row) -> bool:
        """Whether this worker reads the user's partition; rows that no stream wrote are everybody's."""
        offsets = read_offsets(state.raw.get("offsets", ABSENT))
        return not offsets or any(self._owns(partition) for _, partition in offsets)


def _is_stale(state: Row, vector: Row, version: str | None) -> bool:
    """Whether a user with a state has no vector, an older one, or one of another tower."""
    revision = state.cells.get("revision")
    if not isinstance(revision, int):
        return False
    encoded = vector.cells.get("embedding_revision")
    if not isinstance(encoded, int) or encoded < revision:
        return True
    return version is not None and vector.cells.get("embedding_version") != version


def _is_newer(vector: Row, version: str, revision: int) -> bool:
    stored = vector.cells.get("embedding_revision")
    return vector.cells.get("embedding_version") == version and isinstance(stored, int) and stored >= revision


def _write(encoded: EncodedUser, version: str, vector: Row) -> Write:
    cells: dict[str, Cell] = {
        "vector": list(encoded.embedding),
        "embedding_version": version,
        "embedding_revision": encoded.revision,
    }
    expected = vector.raw.get("embedding_revision", ABSENT)
    return Write(USER_EMBEDDING, (encoded.user_id,), cells, "embedding_revision", expected)


def _state(row: Row) -> bytes:
    value = row.cells.get("state", b"")
    return value if isinstance(value, bytes) else b""
