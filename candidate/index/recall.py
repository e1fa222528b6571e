"""Recall of the index against exact search, on searches that users make: measured beside them, told as a metric.

A thread of the candidate service. Takes one search at a time, so it costs one exact search an interval and nothing
waits for it. Invariant: both searches of a comparison see one state of the index; an index that turns out to find too
little is asked to tune itself by what users really ask.
"""

import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from candidate.index.exact import Floats
from candidate.index.item_index import ItemIndex, Sample
from candidate.index.reach import RECALL_QUERIES
from core.telemetry import get_logger

_log = get_logger("candidate")
# The mean is of so many searches, and is acted on when there are this many.
_KEPT, _ENOUGH = 200, RECALL_QUERIES // 2
# Below this the index is tuned again: it was tuned for more.
LOW_RECALL = 0.975


class RecallMonitor:
    """Watches the index that serves, whichever that is."""

    def __init__(
        self, serving: Callable[[], ItemIndex], tell: Callable[[float], None], interval_seconds: float = 1.0
    ) -> None:
        self._serving, self._tell, self._interval_seconds = serving, tell, interval_seconds
        self._index: ItemIndex | None = None
        self._sample: Sample | None = None
        self._recalls: deque[float] = deque(maxlen=_KEPT)
        self._asked: deque[Floats] = deque(maxlen=RECALL_QUERIES)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="index-recall", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5)
        if self._index is not None:
            self._index.listener = None

    def measure_one(self) -> float | None:
        """Compares the search that was taken last; None where there was none since. Returns the mean so far."""
        index = self._serving()
        if index is not self._index:
            self._begin(index)
        sample, self._sample = self._sample, None
        if sample is None:
            return None
        recall = index.recall_of(sample)
        self._recalls.append(recall)
        self._asked.append(sample.query)
        mean = float(np.mean(self._recalls))
        self._tell(mean)
        is_low = len(self._recalls) >= _ENOUGH and mean < LOW_RECALL
        if is_low:
            _log.warning("the index finds too little and is tuned again", recall=round(mean, 4), kind=index.info.kind)
            self._recalls.clear()
        index.ask_for_recall(self._asked, is_low=is_low)
        return mean

    def _begin(self, index: ItemIndex) -> None:
        if self._index is not None:
            self._index.listener = None
        self._index, self._sample = index, None
        # Vectors of other towers would be other questions.
        self._recalls.clear()
        self._asked.clear()
        index.listener = self._offer

    def _offer(self, sample: Sample) -> None:
        """Takes a search where none is waiting."""
        if self._sample is None:
            self._sample = sample

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_seconds):
            try:
                self.measure_one()
            except Exception as error:  # noqa: BLE001 - a watch that fails must not end
                _log.error("the recall of the index could not be measured", error=repr(error))
