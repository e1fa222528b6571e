"""Messages of the topics to rows of the event log and back.

The sink, the importers and training all go through here. Each table's Arrow schema is derived from its message in
protos/headrace/v1/events.proto, so a new proto field is a new column at once. Invariant: message -> row -> message is
the identity, field presence included (absent = null), times to the millisecond (the resolution of the whole system).
That holds for fields that this version does not know, too: a message that has any is kept whole beside its columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import pyarrow as pa
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from core.codec import from_ms, to_ms
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList, Item, User

TIME = pa.timestamp("ms", tz="UTC")
_CHUNK_ROWS = 200
_NOTHING: list[Any] = []
_TIMESTAMP = Timestamp.DESCRIPTOR.full_name
_SCALARS = {
    FieldDescriptor.TYPE_STRING: pa.string(),
    FieldDescriptor.TYPE_DOUBLE: pa.float64(),
    FieldDescriptor.TYPE_FLOAT: pa.float32(),
    FieldDescriptor.TYPE_INT32: pa.int32(),
    FieldDescriptor.TYPE_INT64: pa.int64(),
    FieldDescriptor.TYPE_BOOL: pa.bool_(),
    FieldDescriptor.TYPE_BYTES: pa.binary(),
}
# Columns that repeat themselves: read as dictionaries, which a million rows need.
_REPETITIVE = frozenset(
    [
        "user_id",
        "item_id",
        "kind",
        "surface",
        "device",
        "session_id",
        "segment",
        "topic",
        "served_tier",
        "experiment_arm",
        "bundle_version",
        "model_version",
        "index_version",
    ]
)


class Source(NamedTuple):
    """Where the broker had a message. All absent for rows that were imported."""

    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    ingest_time_ms: int | None = None


_SOURCE_COLUMNS = [
    pa.field("topic", pa.string()),
    pa.field("partition", pa.int32()),
    pa.field("offset", pa.int64()),
    pa.field("ingest_time", TIME),
]
# The message's bytes where it came from a later version, with fields that no column holds; else null.
WHOLE = pa.field("whole_message", pa.binary())


@dataclass(frozen=True)
class LogTable:
    """One table of the log: its folder, its message, and the field that its rows are known by."""

    name: str
    message: type[Message]
    key: str
    # Events have a time and lie in one folder per date; items and users are states, the newest row of a key holds.
    by_date: bool = True
    _fields: dict[str, FieldDescriptor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_fields", dict(self.message.DESCRIPTOR.fields_by_name))

    @property
    def fields(self) -> dict[str, FieldDescriptor]:
        return self._fields

    @cached_property
    def schema(self) -> pa.Schema:
        """All fields of the message, `deleted` (items and users: a tombstone), WHOLE, then where the row came from."""
        columns = [pa.field(name, _arrow_type(f), nullable=_nullable(f)) for name, f in self._fields.items()]
        if not self.by_date:
            columns.append(pa.field("deleted", pa.bool_(), nullable=False))
        return pa.schema([*columns, WHOLE, *_SOURCE_COLUMNS])

    @cached_property
    def nested(self) -> tuple[str, ...]:
        """Fields that hold messages of ours, which may come from a later version themselves."""
        return tuple(
            name
            for name, f in self._fields.items()
            if f.message_type is not None
            and not f.message_type.GetOptions().map_entry
            and f.message_type.full_name != _TIMESTAMP
        )

    @cached_property
    def read_schema(self) -> pa.Schema:
        """The schema as read: repetitive text as dictionaries, and everything nullable (older files lack columns)."""
        return pa.schema(
            pa.field(f.name, pa.dictionary(pa.int32(), pa.string()) if f.name in _REPETITIVE else f.type)
            for f in self.schema
        )


EVENTS = LogTable("events", Event, "event_id")
FEEDBACK = LogTable("feedback", Feedback, "event_id")
IMPRESSIONS = LogTable("impressions", ImpressionList, "event_id")
ITEMS = LogTable("items", Item, "item_id", by_date=False)
USERS = LogTable("users", User, "user_id", by_date=False)
LOG_TABLES = (EVENTS, FEEDBACK, IMPRESSIONS, ITEMS, USERS)


def to_table(table: LogTable, messages: Sequence[Message], sources: Sequence[Source] | None = None) -> pa.Table:
    """Rows of checked messages, in order.

    Args:
        table: the table they go to; each message is of its type.
        messages: n messages.
        sources: n places in the topics, or nothing for imported rows.
    """
    values: dict[str, list[Any]] = {name: [] for name in table.fields}
    whole: list[bytes | None] = []
    # A few at a time: column by column, each message would have left the processor's cache before its next field.
    for start in range(0, len(messages), _CHUNK_ROWS):
        chunk = messages[start : start + _CHUNK_ROWS]
        for name, f in table.fields.items():
            values[name] += _column(f, chunk)
        whole += _whole(table, chunk)
    columns = [pa.array(column, type=table.schema.field(name).type) for name, column in values.items()]
    return _with_sources(table, columns, whole, sources, deleted=False)


def deletions(table: LogTable, keys: Sequence[str], sources: Sequence[Source] | None = None) -> pa.Table:
    """Rows that take items or users away again (a tombstone of a compacted topic)."""
    empty = [table.message(**{table.key: key}) for key in keys]
    columns = [pa.array(_column(f, empty), type=table.schema.field(name).type) for name, f in table.fields.items()]
    return _with_sources(table, columns, [None] * len(keys), sources, deleted=True)


def from_table(table: LogTable, rows: pa.Table, batch_rows: int = 16_384) -> Iterator[Any]:
    """The messages of `rows`, in order. Columns that are not there leave their field at its default.

    With WHOLE among the columns, fields that the writer did not know are there, too.
    """
    names = [name for name in table.fields if name in rows.column_names]
    builders = [_value_reader(table.fields[name]) for name in names]
    has_whole = WHOLE.name in rows.column_names
    for batch in rows.select([*names, WHOLE.name] if has_whole else names).to_batches(max_chunksize=batch_rows):
        columns = [_plain(column) for column in batch.columns]
        whole = columns.pop() if has_whole else [None] * batch.num_rows
        for message, values in zip(whole, zip(*columns, strict=True), strict=True):
            if message is not None:
                yield table.message.FromString(message)
                continue
            yield table.message(
                **{
                    name: build(value)
                    for name, build, value in zip(names, builders, values, strict=True)
                    if value is not None
                }
            )


def from_columns(table: LogTable, columns: dict[str, Any]) -> pa.Table:
    """Rows from arrays, for writers that have columns at hand (loaders, simulator); unnamed columns get defaults."""
    rows = len(next(iter(columns.values())))
    arrays = [_as_array(columns[f.name], f.type) if f.name in columns else _defaults(f, rows) for f in table.schema]
    return pa.Table.from_arrays(arrays, schema=table.schema)


def _arrow_type(f: FieldDescriptor) -> pa.DataType:
    message = f.message_type
    if message is not None and message.GetOptions().map_entry:
        value = message.fields_by_name["value"]
        return pa.map_(_arrow_type(message.fields_by_name["key"]), _arrow_type(value))
    if message is None:
        element = _SCALARS[f.type]
    elif message.full_name == _TIMESTAMP:
        element = TIME
    else:
        element = pa.struct([pa.field(part.name, _arrow_type(part)) for part in message.fields])
    return pa.list_(element) if f.is_repeated else element


def _nullable(f: FieldDescriptor) -> bool:
    return not f.is_repeated and f.has_presence


def _column(f: FieldDescriptor, messages: Sequence[Message]) -> list[Any]:
    """One field of all messages, as what pyarrow takes."""
    name, convert = f.name, _value_writer(f)
    values = list(map(attrgetter(name), messages))
    if convert is not None:
        values = list(map(convert, values))
    if _nullable(f):
        present = [message.HasField(name) for message in messages]
        if not any(present):
            return [None] * len(values)
        return [value if there else None for there, value in zip(present, values, strict=True)]
    return values


def _whole(table: LogTable, messages: Sequence[Message]) -> list[bytes | None]:
    """The bytes of messages with unknown fields. Seldom are there any, so that is found out first, for all of them."""
    if not any(map(len, map(UnknownFieldSet, messages))) and not any(map(_is_later, _inner(table, messages))):
        return [None] * len(messages)
    return [
        message.SerializeToString() if _is_later(message) or any(map(_is_later, _inner(table, [message]))) else None
        for message in messages
    ]


def _is_later(message: Message) -> bool:
    """Whether a message has fields that this version does not know."""
    return len(UnknownFieldSet(message)) > 0


def _inner(table: LogTable, messages: Sequence[Message]) -> Iterator[Message]:
    for name in table.nested:
        for message in messages:
            yield from getattr(message, name)


def _value_writer(f: FieldDescriptor) -> Callable[[Any], Any] | None:
    message = f.message_type
    if message is None:
        return list if f.is_repeated else None
    if message.GetOptions().map_entry:
        inner = _value_writer(message.fields_by_name["value"])
        # Sorted, so that equal messages give equal files.
        return lambda value: (
            [(key, inner(value[key]) if inner else value[key]) for key in sorted(value)] if value else _NOTHING
        )
    if message.full_name == _TIMESTAMP:
        return to_ms
    parts = [(part.name, _value_writer(part)) for part in message.fields]

    def as_dict(value: Any) -> dict[str, Any]:
        return {name: inner(getattr(value, name)) if inner else getattr(value, name) for name, inner in parts}

    return (lambda value: [as_dict(element) for element in value]) if f.is_repeated else as_dict


def _value_reader(f: FieldDescriptor) -> Callable[[Any], Any]:
    message = f.message_type
    if message is None:
        return _same
    if message.GetOptions().map_entry:
        inner = _value_reader(message.fields_by_name["value"])
        return lambda value: {key: inner(element) for key, element in value}
    # A sub-message may be given to the constructor as a dict of its fields.
    return from_ms if message.full_name == _TIMESTAMP else _same


def _same(value: Any) -> Any:
    return value


def _plain(column: pa.Array) -> list[Any]:
    values: list[Any] = (column.cast(pa.int64()) if column.type == TIME else column).to_pylist()
    return values


def _with_sources(
    table: LogTable,
    columns: list[pa.Array],
    whole: Sequence[bytes | None],
    sources: Sequence[Source] | None,
    *,
    deleted: bool,
) -> pa.Table:
    rows = len(whole)
    if not table.by_date:
        columns.append(pa.array([deleted] * rows, type=pa.bool_()))
    columns.append(pa.array(whole, type=WHOLE.type))
    parts = zip(*sources, strict=True) if sources else ([None] * rows for _ in _SOURCE_COLUMNS)
    columns += [pa.array(list(part), type=f.type) for part, f in zip(parts, _SOURCE_COLUMNS, strict=True)]
    return pa.Table.from_arrays(columns, schema=table.schema)


def _as_array(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, type=kind)
    return array if array.type == kind else array.cast(kind)


def _defaults(f: pa.Field, rows: int) -> pa.Array:
    if f.nullable:
        return pa.nulls(rows, f.type)
    if pa.types.is_list(f.type) or pa.types.is_map(f.type):
        return pa.array([[]] * rows, type=f.type)
    empty = {pa.string(): "", pa.binary(): b""}
    return pa.repeat(pa.scalar(empty[f.type]) if f.type in empty else pa.scalar(0).cast(f.type), rows)
