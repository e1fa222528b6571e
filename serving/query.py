"""The values that pass between the stages of a request: the question, the user, the candidates, the order.

Made by one stage, read by the next. Invariant: all arrays of one value run over the same candidates, which are rows of
the query's own release; nothing of one release's rows is looked up in another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from core.settings import OnSurface
from features.catalog import Floats, Rows
from features.vectors import SOURCES
from features.windows import UserState
from headrace.v1 import types_pb2 as types
from headrace.v1.events_pb2 import Event, User
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.types_pb2 import FeatureStatus, ServingTier
from serving.budget import Budget
from serving.release import Release
from serving.trace import Removed, Trace

Tier: TypeAlias = "ServingTier.ValueType"
Status: TypeAlias = "FeatureStatus.ValueType"
SOURCE_BIT = {name: 1 << bit for bit, name in enumerate(SOURCES)}


def places_of(rows: Rows, among: Rows) -> npt.NDArray[np.intp]:
    """Where each row stands among some others, -1 = nowhere. Shape [n]. Quicker than numpy.isin for a request's few."""
    if not len(among):
        return np.full(len(rows), -1, np.intp)
    order = np.argsort(among, kind="stable")
    at = order[np.minimum(np.searchsorted(among, rows, sorter=order), len(among) - 1)]
    return np.where(among[at] == rows, at, -1)


@dataclass(frozen=True, slots=True)
class Page:
    """Where the paging of a request stands. The first page has shown nothing and has no snapshot."""

    # On the pages before, in the order shown.
    shown_item_ids: tuple[str, ...] = ()
    # The first page's candidates that were not shown yet; None: the candidates are to be retrieved.
    snapshot: "Candidates | None" = None

    @property
    def offset(self) -> int:
        """Position of the page's first item."""
        return len(self.shown_item_ids)


FIRST_PAGE = Page()


@dataclass(frozen=True, slots=True)
class Query:
    """One validated request with what it is answered from."""

    request: RecommendRequest
    recommendation_id: str
    num_items: int
    now_ms: int
    release: Release
    budget: Budget
    trace: Trace
    # How many candidates to retrieve and rank.
    num_candidates: int
    # The settings of the request's surface.
    on: OnSurface
    # Explain: the item asked about.
    probe_item_id: str = ""
    page: Page = FIRST_PAGE

    @property
    def user_id(self) -> str:
        return self.request.user_id

    @property
    def surface(self) -> str:
        return self.request.context.surface


@dataclass(frozen=True, slots=True)
class UserFeatures:
    """What is known of the user, the request's own session events included."""

    user_id: str
    state: UserState = field(default_factory=UserState)
    # The state, encoded, for the other services.
    state_bytes: bytes = b""
    vector: Sequence[float] = ()
    embedding_version: str = ""
    embedding_revision: int = 0
    batch_item_ids: Sequence[str] = ()
    batch_scores: Sequence[float] = ()
    profile: User | None = None
    segment: str = ""
    # What the request brought and the state includes, with their items' categories.
    session_events: Sequence[Event] = ()
    # Of the state row: missing, stale or present. Unspecified = the store could not be asked.
    status: Status = types.FEATURE_STATUS_UNSPECIFIED

    @property
    def is_known(self) -> bool:
        """Whether there is anything to make a personal answer from."""
        return bool(self.state.history or self.batch_item_ids or self.profile is not None)


@dataclass(frozen=True, slots=True)
class Candidates:
    """C items that may be recommended."""

    # Catalogue rows, distinct. [C]
    rows: Rows
    # Score of the best source, as the ranker reads it. [C]
    retrieval: Floats
    # Agreement of the sources (see stages.retrieve), comparable within a request; 0 = from no source. [C]
    fused: Floats
    # Offline score, 0 = none. [C]
    batch: Floats
    # Bit i: features.vectors.SOURCES[i] proposed it. [C]
    source_bits: Rows
    # The ranker's score to order by, once it has answered. [C]
    ranked: Floats | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of_rows(cls, rows: Rows, source_bits: int = 0) -> "Candidates":
        zeros = np.zeros(len(rows), np.float32)
        return cls(rows, zeros, zeros, zeros, np.full(len(rows), source_bits, np.int32))

    def take(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> "Candidates":
        return Candidates(
            self.rows[index],
            self.retrieval[index],
            self.fused[index],
            self.batch[index],
            self.source_bits[index],
            None if self.ranked is None else self.ranked[index],
        )

    def tail(self, start: int) -> "Candidates":
        """Those from index `start` on."""
        return self.take(np.arange(start, len(self), dtype=np.intp))

    def with_more(self, more: "Candidates") -> "Candidates":
        """Both, these first; only before ranking."""
        return Candidates(
            np.concatenate((self.rows, more.rows)),
            np.concatenate((self.retrieval, more.retrieval)),
            np.concatenate((self.fused, more.fused)),
            np.concatenate((self.batch, more.batch)),
            np.concatenate((self.source_bits, more.source_bits)),
        )

    def with_ranked(self, scores: Floats) -> "Candidates":
        return replace(self, ranked=scores)


class Staged(NamedTuple):
    """What a stage lets through, and what it does not, by reason."""

    kept: Candidates
    removed: tuple[Removed, ...] = ()


class Signals(NamedTuple):
    """Signals of the moment, which nobody can look up later."""

    # How much more an item is liked now than usually. [C]
    trending: Floats
    # How tired the user is of each item, 0..1; None = of none. [C]
    fatigue: Floats | None = None


class RankInputs(NamedTuple):
    """What the re-ranker makes an order of: candidates by item_id, and the signals."""

    candidates: Candidates
    signals: Signals


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates in their final order, best first, and where each score comes from."""

    candidates: Candidates
    # [C]
    scores: npt.NDArray[np.float64]
    tier: Tier
    # Probability of each place to have gone to this item; 1 where nothing was drawn. [C]
    propensities: npt.NDArray[np.float64]
    # Names of the parts of a score, and their values, adding up to `scores`. [P], [P, C]
    parts: tuple[str, ...] = ()
    contributions: npt.NDArray[np.float64] | None = None
    # Rows that a rule put where they are.
    pinned: frozenset[int] = frozenset()
    # What it was made of; None for a list of the ladder.
    inputs: RankInputs | None = None
