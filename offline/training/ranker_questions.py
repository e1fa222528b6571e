"""Questions and answers of a log: what a user was asked at a time, and what they did then.

First step of the ranker's training rows; offline/training/ranker_rows.py gives each question its candidates and
features. Invariant: a question stands at the time of the list or of its first event; only labels look ahead, one
session at most.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from core.settings import Settings
from features.windows import UserEvent
from offline.replay import Entry, Shown

_LEAST_STARS, _STARS_RANGE = 0.5, 4.5
_FULL_DWELL_SECONDS = 120.0
# Kinds that weigh this much are conversions (cart, purchase).
_CONVERSION_WEIGHT = 3.0


@dataclass(slots=True)
class Question:
    """What one user was asked at one time. Labels are 0..1, by item_id."""

    user_id: str
    time_ms: int
    # True: a list that was shown, in this order. False: events that no list led to.
    shown: bool
    # Every item that was shown or answered; more candidates that are drawn to it count as 0.
    click: dict[str, float] = field(default_factory=dict)
    conversion: dict[str, float] = field(default_factory=dict)
    # Rating or dwell, where there is one.
    value: dict[str, float] = field(default_factory=dict)

    def has_click(self) -> bool:
        return any(label > 0 for label in self.click.values())


def questions_of(entries: Iterable[Entry], settings: Settings) -> list[Question]:
    """The questions of a log, in event-time order.

    An event on an item that the user was asked about less than a session ago answers that question; another one, on
    an item that may still be recommended to this user, is a question of its own (one for all events of a moment).
    """
    asking = _Asking(settings)
    for entry in entries:
        if isinstance(entry, Shown):
            asking.show(entry)
        else:
            asking.happen(entry)
    return asking.questions


class _Asking:
    """The questions so far, and which of them an event answers."""

    def __init__(self, settings: Settings) -> None:
        self.questions: list[Question] = []
        self._features = settings.features
        self._window_ms = settings.features.session_gap_seconds * 1000
        self._excluding = frozenset(settings.serving.exclude_seen_kinds)
        # The newest question about an item, and the newest one that no list led to.
        self._about: dict[tuple[str, str], Question] = {}
        self._unasked: dict[str, Question] = {}
        self._seen: set[tuple[str, str]] = set()

    def show(self, shown: Shown) -> None:
        user_id = shown.event.user_id
        question = Question(user_id, shown.time_ms, shown=True, click=dict.fromkeys(shown.item_ids, 0.0))
        self.questions.append(question)
        for item_id in shown.item_ids:
            self._about[user_id, item_id] = question

    def happen(self, event: UserEvent) -> None:
        where = (event.user_id, event.item_id)
        question = self._about.get(where)
        if question is None or event.time_ms - question.time_ms > self._window_ms:
            question = None
            if where not in self._seen and event.kind in self._features.positive_kinds:
                question = self._about[where] = self._ask(event)
        if question is not None:
            self._answer(question, event)
        if event.kind in self._excluding:
            self._seen.add(where)

    def _ask(self, event: UserEvent) -> Question:
        question = self._unasked.get(event.user_id)
        if question is None or question.time_ms != event.time_ms:
            question = self._unasked[event.user_id] = Question(event.user_id, event.time_ms, shown=False)
            self.questions.append(question)
        return question

    def _answer(self, question: Question, event: UserEvent) -> None:
        item_id = event.item_id
        if event.kind in self._features.positive_kinds:
            # Choosing it is what retrieval and ranking foretell; how well it was liked is the value.
            question.click[item_id] = 1.0
            if self._features.kind_weights.get(event.kind, 0.0) >= _CONVERSION_WEIGHT:
                question.conversion[item_id] = 1.0
        if event.kind == "rating":
            question.value[item_id] = min(1.0, max(0.0, (event.value - _LEAST_STARS) / _STARS_RANGE))
        elif event.kind == "dwell":
            question.value[item_id] = min(1.0, max(0.0, event.value / _FULL_DWELL_SECONDS))
