"""What a request may say: checked before any work, each refusal naming its field.

Called by the gRPC adapter. Invariant: what passes can be scored without a further look at its form; values that are
not finite pass, and the scorer replaces them.
"""

import numpy as np

from core.codec import MAX_ID_CHARS, MAX_TIME_MS, MIN_TIME_MS, to_ms
from core.deadline import Deadline
from core.errors import InvalidRequestError, MalformedEventError
from features import feature_log, windows
from features.windows import UserState
from headrace.v1.ranker_service_pb2 import RankCandidatesRequest, UserCandidates
from ranker.release import Release, UserJob

MAX_USERS = 64
MAX_CANDIDATES = 2000
MAX_STATE_BYTES = 1_000_000


def jobs_of(
    request: RankCandidatesRequest, release: Release, now_ms: int, deadline: Deadline | None = None
) -> list[UserJob]:
    """The users of a request as jobs.

    Args:
        request: as it came.
        release: what to score with.
        now_ms: the time of features where a user gives none.
        deadline: of the call.

    Raises:
        InvalidRequestError: a field is out of its limits.
    """
    if request.HasField("least_confidence") and not 0 <= request.least_confidence <= 1:
        raise InvalidRequestError("least_confidence", f"must be within 0..1, not {request.least_confidence}")
    if not 1 <= len(request.users) <= MAX_USERS:
        raise InvalidRequestError("users", f"1..{MAX_USERS} are needed, not {len(request.users)}")
    return [_job(f"users[{index}]", user, release, now_ms, deadline) for index, user in enumerate(request.users)]


def _job(field: str, user: UserCandidates, release: Release, now_ms: int, deadline: Deadline | None) -> UserJob:
    count = len(user.item_ids)
    if len(user.user_id) > MAX_ID_CHARS:
        raise InvalidRequestError(f"{field}.user_id", f"at most {MAX_ID_CHARS} characters, not {len(user.user_id)}")
    if count > MAX_CANDIDATES:
        raise InvalidRequestError(f"{field}.item_ids", f"at most {MAX_CANDIDATES}, not {count}")
    for name, length in (("scores", len(user.scores)), ("source_bits", len(user.source_bits))):
        if length != count:
            raise InvalidRequestError(f"{field}.{name}", f"length {length} differs from that of item_ids, {count}")
    if not 0 <= user.log_features_of <= feature_log.MAX_CANDIDATES:
        raise InvalidRequestError(
            f"{field}.log_features_of", f"0..{feature_log.MAX_CANDIDATES}, not {user.log_features_of}"
        )
    dimension = len(user.embedding)
    if dimension not in (0, release.dimension):
        raise InvalidRequestError(
            f"{field}.embedding", f"{release.dimension} numbers are needed, or none, not {dimension}"
        )
    return UserJob(
        release,
        _state(f"{field}.state", user.state),
        np.array(user.embedding, np.float32) if dimension else None,
        user.item_ids,
        np.array(user.scores, np.float32),
        # Only the bits of known sources are read; a sign bit must not overflow.
        (np.array(user.source_bits, np.int64) & 0x7FFFFFFF).astype(np.int32),
        _time_ms(field, user, now_ms),
        user.log_features_of,
        deadline,
    )


def _state(field: str, blob: bytes) -> UserState:
    if len(blob) > MAX_STATE_BYTES:
        raise InvalidRequestError(field, f"{len(blob)} bytes, the limit is {MAX_STATE_BYTES}")
    try:
        return windows.decode(blob)
    except (MalformedEventError, ValueError, IndexError) as error:
        raise InvalidRequestError(field, f"not an encoded user state ({error})") from error


def _time_ms(field: str, user: UserCandidates, now_ms: int) -> int:
    if user.context.HasField("as_of_time"):
        name, time_ms = "context.as_of_time", to_ms(user.context.as_of_time)
    elif user.HasField("request_time"):
        name, time_ms = "request_time", to_ms(user.request_time)
    else:
        return now_ms
    if not MIN_TIME_MS <= time_ms <= MAX_TIME_MS:
        raise InvalidRequestError(f"{field}.{name}", "is not between 1971 and 2100; is the unit right?")
    return time_ms
