"""Editorial rules: pin, boost, bury, quota, and fixed lists for the rung RULES.

Read from the editors' file or the bundle's RULES, checked as a whole, applied by the re-ranker and the ladder.
Invariant: a rules file with one mistake is refused with the place of the mistake; a rule never brings back an item that
a filter removed.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.errors import ArtifactError
from serving.rerank.quotas import Bound

Floats64 = npt.NDArray[np.float64]
# A category -> which candidates have it. [C]
MembersOf = Callable[[str], npt.NDArray[np.bool_]]


class _Rule(BaseModel):
    """Where a rule holds; empty = everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    surface: str = ""
    segment: str = ""

    def holds(self, surface: str, segment: str) -> bool:
        return self.surface in ("", surface) and self.segment in ("", segment)


class Pin(_Rule):
    """An item at a fixed position."""

    item_id: str
    position: Annotated[int, Field(ge=0, lt=500)]


class Shift(_Rule):
    """Moves the score (which lies in 0..1) of an item or a category up or down."""

    item_id: str = ""
    category: str = ""
    amount: Annotated[float, Field(gt=0, le=1)] = 0.2

    @model_validator(mode="after")
    def _names_one(self) -> "Shift":
        if bool(self.item_id) == bool(self.category):
            raise ValueError("give either item_id or category")
        return self


class Quota(_Rule):
    """At most, or at least, so many items of a category among the first places."""

    category: Annotated[str, Field(min_length=1)]
    within: Annotated[int, Field(gt=0, le=100)]
    at_least: Annotated[int, Field(ge=0)] = 0
    at_most: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Quota":
        most = self.within if self.at_most is None else self.at_most
        if self.at_most is None and not self.at_least:
            raise ValueError("give at_least, at_most or both")
        if self.at_least > min(most, self.within):
            raise ValueError("at_least is more than at_most, or than there are places")
        return self


class FixedList(_Rule):
    """What to show when nothing better can be made."""

    item_ids: Annotated[tuple[str, ...], Field(min_length=1)]


class Rules(_Rule):
    """All rules of a release."""

    pin: tuple[Pin, ...] = ()
    boost: tuple[Shift, ...] = ()
    bury: tuple[Shift, ...] = ()
    quota: tuple[Quota, ...] = ()
    lists: tuple[FixedList, ...] = ()

    @classmethod
    def parse(cls, raw: Any) -> "Rules":
        """Raises ArtifactError naming the first mistake."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ArtifactError(f"rules: {where}: {first['msg']}; correct it and release again") from error

    def pins(self, surface: str, segment: str) -> list[Pin]:
        """Those that hold, by position; of two for one item or one position the first counts."""
        chosen: dict[int, Pin] = {}
        items: set[str] = set()
        for pin in self.pin:
            if pin.holds(surface, segment) and pin.position not in chosen and pin.item_id not in items:
                chosen[pin.position] = pin
                items.add(pin.item_id)
        return [chosen[position] for position in sorted(chosen)]

    def bounds(self, surface: str, segment: str, members_of: MembersOf) -> list[Bound]:
        """The quotas that hold. `members_of` gives the candidates of a category."""
        return [
            Bound(
                members_of(quota.category),
                quota.at_least,
                quota.within if quota.at_most is None else quota.at_most,
                quota.within,
            )
            for quota in self.quota
            if quota.holds(surface, segment)
        ]

    def fixed_list(self, surface: str, segment: str) -> tuple[str, ...]:
        """The list that fits best: by surface and segment, then by either, then for everywhere."""
        fitting = [entry for entry in self.lists if entry.holds(surface, segment)]
        best = max(fitting, key=lambda entry: (bool(entry.surface), bool(entry.segment)), default=None)
        return best.item_ids if best is not None else ()

    def shifts(
        self, surface: str, segment: str, ids: Callable[[], Sequence[str]], members_of: MembersOf
    ) -> Floats64 | None:
        """What boost and bury add to the score of each item; None where no such rule holds. Shape [C]."""
        signed = [(rule, rule.amount) for rule in self.boost if rule.holds(surface, segment)]
        signed += [(rule, -rule.amount) for rule in self.bury if rule.holds(surface, segment)]
        if not signed:
            return None
        item_ids = ids()
        added = np.zeros(len(item_ids), np.float64)
        index_of = {item_id: index for index, item_id in enumerate(item_ids)}
        for rule, amount in signed:
            if rule.category:
                added[members_of(rule.category)] += amount
            elif rule.item_id in index_of:
                added[index_of[rule.item_id]] += amount
        return added


def place_pins(order: npt.NDArray[np.intp], pins: Sequence[tuple[int, int]]) -> npt.NDArray[np.intp]:
    """The order with some entries put at fixed positions.

    Args:
        order: indices, best first. [C]
        pins: (index, position), by rising position. A position past the end means the end.
    """
    pinned = {index for index, _ in pins}
    placed = [int(index) for index in order if int(index) not in pinned]
    for index, position in pins:
        placed.insert(position, index)
    return np.array(placed, np.intp)
