"""What happened to one request: time per stage, what each stage removed and why, and what was degraded.

Every stage writes here; the answer, Explain and the metrics read. Invariant: an answer that is not what it would be
on a good day carries a reason from here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from google.protobuf.duration_pb2 import Duration

from core.clock import Clock
from core.errors import StageError, StageTimeoutError
from core.telemetry import tracer
from features.catalog import Floats, Rows
from headrace.v1 import types_pb2 as types
from headrace.v1.feature_log_pb2 import LoggedFeatures
from headrace.v1.types_pb2 import DegradedReason, StageTiming
from serving.breaker import BreakerOpenError

_tracer = tracer("serving")
Reason: TypeAlias = "DegradedReason.ValueType"
# dependency -> reason when it is away, reason when it is late
_REASONS: dict[str, tuple[Reason, Reason]] = {
    "redis": (types.DEGRADED_REASON_STORE_UNAVAILABLE, types.DEGRADED_REASON_STORE_TIMEOUT),
    "candidate": (types.DEGRADED_REASON_RETRIEVAL_UNAVAILABLE, types.DEGRADED_REASON_RETRIEVAL_TIMEOUT),
    "ranker": (types.DEGRADED_REASON_RANKER_UNAVAILABLE, types.DEGRADED_REASON_RANKER_TIMEOUT),
}


@dataclass(frozen=True, slots=True)
class Removed:
    """Candidates that a stage dropped for one reason. `ranks` and `scores` say where they stood, if it ordered them."""

    reason: str
    rows: Rows
    ranks: Rows | None = None
    scores: Floats | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """Where one candidate fell out."""

    stage: str
    reason: str
    rank: int | None = None
    score: float | None = None


@dataclass(slots=True)
class StageReport:
    """One stage of one request."""

    name: str
    elapsed_ms: float = 0.0
    kept_count: int = 0
    removed: tuple[Removed, ...] = ()

    @property
    def removed_count(self) -> int:
        return sum(len(part.rows) for part in self.removed)

    def note(self, kept_count: int, removed: Sequence[Removed] = ()) -> None:
        self.kept_count, self.removed = kept_count, tuple(removed)


@dataclass(slots=True)
class Trace:
    """The record of one request."""

    clock: Clock
    stages: list[StageReport] = field(default_factory=list)
    # What the candidate service says of the item that Explain asks about.
    probe: Drop | None = None
    # Versions that the other processes reported.
    model_version: str = ""
    index_version: str = ""
    embedding_version: str = ""
    bundle_versions: set[str] = field(default_factory=set)
    # What the ranker read, of an answer that logs it.
    features: LoggedFeatures | None = None
    # Rows that the ranker's network had no time for; its light scorer put them behind the others.
    cut: Rows = field(default_factory=lambda: np.empty(0, np.int32))
    _reasons: set[Reason] = field(default_factory=set)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageReport]:
        """Times a stage, in a span of its own, and keeps its report, also when it is cancelled."""
        report = StageReport(name)
        start = self.clock.monotonic()
        with _tracer.start_as_current_span(f"serving.{name}") as span:
            try:
                yield report
            finally:
                report.elapsed_ms = (self.clock.monotonic() - start) * 1000
                self.stages.append(report)
                span.set_attributes({"kept": report.kept_count, "removed": report.removed_count})

    def degrade(self, *reasons: Reason) -> None:
        self._reasons.update(reasons)

    def blame(self, error: StageError) -> None:
        """Notes the reasons of a dependency's failure."""
        away, late = _REASONS[error.dependency]
        self.degrade(late if isinstance(error, StageTimeoutError) else away)
        if isinstance(error, BreakerOpenError):
            self.degrade(types.DEGRADED_REASON_BREAKER_OPEN)

    @property
    def reasons(self) -> list[Reason]:
        return sorted(self._reasons)

    def timings(self) -> list[StageTiming]:
        return [
            StageTiming(
                stage=report.name,
                elapsed=Duration(seconds=int(report.elapsed_ms // 1000), nanos=int(report.elapsed_ms % 1000 * 1e6)),
                kept_count=report.kept_count,
                removed_count=report.removed_count,
            )
            for report in self.stages
        ]

    def drop_of(self, row: int) -> Drop | None:
        """The stage that dropped a catalogue row last, and why; None where no stage had it."""
        for report in reversed(self.stages):
            for part in report.removed:
                found = (part.rows == row).nonzero()[0]
                if len(found):
                    at = int(found[0])
                    rank = int(part.ranks[at]) if part.ranks is not None else None
                    score = float(part.scores[at]) if part.scores is not None else None
                    return Drop(report.name, part.reason, rank, score)
        return None
