"""Source positions that a row includes: newest offset by (source, partition), as bytes and back.

In the `offsets` column of every guarded row, in a partition's marker, and inside states and item statistics; `source`
is `core.topics.source_id`. Invariant: the bytes are those of headrace.v1.SourceOffsets, and equal positions give equal
bytes, so that rows can be compared and set by them.
"""

import struct
from collections.abc import Iterable
from functools import lru_cache

from core.codec import varint
from features import wire
from headrace.v1.events_pb2 import SourceOffset
from headrace.v1.store_pb2 import SourceOffsets

Offsets = dict[tuple[int, int], int]

# Field 1 of an entry, a fixed64.
_SOURCE = struct.Struct("<BQ")


def encode(offsets: Offsets, field: int = 1) -> bytes:
    """The repeated field of that number in a message; with 1, a whole SourceOffsets.

    Put together by hand, which costs less than messages do: each row of each batch has one or two.
    """
    beginning = wire.tag(field)
    parts: list[bytes] = []
    # Most rows are of one topic alone.
    entries = sorted(offsets.items()) if len(offsets) > 1 else offsets.items()
    for (source, partition), offset in entries:
        entry = _where(source, partition)
        # As protobuf does it: what is 0 is left out.
        if offset:
            entry += b"\x18" + varint(offset)
        parts += (beginning, bytes((len(entry),)), entry)
    return b"".join(parts)


@lru_cache(maxsize=4096)
def _where(source: int, partition: int) -> bytes:
    return _SOURCE.pack(0x09, source) + (b"\x10" + varint(partition) if partition else b"")


def decode(raw: bytes) -> Offsets:
    """The positions of `encode`; none of empty bytes."""
    return of_entries(SourceOffsets.FromString(raw).offsets) if raw else {}


def of_entries(entries: Iterable[SourceOffset]) -> Offsets:
    """The positions in a message that holds them."""
    return {(entry.source, entry.partition): entry.offset for entry in entries}
