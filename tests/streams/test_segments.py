"""Each stretch of the log lands once, whoever is killed or comes late."""

import os
import shutil
from itertools import pairwise
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from core.clock import ManualClock
from core.codec import from_ms
from core.errors import StageError
from core.settings import load_settings
from core.topics import Topics
from features.stores import event_rows
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, Source
from headrace.v1.events_pb2 import Event
from streams.segments import Segments, SegmentTakenError, Stretch
from streams.sink import EventLogSink
from tests.conftest import wait_until

NOW_MS = 1_700_000_000_000
STRETCH = Stretch(EVENTS, source=0xABC, partition=2)


def rows(first: int, last: int, step_ms: int = 1):
    numbers = range(first, last + 1)
    events = [
        Event(event_id=f"e{n}", user_id="u", item_id="i", kind="click", event_time=from_ms(NOW_MS + n * step_ms))
        for n in numbers
    ]
    return event_rows.to_table(EVENTS, events, [Source("t", 2, n, NOW_MS) for n in numbers])


def offsets(root) -> list[int]:
    log = EventLog(str(root))
    return sorted(n for path in log.files(EVENTS) for n in read_offsets(path))


def read_offsets(path) -> list[int]:
    return pq.read_table(path, columns=["offset"], partitioning=None)["offset"].to_pylist()


def test_stretches_follow_each_other(tmp_path) -> None:
    segments = Segments(str(tmp_path))
    assert segments.position(STRETCH) == -1
    bounds = [0, 10, 25, 26, 60, 61]
    for first, end in pairwise(bounds):
        segments.commit(STRETCH, first, end - 1, rows(first, end - 1))
        assert segments.position(STRETCH) == end - 1
    assert offsets(tmp_path) == list(range(61))
    assert Segments(str(tmp_path)).position(STRETCH) == 60
    assert len(list(tmp_path.rglob("_commits/*/*/*"))) <= 4


def test_an_object_store_gets_each_stretch_once_too() -> None:
    root = "memory://test-segments/log"
    try:
        segments = Segments(root)
        for first, end in pairwise([0, 10, 25, 26]):
            segments.commit(STRETCH, first, end - 1, rows(first, end - 1))
        late = Segments(root)
        with pytest.raises(SegmentTakenError):
            late.commit(STRETCH, 10, 40, rows(10, 40))
        assert late.position(STRETCH) == 25
        log = EventLog(root)
        assert sorted(log.rows(EVENTS, columns=["offset"])["offset"].to_pylist()) == list(range(26))
        assert not [path for path in fsspec.filesystem("memory").find("/test-segments") if "_staging" in path]
    finally:
        fsspec.filesystem("memory").rm("/test-segments", recursive=True)


def test_a_stretch_of_malformed_messages_alone_moves_the_position(tmp_path) -> None:
    segments = Segments(str(tmp_path))
    segments.commit(STRETCH, 0, 9, rows(0, -1))
    assert segments.position(STRETCH) == 9
    assert offsets(tmp_path) == []


@pytest.mark.parametrize("keep", [1, 99], ids=["record-still-there", "record-cleaned-away"])
def test_a_late_writer_adds_nothing(tmp_path, keep) -> None:
    quick, late = Segments(str(tmp_path)), Segments(str(tmp_path))
    for first in range(0, 10 * keep, 10):
        quick.commit(STRETCH, first, first + 9, rows(first, first + 9))
    with pytest.raises(SegmentTakenError):
        late.commit(STRETCH, 0, 14, rows(0, 14))
    assert offsets(tmp_path) == list(range(10 * keep))
    assert late.position(STRETCH) == 10 * keep - 1
    assert not list((tmp_path / "_staging").iterdir())


def test_rows_of_a_writer_killed_before_its_record_are_never_seen(tmp_path, monkeypatch) -> None:
    segments = Segments(str(tmp_path))
    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(Killed):
        segments.commit(STRETCH, 0, 9, rows(0, 9))
    monkeypatch.undo()
    assert offsets(tmp_path) == []
    after = Segments(str(tmp_path))
    assert after.position(STRETCH) == -1
    after.commit(STRETCH, 0, 19, rows(0, 19))
    assert offsets(tmp_path) == list(range(20))


