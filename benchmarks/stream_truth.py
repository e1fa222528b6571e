"""What the stream must have come to: one pass over the log, and a comparison with what is stored.

Pure: messages and rows in, states and differences out. The crash test reads both from Kafka, Redis and Parquet.
Invariant: the pass uses `features` and `core.codec` alone, nothing of `streams`; floats are equal within 1e-9
relative, everything else exactly.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isclose
from typing import NamedTuple

from core import codec
from core.settings import FeaturesSettings
from core.topics import Topics
from features import item_stats, windows
from features.item_stats import ItemPartial
from features.windows import Outcome, Position, UserState
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList

REL_TOLERANCE = 1e-9
# A sum that should be nothing: what adding up and taking away leaves.
_ABS_TOLERANCE = 1e-12


class Place(NamedTuple):
    """A source position."""

    topic: str
    partition: int
    offset: int


class Logged(NamedTuple):
    """A message as it lies in the log."""

    place: Place
    key: bytes | None
    value: bytes | None
    headers: codec.Headers


@dataclass
class SinglePass:
    """States and statistics after one undisturbed pass.

    Args:
        settings: what is kept, and what it weighs.
        topics: names of the topics.
        sources: identity of each topic.
        is_malformed: the sender's word for what cannot be processed; nothing is guessed from the reader's code.
    """

    settings: FeaturesSettings
    topics: Topics
    sources: Mapping[str, int]
    is_malformed: Callable[[Logged], bool]
    states: dict[str, UserState] = field(default_factory=lambda: defaultdict(UserState))
    # By item and source partition.
    partials: dict[tuple[str, int], ItemPartial] = field(default_factory=lambda: defaultdict(ItemPartial))
    valid: set[Place] = field(default_factory=set)
    malformed: dict[Place, Logged] = field(default_factory=dict)

    def add(self, logged: Logged) -> None:
        """Takes the next message; those of one topic-partition come in order."""
        if self.is_malformed(logged):
            self.malformed[logged.place] = logged
            return
        self.valid.add(logged.place)
        place = logged.place
        position = Position(self.sources[place.topic], place.partition, place.offset)
        if place.topic == self.topics.impressions:
            shown = codec.decode(ImpressionList(), logged.value, logged.headers)
            event = windows.as_impression_event(shown, position)
            items = [impression.item_id for impression in shown.impressions]
        else:
            message: Event | Feedback = Event() if place.topic == self.topics.events else Feedback()
            event = windows.as_user_event(codec.decode(message, logged.value, logged.headers), position)
            items = [event.item_id]
        (outcome,) = windows.apply(self.states[event.user_id], (event,), self.settings)
        if outcome is Outcome.APPLIED:
            for item_id in items:
                partial = self.partials[item_id, place.partition]
                item_stats.apply(partial, event._replace(item_id=item_id), self.settings)


def state_differences(stored: UserState, expected: UserState) -> list[str]:
    """Names of the fields that differ."""
    exact = ("revision", "watermark_ms", "first_event_time_ms", "offsets", "history", "horizon", "known")
    counts = ("duplicate_count", "outside_horizon_count")
    differences = [name for name in exact + counts if getattr(stored, name) != getattr(expected, name)]
    if not _close(stored.dwell_seconds, expected.dwell_seconds):
        differences.append("dwell_seconds")
    if not _same_kinds(stored.kinds, expected.kinds):
        differences.append("kinds")
    if [landmark for landmark, _ in stored.affinity] != [landmark for landmark, _ in expected.affinity] or not all(
        _same_sums(ours, theirs)
        for (_, ours), (_, theirs) in zip(stored.affinity, expected.affinity, strict=False)
    ):  # fmt: skip
        differences.append("affinity")
    return differences


def partial_differences(stored: ItemPartial, expected: ItemPartial) -> list[str]:
    """Names of the fields that differ."""
    exact = ("revision", "watermark_ms", "offsets")
    differences = [name for name in exact if getattr(stored, name) != getattr(expected, name)]
    if not _same_kinds(stored.kinds, expected.kinds):
        differences.append("kinds")
    if len(stored.popularity) != len(expected.popularity) or not all(
        landmark == other and _close(total, other_total)
        for (landmark, total), (other, other_total) in zip(stored.popularity, expected.popularity, strict=False)
    ):
        differences.append("popularity")
    if stored.segments.keys() != expected.segments.keys() or not all(
        landmark == expected.segments[name][0] and _close(total, expected.segments[name][1])
        for name, (landmark, total) in stored.segments.items()
    ):
        differences.append("segments")
    return differences


class LogDifferences(NamedTuple):
    """Source positions of the event log against those of Kafka."""

    missing: int
    # Rows too many, by whichever position.
    doubled: int
    # Positions of malformed messages, or of none.
    foreign: int


def log_differences(rows: Iterable[Place], expected: set[Place]) -> LogDifferences:
    found = Counter(rows)
    return LogDifferences(
        len(expected - found.keys()),
        sum(count - 1 for count in found.values()),
        len(found.keys() - expected),
    )


def letter_differences(letters: Mapping[Place, tuple[bytes, bytes]], expected: Mapping[Place, Logged]) -> int:
    """Dead letters (key and value by source position) that are missing, too many, or not the original bytes."""
    wrong = letters.keys() ^ expected.keys()
    for place in letters.keys() & expected.keys():
        original = expected[place]
        if letters[place] != (original.key or b"", original.value or b""):
            wrong.add(place)
    return len(wrong)


def _same_kinds(ours: Mapping[str, tuple[int, float]], theirs: Mapping[str, tuple[int, float]]) -> bool:
    return ours.keys() == theirs.keys() and all(
        count == theirs[kind][0] and _close(total, theirs[kind][1]) for kind, (count, total) in ours.items()
    )


def _same_sums(ours: Mapping[int, float], theirs: Mapping[int, float]) -> bool:
    return ours.keys() == theirs.keys() and all(_close(total, theirs[bucket]) for bucket, total in ours.items())


def _close(ours: float, theirs: float) -> bool:
    return isclose(ours, theirs, rel_tol=REL_TOLERANCE, abs_tol=_ABS_TOLERANCE)
