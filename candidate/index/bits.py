"""Sets of rows as packed bits: the form in which FAISS takes a filter, and an eighth of a mask's memory.

Below the whole index. Invariant: pure; sets of one capacity have one length, a multiple of eight bytes.
"""

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


def none_of(capacity: int) -> Bits:
    """The empty set of rows below `capacity`."""
    return np.zeros(-(-capacity // 64) * 8, np.uint8)


def pack(mask: Bools, capacity: int) -> Bits:
    """The rows at which a mask is true; those beyond its end are not in."""
    bits = none_of(capacity)
    packed = np.packbits(mask[:capacity], bitorder="little")
    bits[: len(packed)] = packed
    return bits


def count(bits: Bits) -> int:
    return int(np.bitwise_count(bits.view(np.uint64)).sum())


def members(bits: Bits) -> Rows:
    """The rows, ascending. [n]."""
    return np.flatnonzero(np.unpackbits(bits, bitorder="little"))


def having(bits: Bits, rows: Rows) -> Bools:
    """Whether each row is in."""
    found: Bools = (bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
    return found


def adding(bits: Bits, rows: Rows) -> Bits:
    """A copy with some rows more."""
    changed = bits.copy()
    np.bitwise_or.at(changed, rows >> 3, _bit(rows))
    return changed


def without(bits: Bits, rows: Rows) -> Bits:
    """A copy with some rows less."""
    changed = bits.copy()
    np.bitwise_and.at(changed, rows >> 3, ~_bit(rows))
    return changed


def grown(bits: Bits, capacity: int) -> Bits:
    """The same set with room for more."""
    larger = none_of(capacity)
    larger[: len(bits)] = bits
    return larger


def _bit(rows: Rows) -> Bits:
    return np.left_shift(np.uint8(1), (rows & 7).astype(np.uint8))
