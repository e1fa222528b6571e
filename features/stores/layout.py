"""Feast's Redis layout (entity key serialization version 3) without Feast: keys, fields, cells, timestamps.

Used by the thin reader and writer. Invariant: a row written here is read by the Feast SDK and the other way round;
tests/contract holds the two together, since the layout is Feast's own.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import mmh3
from google.protobuf.timestamp_pb2 import Timestamp

from core.codec import from_ms, to_ms, varint
from features.definitions import Column, ColumnType, View
from headrace.v1.store_pb2 import FeatureValue, FloatList, StringList

# feast.types.ValueType.STRING: every join key of ours is a string.
_STRING = struct.pack("<I", 2)
_BYTES, _INT64 = ColumnType.BYTES, ColumnType.INT64
_LENGTH = struct.Struct("<I")
Cell = bytes | str | int | float | Sequence[str] | Sequence[float]


@dataclass(frozen=True, slots=True)
class ViewLayout:
    """Where a view's cells lie inside its entity's hash."""

    view: View
    timestamp_field: bytes
    fields: Mapping[str, bytes]
    types: Mapping[str, ColumnType]

    @classmethod
    def of(cls, view: View) -> "ViewLayout":
        fields = {column.name: _field(view, column) for column in view.columns}
        types = {column.name: column.type for column in view.columns}
        return cls(view, f"_ts:{view.name}".encode(), fields, types)


def row_key(project: str, join_keys: Sequence[str], values: Sequence[str]) -> bytes:
    """The Redis key of an entity. Join keys are sorted by name, as Feast does."""
    head, order = _key_shape(tuple(join_keys))
    parts = [head]
    for index in order:
        raw = values[index].encode()
        parts += [_STRING, _LENGTH.pack(len(raw)), raw]
    return b"".join(parts) + project.encode()


@lru_cache
def _key_shape(join_keys: tuple[str, ...]) -> tuple[bytes, tuple[int, ...]]:
    """What all keys of these join keys begin with, and the order of their values."""
    order = tuple(sorted(range(len(join_keys)), key=join_keys.__getitem__))
    names = [join_keys[index].encode() for index in order]
    return _LENGTH.pack(len(names)) + b"".join(_STRING + _LENGTH.pack(len(name)) + name for name in names), order


def encode_cell(kind: ColumnType, value: Cell) -> bytes:
    """headrace.v1.FeatureValue with one value; what the stream writes by the thousand is put together by hand."""
    if kind is _BYTES and isinstance(value, bytes):
        return b"\x0a" + varint(len(value)) + value
    if kind is _INT64 and isinstance(value, int):
        return b"\x20" + varint(value)
    if kind is ColumnType.STRINGS:
        cell = FeatureValue(string_list_val=StringList(val=value))  # type: ignore[arg-type]
    elif kind is ColumnType.FLOATS:
        cell = FeatureValue(float_list_val=FloatList(val=value))  # type: ignore[arg-type]
    else:
        cell = FeatureValue(**{kind.value: value})  # type: ignore[arg-type]
    return cell.SerializeToString()


def decode_cell(kind: ColumnType, raw: bytes | None) -> Cell | None:
    """The cell's value; None where there is none."""
    if not raw:
        return None
    cell = FeatureValue.FromString(raw)
    if cell.WhichOneof("value") != kind.value:
        return None
    value = getattr(cell, kind.value)
    return list(value.val) if kind in (ColumnType.STRINGS, ColumnType.FLOATS) else value


def encode_time(time_ms: int) -> bytes:
    return from_ms(time_ms).SerializeToString()


def decode_time(raw: bytes | None) -> int | None:
    """Milliseconds since the epoch of a row's write; None where the row was never written."""
    if not raw:
        return None
    return to_ms(Timestamp.FromString(raw))


def _field(view: View, column: Column) -> bytes:
    return struct.pack("<I", mmh3.hash(f"{view.name}:{column.name}", signed=False))
