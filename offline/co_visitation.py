"""What a log says of items that go together: for the bundle, where the candidate service goes on, and for training.

`learn_co_visitation` is a step of `train`, `PairsTimeline` gives the ranker's questions the pairs of their time.
Invariant: learnt by the very code that learns from the stream; the bundle's are said to include the positions that the
log has, so that no event counts twice.
"""

from collections.abc import Sequence

from candidate.co_visitation import IMPORTED, CoVisitation
from core.settings import Settings
from features.stores.erasures import UnerasedLog
from features.stores.event_rows import EVENTS, FEEDBACK
from features.stores.log_positions import positions
from features.windows import UserEvent
from offline.rebuild import placed_entries
from offline.replay import Entry

# What is older than so many half-lives weighs less than a thousandth, and is not looked at.
_HALF_LIVES = 10


def learn_co_visitation(
    log: UnerasedLog, settings: Settings, watermark_ms: int, before_ms: int | None = None
) -> CoVisitation:
    """Pairs of a log as of its newest event.

    Args:
        log: the event log.
        settings: `candidate.co_visitation`, and `features` for what an event weighs.
        watermark_ms: time of the newest event.
        before_ms: only events before this time (the positions are the log's all the same: it is meant for evaluation).
    """
    own = settings.candidate.co_visitation
    pairs = CoVisitation(own, settings.features)
    start_ms = watermark_ms - _HALF_LIVES * own.half_life_seconds * 1000
    for entry, where in placed_entries(log, before_ms):
        if isinstance(entry, UserEvent) and entry.time_ms >= start_ms:
            pairs.apply((entry,), where or IMPORTED)
    pairs.included = {where: last for table in (EVENTS, FEEDBACK) for where, last in positions(log, table).items()}
    return pairs


class PairsTimeline:
    """The pairs of a log as of any time, for questions in order of time.

    Args:
        entries: the log in event-time order.
        settings: of candidates and features.
    """

    def __init__(self, entries: Sequence[Entry], settings: Settings) -> None:
        own = settings.candidate.co_visitation
        self._entries, self._at = entries, 0
        self._span_ms = _HALF_LIVES * own.half_life_seconds * 1000
        self._pairs = CoVisitation(own, settings.features)

    def before(self, time_ms: int) -> CoVisitation:
        """Pairs of what happened before `time_ms`, which must not go back."""
        entries, start_ms = self._entries, time_ms - self._span_ms
        while self._at < len(entries) and entries[self._at].time_ms < time_ms:
            entry = entries[self._at]
            if isinstance(entry, UserEvent) and entry.time_ms >= start_ms:
                self._pairs.apply((entry,))
            self._at += 1
        return self._pairs
