"""What a request may say: limits checked before any work, each refusal naming its field.

Called by the gRPC adapter. Invariant: what passes can be worked on without a further look at its form.
"""

import numpy as np
import numpy.typing as npt

from core.clock import Clock
from core.codec import MAX_ID_CHARS, MAX_NUMBER, MAX_TIME_MS, MIN_TIME_MS, to_ms
from core.errors import InvalidRequestError, MalformedEventError
from features import windows
from features.vectors import SOURCES
from features.windows import UserState
from headrace.v1.candidate_service_pb2 import EncodeUsersRequest, RetrieveCandidatesRequest

MAX_CANDIDATES = 2000
MAX_USERS = 1000
MAX_PROBES = 100
MAX_STATE_BYTES = 1_000_000
MAX_HISTORY = 10_000

Floats = npt.NDArray[np.float32]


def check_retrieve(request: RetrieveCandidatesRequest) -> None:
    check_user_id("user_id", request.user_id)
    if not 1 <= request.num_candidates <= MAX_CANDIDATES:
        raise InvalidRequestError("num_candidates", f"must be in 1..{MAX_CANDIDATES}, not {request.num_candidates}")
    for name, quota in request.source_quotas.items():
        if name not in SOURCES:
            raise InvalidRequestError("source_quotas", f"no source {name[:64]!r}; there are {', '.join(SOURCES)}")
        if not 0 <= quota <= MAX_CANDIDATES:
            raise InvalidRequestError(f"source_quotas[{name}]", f"must be in 0..{MAX_CANDIDATES}")
    if request.look_up and (request.state or request.embedding):
        raise InvalidRequestError("look_up", "the request brings a state or an embedding itself; leave one of them out")
    if len(request.probe_item_ids) > MAX_PROBES:
        raise InvalidRequestError("probe_item_ids", f"at most {MAX_PROBES}")


def check_encode(request: EncodeUsersRequest) -> None:
    if not 1 <= len(request.users) <= MAX_USERS:
        raise InvalidRequestError("users", f"1..{MAX_USERS} are needed, not {len(request.users)}")
    for index, user in enumerate(request.users):
        check_user_id(f"users[{index}].user_id", user.user_id)


def check_user_id(field: str, user_id: str) -> None:
    if not 1 <= len(user_id) <= MAX_ID_CHARS:
        raise InvalidRequestError(field, f"1..{MAX_ID_CHARS} characters are needed, not {len(user_id)}")


def decode_state(field: str, blob: bytes) -> UserState:
    """The state of `features.windows.encode`, as far as it is one that events could have made."""
    if len(blob) > MAX_STATE_BYTES:
        raise InvalidRequestError(field, f"{len(blob)} bytes, the limit is {MAX_STATE_BYTES}")
    try:
        state = windows.decode(blob)
    except (MalformedEventError, ValueError, IndexError) as error:
        raise InvalidRequestError(field, f"not an encoded user state ({error})") from error
    if len(state.history) > MAX_HISTORY:
        raise InvalidRequestError(field, f"{len(state.history)} interactions, the limit is {MAX_HISTORY}")
    for entry in state.history:
        if not (MIN_TIME_MS <= entry.time_ms <= MAX_TIME_MS and abs(entry.value) <= MAX_NUMBER):
            raise InvalidRequestError(field, "an interaction's time or value is out of range; is the unit right?")
    return state


def time_of(request: RetrieveCandidatesRequest, clock: Clock) -> int:
    """As of when the request is to be answered (ms)."""
    if not request.context.HasField("as_of_time"):
        return clock.now_ms()
    now_ms = to_ms(request.context.as_of_time)
    if not MIN_TIME_MS <= now_ms <= MAX_TIME_MS:
        raise InvalidRequestError("context.as_of_time", "is not between 1971 and 2100; is the unit right?")
    return now_ms


def embedding_of(request: RetrieveCandidatesRequest, dimension: int, is_ours: bool) -> Floats:
    """The vector of the request as a unit vector, of which only a vector of our version must have our dimension."""
    # In double precision, in which no length of single-precision numbers overflows.
    vector = np.array(request.embedding, np.float64)
    if not np.isfinite(vector).all():
        raise InvalidRequestError("embedding", "must be finite numbers")
    if is_ours and len(vector) not in (0, dimension):
        raise InvalidRequestError("embedding", f"{dimension} numbers are needed, not {len(vector)}")
    return (vector / (np.linalg.norm(vector) or 1.0)).astype(np.float32)