def test_the_next_writer_finishes_what_was_committed(tmp_path, monkeypatch) -> None:
    day_ms = 86_400_000
    segments = Segments(str(tmp_path))
    moved = []

    def killed_at_the_second(self, source, target, **options):
        if moved:
            raise Killed
        moved.append(target)
        shutil.move(source, target)

    monkeypatch.setattr(type(segments._files), "mv", killed_at_the_second)
    with pytest.raises(Killed):
        segments.commit(STRETCH, 0, 4, rows(0, 4, step_ms=day_ms))
    monkeypatch.undo()
    assert len(offsets(tmp_path)) == 1
    assert Segments(str(tmp_path)).position(STRETCH) == 4
    assert offsets(tmp_path) == list(range(5))


def staged(root) -> int:
    return len(list((root / "_staging").iterdir()))


def test_what_killed_writers_left_is_swept_when_no_commit_can_need_it_any_more(tmp_path, monkeypatch) -> None:
    clock = ManualClock(NOW_MS)
    segments = Segments(str(tmp_path), clock)
    other = Stretch(EVENTS, source=0xABC, partition=3)
    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(Killed):
        segments.commit(STRETCH, 0, 9, rows(0, 9))
    monkeypatch.undo()
    monkeypatch.setattr(type(segments._files), "mv", killed)
    with pytest.raises(Killed):
        segments.commit(other, 0, 4, rows(0, 4))
    monkeypatch.undo()
    clock.advance(3_600_000)
    assert Segments(str(tmp_path), clock).sweep() == 0
    clock.advance(24 * 3_600_000)
    assert Segments(str(tmp_path), clock).sweep() == 1
    assert staged(tmp_path) == 1, "a record names the other"
    assert Segments(str(tmp_path), clock).position(other) == 4
    assert offsets(tmp_path) == list(range(5))


def test_the_sink_sweeps_when_it_starts(tmp_path) -> None:
    left = tmp_path / "_staging" / f"{NOW_MS:013d}-abc" / "events" / "date=2023-11-14"
    left.mkdir(parents=True)
    (left / "part.parquet").write_bytes(b"rows")
    streams = load_settings().streams.model_copy(update={"event_log_path": str(tmp_path)})
    sink = EventLogSink(streams, Topics())
    sink.start()
    wait_until(lambda: not staged(tmp_path))
    sink.stop()


def test_a_failed_commit_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    segments = Segments(str(tmp_path))

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(StageError, match="No space left"):
        segments.commit(STRETCH, 0, 9, rows(0, 9))
    monkeypatch.undo()
    assert staged(tmp_path) == 0
    segments.commit(STRETCH, 0, 9, rows(0, 9))
    assert offsets(tmp_path) == list(range(10))


def test_a_writer_that_stood_still_for_a_day_commits_nothing_that_may_be_swept(tmp_path, monkeypatch) -> None:
    clock = ManualClock(NOW_MS)
    segments = Segments(str(tmp_path), clock)
    write = EventLog.write

    def frozen(self, *arguments, **options):
        written = write(self, *arguments, **options)
        clock.advance(24 * 3_600_000)
        return written

    monkeypatch.setattr(EventLog, "write", frozen)
    with pytest.raises(StageError, match="stood still"):
        segments.commit(STRETCH, 0, 9, rows(0, 9))
    assert segments.position(STRETCH) == -1


def test_a_folder_that_cannot_be_written_is_a_stage_error(tmp_path) -> None:
    (tmp_path / "_commits").write_text("a file where a folder should be")
    segments = Segments(str(tmp_path))
    with pytest.raises(StageError, match="is it writable"):
        segments.commit(STRETCH, 0, 9, rows(0, 9))
    assert offsets(tmp_path) == []


def test_other_logs_of_the_same_topic_do_not_collide(tmp_path) -> None:
    """The embedded broker begins at 0 with each start."""
    segments, other = Segments(str(tmp_path)), Stretch(EVENTS, source=0xDEF, partition=2)
    segments.commit(STRETCH, 0, 9, rows(0, 9))
    segments.commit(other, 0, 9, rows(0, 9))
    assert len(offsets(tmp_path)) == 20


class Killed(BaseException):
    """As kill -9: nothing after it runs."""


def killed(*arguments, **options):
    raise Killed
