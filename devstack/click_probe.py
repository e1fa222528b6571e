"""How long from a produced click to a changed answer: the figure that the system is built for.

Used by the demo and by benchmarks. A click counts as changed when the first answer whose `state_revision` includes
it orders the *other* items differently from the answer to the same request just before. Exploration is off, and
impressions are not logged: asking again and again would move the statistics that the answers are made of.
Invariant: the time runs from before the produce call to after the answer has arrived; nothing is subtracted.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from core.errors import StageError
from devstack.backend import Backend, EventSender
from headrace.v1.recommender_service_pb2 import Recommendation, RecommendResponse

# A click that is not reflected by then is counted as lost, not waited for.
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Click:
    """One click: the answers around it and the time between."""

    user_id: str
    item: Recommendation
    before: RecommendResponse
    after: RecommendResponse
    elapsed_ms: float
    changed: bool


@dataclass
class ClickReport:
    """What a series of clicks did."""

    clicks: list[Click] = field(default_factory=list)
    # Answers that differed although nobody clicked: the noise floor of `changed`.
    changed_without_click: int = 0
    never_reflected: int = 0

    @property
    def changed_ms(self) -> list[float]:
        return [click.elapsed_ms for click in self.clicks if click.changed]


def order_without(answer: RecommendResponse, item_id: str) -> list[str]:
    return [item.item_id for item in answer.items if item.item_id != item_id]


def differs(before: RecommendResponse, after: RecommendResponse, item_id: str) -> bool:
    """Whether the order of the other items changed, over as many places as both answers have."""
    left, right = order_without(before, item_id), order_without(after, item_id)
    places = min(len(left), len(right)) - 1  # the clicked item may have left, and another come in at the end
    return left[:places] != right[:places]


def click_once(
    backend: Backend, sender: EventSender, user_id: str, position: int, categories_of: Callable[[str], Iterable[str]]
) -> tuple[Click | None, bool]:
    """One click on what the user is shown.

    Returns:
        The click (None where it was never reflected) and whether two answers before it differed by themselves.
    """
    first = backend.recommend(user_id, dry_run=True)
    before = backend.recommend(user_id, dry_run=True)
    if first is None or before is None or not before.items:
        raise StageError("serving", f"no answer for {user_id} before its click")
    restless = differs(first, before, "")
    item = before.items[min(position, len(before.items) - 1)]
    begin = time.perf_counter()
    sender.click(user_id, item.item_id, categories_of(item.item_id))
    while time.perf_counter() - begin < PATIENCE_SECONDS:
        after = backend.recommend(user_id, dry_run=True)
        elapsed_ms = (time.perf_counter() - begin) * 1000
        if after is not None and after.state_revision > before.state_revision:
            changed = differs(before, after, item.item_id)
            return Click(user_id, item, before, after, elapsed_ms, changed), restless
    return None, restless


def click_series(
    backend: Backend,
    sender: EventSender,
    user_ids: Iterable[str],
    categories_of: Callable[[str], Iterable[str]],
    on_click: Callable[[], None] = lambda: None,
) -> ClickReport:
    """One click for each user, at places 0 to 9 in turn."""
    report = ClickReport()
    for number, user_id in enumerate(user_ids):
        click, restless = click_once(backend, sender, user_id, number % 10, categories_of)
        report.changed_without_click += restless
        if click is None:
            report.never_reflected += 1
        else:
            report.clicks.append(click)
        on_click()
    return report
