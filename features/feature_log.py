"""What the ranker read for one answer, as a message: the float32 numbers, and the revision of every row behind them.

Made by the ranker while its catalogue stands still, cut by serving to what was shown and a sample of the rest, made
again by offline/feature_log.py. Invariant: the numbers are the very ones that the model read, and features of the same
revisions as of the same time are the same numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.errors import MalformedEventError
from features.catalog import Catalog, Floats
from features.vectors import CANDIDATE_FEATURES, SIGNATURE, USER_FEATURES, RankerInput
from features.windows import UserState
from headrace.v1.events_pb2 import SourceOffset
from headrace.v1.feature_log_pb2 import LoggedFeatures

# Candidates that the ranker tells of at most, and bytes that serving logs of an answer at most: an impression list must
# stay far below what a topic takes (core.codec.MAX_VALUE_BYTES).
MAX_CANDIDATES = 512
MAX_BYTES = 256 * 1024
_NUMBER_BYTES = 4


class LoggedNumbers(NamedTuple):
    """The numbers of one answer: a history of H entries, N items."""

    # [len(USER_FEATURES)]
    user: Floats
    # [H], [H]
    history_weights: Floats
    history_ages: Floats
    # [N, len(CANDIDATE_FEATURES)]
    candidates: Floats


def note(
    state: UserState, item_ids: Sequence[str], made: RankerInput, catalog: Catalog, now_ms: int, bundle_version: str
) -> LoggedFeatures:
    """What was made of a state, C candidates and a catalogue that has not changed since (`Catalog.held`)."""
    numbers = numbers_of(made, len(state.history))
    history_rows = made.history_rows[len(made.history_rows) - len(state.history) :]
    return LoggedFeatures(
        feature_signature=SIGNATURE,
        bundle_version=bundle_version,
        as_of_time_ms=now_ms,
        state_revision=state.revision,
        state_offsets=[
            SourceOffset(source=source, partition=partition, offset=offset)
            for (source, partition), offset in sorted(state.offsets.items())
        ],
        user=numbers.user.tobytes(),
        history_weights=numbers.history_weights.tobytes(),
        history_ages=numbers.history_ages.tobytes(),
        history_digests=catalog.digests(history_rows),
        candidate_count=len(item_ids),
        item_ids=item_ids,
        candidates=numbers.candidates.tobytes(),
        item_digests=catalog.digests(made.candidate_rows),
        stats_revisions=catalog.stats_revisions(made.candidate_rows),
    )


def numbers_of(made: RankerInput, history_count: int) -> LoggedNumbers:
    """The numbers in what the model reads, without the padding."""
    start = len(made.history_rows) - history_count
    return LoggedNumbers(made.user, made.history_weights[start:], made.history_ages[start:], made.candidates)


def keep(features: LoggedFeatures, places: Sequence[int]) -> None:
    """Leaves the items at these places, in this order."""
    numbers, count = features.candidates, len(features.item_ids)
    width = len(numbers) // max(1, count)
    features.candidates = b"".join(numbers[width * place : width * (place + 1)] for place in places)
    # As lists: a field is slow to index.
    item_ids, digests = list(features.item_ids), list(features.item_digests)
    revisions = list(features.stats_revisions)
    for name in ("item_ids", "item_digests", "stats_revisions"):
        features.ClearField(name)
    features.item_ids.extend([item_ids[place] for place in places])
    features.item_digests.extend([digests[place] for place in places])
    features.stats_revisions.extend([revisions[place] for place in places])


def item_bytes(features: LoggedFeatures, place: int) -> int:
    """About how many bytes an item takes."""
    own = len(features.item_ids[place]) + len(features.stats_revisions[place])
    return own + _NUMBER_BYTES * (len(CANDIDATE_FEATURES) + 1) + 8


def read_numbers(features: LoggedFeatures) -> LoggedNumbers:
    """The numbers of a logged message.

    Raises:
        MalformedEventError: arrays of lengths that do not fit each other, or of another signature.
    """
    if features.feature_signature != SIGNATURE:
        raise MalformedEventError(
            "features", f"of signature {features.feature_signature!r}, this version makes {SIGNATURE!r}"
        )
    history, items = len(features.history_digests), len(features.item_ids)
    if not items == len(features.item_digests) == len(features.stats_revisions):
        raise MalformedEventError("features", "items, their digests and their revisions differ in number")
    return LoggedNumbers(
        _floats("user", features.user, len(USER_FEATURES)),
        _floats("history_weights", features.history_weights, history),
        _floats("history_ages", features.history_ages, history),
        _floats("candidates", features.candidates, items * len(CANDIDATE_FEATURES)).reshape(
            items, len(CANDIDATE_FEATURES)
        ),
    )


def differing(logged: LoggedNumbers, rebuilt: LoggedNumbers) -> list[str]:
    """Names of the features that differ in any bit, each once, in order; a NaN equals itself."""
    user = zip(USER_FEATURES, _same(logged.user, rebuilt.user), strict=True)
    names = [f"user.{name}" for name, same in user if not same]
    for name in ("history_weights", "history_ages"):
        one, other = getattr(logged, name), getattr(rebuilt, name)
        if len(one) != len(other) or not all(_same(one, other)):
            names.append(name)
    columns = zip(CANDIDATE_FEATURES, logged.candidates.T, rebuilt.candidates.T, strict=True)
    return names + [name for name, one, other in columns if not all(_same(one, other))]


def _floats(name: str, raw: bytes, count: int) -> Floats:
    if len(raw) != _NUMBER_BYTES * count:
        raise MalformedEventError(f"features.{name}", f"{len(raw)} bytes are not {count} numbers")
    return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)


def _same(one: Floats, other: Floats) -> list[bool]:
    bits = [np.ascontiguousarray(values).view(np.uint32) for values in (one, other)]
    equal: npt.NDArray[np.bool_] = np.equal(*bits)
    return list(equal)
