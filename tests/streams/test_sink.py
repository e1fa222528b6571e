"""What the event log's buffers do when rows are large, or cannot be written."""

import threading

import pytest

from core.codec import from_ms
from core.settings import load_settings
from core.topics import Topics
from features.stores import event_rows
from features.stores.event_log import EventLog
from headrace.v1.events_pb2 import Event
from streams import sink
from streams.processor import RawMessage
from streams.sink import EventLogSink

NOW_MS = 1_700_000_000_000
TOPIC = Topics().events
GOING_ON = threading.Event()


@pytest.fixture
def start_sink(tmp_path):
    sinks = []

    def start(**settings) -> EventLogSink:
        streams = load_settings().streams
        values = {"event_log_path": str(tmp_path / "log"), "event_log_interval_ms": 600_000, **settings}
        sinks.append(EventLogSink(streams.model_copy(update=values), Topics()))
        sinks[-1].start()
        sinks[-1].open(TOPIC, 7, 0)
        return sinks[-1]

    yield start
    for started in sinks:
        started.stop()


def row(offset: int, size: int = 0):
    event = Event(event_id=f"e{offset}", user_id="u", item_id="i", kind="click", event_time=from_ms(NOW_MS))
    event.tags["note"] = "x" * size
    return event, RawMessage(TOPIC, 0, offset, b"u", event.SerializeToString(), None, NOW_MS)


def test_a_few_large_rows_are_written_before_they_fill_the_memory(start_sink, monkeypatch) -> None:
    monkeypatch.setattr(sink, "_BUFFERED_BYTES", 3_000_000)
    started = start_sink()
    for offset in range(10):
        started.add(TOPIC, 0, offset, [row(offset, 900_000)], GOING_ON)
    # Far below the count and the time that a file waits for.
    assert started.written(TOPIC, 0) >= 3


def test_a_reader_that_stops_does_not_wait_for_a_log_that_is_full(start_sink, monkeypatch) -> None:
    def fail(*_):
        raise OverflowError("never")

    monkeypatch.setattr(event_rows, "to_table", fail)
    monkeypatch.setattr(sink, "_RETRY_SECONDS", 0.01)
    started = start_sink(event_log_max_events=1)
    stopping = threading.Event()
    for offset in range(4):
        assert started.add(TOPIC, 0, offset, [row(offset)], stopping)
    threading.Timer(0.1, stopping.set).start()
    assert not started.add(TOPIC, 0, 4, [row(4)], stopping)
    monkeypatch.undo()


def test_what_cannot_be_written_is_tried_again_and_ends_no_thread(start_sink, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sink, "_RETRY_SECONDS", 0.01)
    tried, to_table, broken = threading.Event(), event_rows.to_table, True

    def fail_at_first(*arguments):
        if broken:
            tried.set()
            raise OverflowError("too large to convert")
        return to_table(*arguments)

    monkeypatch.setattr(event_rows, "to_table", fail_at_first)
    started = start_sink(event_log_interval_ms=1)
    started.add(TOPIC, 0, 0, [row(0)], GOING_ON)
    assert tried.wait(10)
    broken = False
    started.add(TOPIC, 0, 1, [row(1)], GOING_ON)
    started.stop()
    assert EventLog(tmp_path / "log").events()["event_id"].to_pylist() == ["e0", "e1"]
    assert started.written(TOPIC, 0) == 1
