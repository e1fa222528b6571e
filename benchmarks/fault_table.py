"""The cases of the fault matrix, and what an answer may say in each of them.

Pure data and its reading. Invariant: an answer that is poorer than on a good day carries a reason that fits the fault,
and while a dependency is certainly away every answer that would have needed it says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.fault_stack import DEPENDENCIES, FAULTS

# Any answer may be made without exploration, from few candidates or in a hurry; these reasons blame nobody.
_NEUTRAL = frozenset({"few_candidates", "deadline_short"})
_POPULAR = frozenset({"LAST_GOOD", "RULES", "POPULAR_SEGMENT", "POPULAR"})
_STORE = frozenset({"store_unavailable", "store_timeout"})
_RETRIEVAL = frozenset({"retrieval_unavailable", "retrieval_timeout"})
_RANKER = frozenset({"ranker_unavailable", "ranker_timeout"})
_BREAKER = frozenset({"breaker_open"})
_SEEN = frozenset({"seen_unknown"})
# Faults under which a dependency does not answer at all.
_AWAY = frozenset({"down", "hanging", "slow"})


@dataclass(frozen=True)
class Case:
    """One line of the matrix."""

    name: str
    # (dependency, fault) made together.
    faults: tuple[tuple[str, str], ...]
    # Tier -> reasons of which an answer of that tier carries at least one (empty set = needs none).
    tiers: Mapping[str, frozenset[str]]
    # Reasons that an answer may carry.
    reasons: frozenset[str]
    # Whether, while the fault lasts, each answer must carry one of `blame`.
    certain: bool = False
    blame: frozenset[str] = frozenset()
    # What must come back: "ranked" answers, or "fresh" state in them.
    recovery: str = "ranked"
    # The front door itself is killed and started while all is down.
    cold_start: bool = False

    @property
    def dependencies(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.faults)

    def objection(self, tier: str, reasons: frozenset[str], *, during: bool) -> str | None:
        """Why an answer does not fit the case; None where it does. `during`: the fault was certainly on."""
        if not reasons and tier == "RANKED" and not (during and self.certain):
            return None
        if tier not in self.tiers:
            return f"tier {tier}"
        if strange := reasons - self.reasons - _NEUTRAL:
            return f"{tier} for {', '.join(sorted(strange))}"
        wanted = self.tiers[tier]
        if wanted and not reasons & wanted:
            return f"{tier} without one of {', '.join(sorted(wanted))}"
        if during and self.certain and not reasons & self.blame:
            return f"{tier} without naming the fault"
        return None


def _case(dependency: str, fault: str) -> Case:
    name, faults, away = f"{dependency}-{fault}", ((dependency, fault),), fault in _AWAY
    nothing: frozenset[str] = frozenset()
    if dependency == "candidate":
        # Batch scores still make candidates for the ranker.
        tiers = {"RANKED": nothing, "RERANKED_BATCH": _RETRIEVAL, **dict.fromkeys(_POPULAR, _RETRIEVAL)}
        return Case(name, faults, tiers, _RETRIEVAL | _BREAKER, certain=away, blame=_RETRIEVAL)
    if dependency == "ranker":
        tiers = {"RANKED": nothing, "RERANKED_BATCH": _RANKER}
        return Case(name, faults, tiers, _RANKER | _BREAKER, certain=away, blame=_RANKER)
    if dependency == "redis":
        # Without the user's row there is nobody to rank for.
        tiers = {"RANKED": nothing, **dict.fromkeys(_POPULAR, _STORE)}
        return Case(name, faults, tiers, _STORE | _BREAKER | _SEEN, certain=away, blame=_STORE)
    # Kafka and the stream make state, not answers: only freshness is lost.
    return Case(name, faults, {"RANKED": nothing}, nothing, recovery="fresh")


def _everything(name: str, *, cold_start: bool) -> Case:
    faults = tuple((dependency, "down") for dependency in DEPENDENCIES)
    # What comes back first makes the better rungs again, one after the other.
    tiers = {"RANKED": _RETRIEVAL, "RERANKED_BATCH": _RANKER, **dict.fromkeys(_POPULAR, _STORE)}
    if cold_start:
        del tiers["LAST_GOOD"]
    reasons = _STORE | _BREAKER | _SEEN | _RETRIEVAL | _RANKER
    return Case(name, faults, tiers, reasons, certain=True, blame=_STORE, recovery="both", cold_start=cold_start)


CASES: tuple[Case, ...] = (
    *(_case(dependency, fault) for dependency in DEPENDENCIES for fault in FAULTS),
    _everything("everything-down", cold_start=False),
    _everything("cold-start-everything-down", cold_start=True),
)
