"""What a log says of items that go together, for the bundle: the candidate service goes on from there.

A step of `train`, over the same entries as the statistics. Invariant: learnt by the very code that learns from the
stream, and said to include the positions that the log has, so that no event counts twice.
"""

from candidate.co_visitation import IMPORTED, CoVisitation
from core.settings import Settings
from features.stores.erasures import UnerasedLog
from features.stores.event_rows import EVENTS, FEEDBACK
from features.stores.log_positions import positions
from features.windows import UserEvent
from offline.rebuild import placed_entries

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
