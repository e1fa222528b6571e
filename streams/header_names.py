"""Header names that are not UTF-8: Kafka lets them pass, Faust's client stops at them for good; here it does not.

Installed once by app.py. Where a fetch holds such a name it is read again by the client's own reader in Python, with a
replacement character for what is no text. Invariant: keys, values, offsets and all readable headers are as they were.
"""

from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy

_MAGIC_WITH_HEADERS = 2


class _Text(bytearray):
    """Bytes whose slices decode, whatever they are."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _Text(found) if isinstance(at, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, errors)


class _Batch(_DefaultRecordBatchPy):  # type: ignore[misc]
    """One batch of records."""

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _Text(self._buffer)  # type: ignore[has-type]


class _Records(_MemoryRecordsPy):  # type: ignore[misc]
    """All batches of a fetch."""

    def next_batch(self) -> Any:
        batch = self._next_slice
        if batch is None or batch[self.MAGIC_OFFSET] < _MAGIC_WITH_HEADERS:
            return super().next_batch()
        self._cache_next()
        return _Batch(batch)


def read_records(data: bytes) -> Any:
    """The records of a fetch, as the client wants them."""
    try:
        _read_through(MemoryRecords(data))
    except UnicodeDecodeError:
        return _Records(data)
    except Exception:  # noqa: BLE001, S110 - what else is wrong the client finds out itself, and knows what to do
        pass
    return MemoryRecords(data)


def install() -> None:
    """From now on every client in this process reads such names."""
    fetcher.MemoryRecords = read_records


def _read_through(records: Any) -> None:
    while records.has_next():
        for _ in records.next_batch():
            pass
