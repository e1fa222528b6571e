"""The time of one request, split over its stages.

Made at the door from the caller's deadline; every stage asks for its own part. Invariant: no stage's deadline is later
than the request's own less what the stages after it need, and `margin` is left for the encoding and the network.
"""

from core.deadline import Deadline
from core.settings import StageBudgets

# A caller in a greater hurry than this must not open the breakers for the others.
_FAIR_SCALE = 0.25
_SHORT_SCALE = 0.9
# Share of the rank's time that the stages before it may take when they are late: without a user or candidates there is
# nothing to rank, and a model that is well needs a tenth of its time.
_LOAN = 0.5
# An answer from the ladder, its encoding and the network take as long for a caller in a hurry as for others; but of a
# very short deadline they get no more than this share.
_WAY_BACK_MS, _WAY_BACK_SHARE = 10.0, 0.25
_STAGES = ("hydrate", "retrieve", "rank", "rerank", "margin")


class Budget:
    """Points in time at which the stages of one request end.

    A deadline shorter than the nominal budgets together scales them all. Time that a stage leaves over goes to those
    after it.

    Args:
        deadline: of the whole answer.
        nominal: the split, as of an undisturbed request.
    """

    def __init__(self, deadline: Deadline, nominal: StageBudgets) -> None:
        self.deadline = deadline
        self._nominal = nominal
        self._total_ms = nominal.total()
        self._start = deadline.clock.monotonic()
        self._given_ms = deadline.remaining_ms()

    @property
    def scale(self) -> float:
        """The time given, as a share of the nominal time."""
        return self._given_ms / self._total_ms

    def stage(self, name: str) -> Deadline:
        """The deadline of a stage that starts now.

        The later of the point at which the stage was to end, and its share of what is left: a stage is not starved
        because one before it (a wait for a token) took long. Hydrate and retrieve share their time, and may borrow
        from the rank's.
        """
        index = _STAGES.index(name)
        last = "retrieve" if name == "hydrate" else name
        until_ms = sum(self._of(stage) for stage in _STAGES[: _STAGES.index(last) + 1])
        if last == "retrieve":
            until_ms += _LOAN * self._of("rank")
        until_ms *= self.scale
        left_ms = self.deadline.remaining_ms()
        share_ms = left_ms * self._of(name) / sum(self._of(stage) for stage in _STAGES[index:])
        now = self.deadline.clock.monotonic()
        end = max(self._start + until_ms / 1000, now + share_ms / 1000)
        return Deadline(min(end, self.deadline.at), self.deadline.clock)

    def waiting(self) -> Deadline:
        """How long the request may wait for the stream to come up to a token: half of what is left."""
        return self.deadline.capped_ms(max(self.deadline.remaining_ms() / 2, 0.0))

    @property
    def last_call(self) -> Deadline:
        """When to stop waiting for any stage: each has its end before, but on a full machine none is told in time."""
        way_back_ms = min(_WAY_BACK_MS, _WAY_BACK_SHARE * self._given_ms)
        return self.deadline.minus_ms(max(self._of("margin") * self.scale / 2, way_back_ms))

    @property
    def is_short(self) -> bool:
        """Whether the caller gave notably less than the nominal time."""
        return self.scale < _SHORT_SCALE

    @property
    def is_fair(self) -> bool:
        """Whether the time given is enough that missing it says something about a dependency, not the caller."""
        return self.scale >= _FAIR_SCALE

    def _of(self, name: str) -> float:
        return float(getattr(self._nominal, name))
