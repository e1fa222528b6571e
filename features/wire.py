"""Parts of protobuf messages put together by hand, at half the cost of messages: rows are made by the thousand.

Used by the encodings of states, item statistics and positions. Invariant: what comes out is protobuf's own wire format
(protobuf.dev/programming-guides/encoding), read back by the generated classes.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache

from core.codec import varint

_DOUBLE = struct.Struct("<Bd")
_LENGTH_DELIMITED = 2


def tag(field: int) -> bytes:
    """What an entry of a repeated message field begins with. Fields 1 to 15."""
    return bytes((field << 3 | _LENGTH_DELIMITED,))


def entry(beginning: bytes, head: bytes, total: float) -> tuple[bytes, bytes, bytes, bytes]:
    """A message of a repeated field that ends with a double, its field 3."""
    tail = _DOUBLE.pack(0x19, total)
    return beginning, varint(len(head) + len(tail)), head, tail


@lru_cache(maxsize=1024)
def name(text: str) -> bytes:
    """A string, as field 1."""
    raw = text.encode()
    return b"\x0a" + varint(len(raw)) + raw


def packed_varints(numbers: Sequence[int]) -> bytes:
    """Integers of 0 and more, as a packed field holds them."""
    return bytes(numbers) if max(numbers, default=0) < 0x80 else b"".join(map(varint, numbers))


def packed_doubles(numbers: Sequence[float]) -> bytes:
    """Doubles, as a packed field holds them."""
    return struct.pack(f"<{len(numbers)}d", *numbers)
