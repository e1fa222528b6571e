"""What a request leaves behind: one span and one report for each stage."""

from contextlib import contextmanager

import numpy as np
import pytest

from core.clock import ManualClock
from serving import trace as module
from serving.trace import Removed, Trace


class Recorder:
    """A tracer that keeps what it was told."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, dict]] = []

    @contextmanager
    def start_as_current_span(self, name):
        recorder = self

        class Span:
            def set_attributes(self, values) -> None:
                recorder.spans.append((name, dict(values)))

        yield Span()


def test_a_stage_has_a_span_with_what_it_kept_and_removed(monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(module, "_tracer", recorder)
    clock = ManualClock()
    trace = Trace(clock)
    with trace.stage("filter") as report:
        clock.advance(3)
        report.note(5, [Removed("seen", np.array([1, 2], np.int32))])
    with pytest.raises(RuntimeError), trace.stage("rank"):
        raise RuntimeError("cut off")
    assert recorder.spans == [
        ("serving.filter", {"kept": 5, "removed": 2}),
        ("serving.rank", {"kept": 0, "removed": 0}),
    ]
    assert [(timing.stage, timing.kept_count) for timing in trace.timings()] == [("filter", 5), ("rank", 0)]
    assert trace.stages[0].elapsed_ms == pytest.approx(3)
