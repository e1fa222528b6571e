"""What the last answers were made from, on this machine's disk, to make them again.

Beside the answer and never in its way: a bounded queue, a thread that writes, files that are dropped oldest first. Kept
as long as the process lives and there is room. Invariant: an erased user's answers are overwritten, not merely hidden;
a full queue or disk costs records, never an answer.
"""

import shutil
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError

from core.telemetry import get_logger
from headrace.v1.answer_record_pb2 import AnswerRecord
from serving import metrics

_log = get_logger("answers")
_QUEUE_MAX = 1000
# The thread looks so often: one that is woken by each answer takes the interpreter from it just then.
_PAUSE_SECONDS = 0.1
# So many files share the room; the oldest goes when the newest is full.
_FILES = 8
_FOLDER = "answers"
# A request that was under way when its user was erased is long over when so many others were.
_ERASED_MAX = 10_000


class _Place(NamedTuple):
    file: int
    offset: int
    length: int
    user_id: str


class AnswerLog:
    """Records by recommendation_id.

    Args:
        folder: where the files go; None = nothing is kept.
        max_mb: room for all files together; 0 = nothing is kept.
    """

    def __init__(self, folder: Path | None, max_mb: int) -> None:
        self._folder = folder / _FOLDER if folder is not None and max_mb > 0 else None
        self._file_bytes = max_mb * 1024 * 1024 // _FILES
        self._queue: deque[Callable[[], AnswerRecord]] = deque()
        self._closing = threading.Event()
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._erased: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._newest, self._size = 0, 0
        self._thread = threading.Thread(target=self._run, name="answer-log", daemon=True)
        if self._folder is not None:
            # Of an earlier process: it heard of no erasure since.
            shutil.rmtree(self._folder, ignore_errors=True)
            self._thread.start()

    @property
    def is_kept(self) -> bool:
        return self._folder is not None

    def keep(self, make_record: Callable[[], AnswerRecord]) -> None:
        """Queues a record, which the thread makes; returns at once, and wakes nobody: the answer's own way goes on."""
        if len(self._queue) < _QUEUE_MAX:
            self._queue.append(make_record)
        else:
            metrics.answers_not_kept.inc()

    def find(self, recommendation_id: str) -> AnswerRecord | None:
        """The record of an answer; None where it is not kept (any more)."""
        # What is still queued is written first.
        self._write_queued()
        with self._lock:
            place = self._places.get(recommendation_id)
            if place is None:
                return None
            try:
                with self._path(place.file).open("rb") as file:
                    file.seek(place.offset)
                    return AnswerRecord.FromString(file.read(place.length))
            except (OSError, DecodeError) as error:
                _log.warning("a record cannot be read", problem=str(error))
                return None

    def forget(self, user_ids: Iterable[str]) -> None:
        """These users were erased: their records are overwritten, and none is kept again."""
        names = frozenset(user_ids)
        with self._lock:
            self._erased.update(dict.fromkeys(names))
            while len(self._erased) > _ERASED_MAX:
                self._erased.popitem(last=False)
            for recommendation_id, place in list(self._places.items()):
                if place.user_id in names:
                    del self._places[recommendation_id]
                    self._overwrite(place)

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._closing.wait(_PAUSE_SECONDS):
            self._write_queued()
        self._write_queued()

    def _write_queued(self) -> None:
        with self._lock:
            while self._queue:
                make_record = self._queue.popleft()
                try:
                    self._write(make_record())
                except Exception as error:  # noqa: BLE001 - one answer's record must not cost those of all others
                    metrics.answers_not_kept.inc()
                    _log.warning("a record is not kept", problem=repr(error))

    def _write(self, record: AnswerRecord) -> None:
        if record.request.user_id not in self._erased:
            content = record.SerializeToString()
            if self._size + len(content) > self._file_bytes and self._size:
                self._begin_file()
            path = self._path(self._newest)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                offset = file.tell()
                file.write(content)
            place = _Place(self._newest, offset, len(content), record.request.user_id)
            self._places[record.response.recommendation_id] = place
            self._size = offset + len(content)

    def _begin_file(self) -> None:
        self._newest, self._size = self._newest + 1, 0
        oldest = self._newest - _FILES + 1
        self._path(oldest - 1).unlink(missing_ok=True)
        while self._places and next(iter(self._places.values())).file < oldest:
            self._places.popitem(last=False)

    def _overwrite(self, place: _Place) -> None:
        try:
            with self._path(place.file).open("r+b") as file:
                file.seek(place.offset)
                file.write(bytes(place.length))
        except OSError as error:
            _log.error("a record of an erased user cannot be overwritten", problem=str(error))

    def _path(self, number: int) -> Path:
        assert self._folder is not None  # noqa: S101 - no thread and no place without it
        return self._folder / f"{number:08}.bin"
