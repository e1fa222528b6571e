"""The event log: loss-free rows, atomic files under given names, ordered reading with each event once."""

from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from core.codec import from_ms
from core.errors import ConfigError
from features.stores.event_log import EventLog, user_events
from features.stores.event_rows import (
    EVENTS,
    FEEDBACK,
    IMPRESSIONS,
    ITEMS,
    LOG_TABLES,
    USERS,
    WHOLE,
    LogTable,
    Source,
    deletions,
    from_columns,
    from_table,
    to_table,
)
from features.windows import as_user_event
from headrace.v1 import events_pb2
from headrace.v1.events_pb2 import Event, Feedback, Impression, ImpressionList, Item, User

DAY_MS = 86_400_000
T0 = 1_700_000_000_000 // DAY_MS * DAY_MS

_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: st.text(st.characters(codec="utf-8"), max_size=8),
    FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32, allow_nan=False),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=8),
}


def _values(f: FieldDescriptor) -> st.SearchStrategy[Any]:
    message = f.message_type
    if message is not None and message.GetOptions().map_entry:
        parts = message.fields_by_name
        return st.dictionaries(_values(parts["key"]), _values(parts["value"]), max_size=3)
    if message is None:
        one = _SCALARS[f.type]
    elif message.full_name == Timestamp.DESCRIPTOR.full_name:
        one = st.integers(-62_135_596_800_000, 253_402_300_799_999).map(from_ms)
    else:
        one = st.fixed_dictionaries({}, optional={part.name: _values(part) for part in message.fields})
    return st.lists(one, max_size=3) if f.is_repeated else one


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Any message of a type: each field absent or of any value."""
    fields = {f.name: _values(f) for f in kind.DESCRIPTOR.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


@pytest.mark.parametrize("table", LOG_TABLES, ids=lambda table: table.name)
@settings(max_examples=60)
@given(data=st.data())
def test_message_to_row_to_message_is_the_identity(table: LogTable, data: st.DataObject) -> None:
    written = data.draw(st.lists(messages(table.message), max_size=4))
    buffer = pa.BufferOutputStream()
    pq.write_table(to_table(table, written), buffer)
    assert list(from_table(table, pq.read_table(pa.BufferReader(buffer.getvalue())))) == written


def test_every_field_of_a_message_has_a_column() -> None:
    for table in LOG_TABLES:
        assert set(table.message.DESCRIPTOR.fields_by_name) <= set(table.schema.names)
        assert table.schema.names[-4:] == ["topic", "partition", "offset", "ingest_time"]


# Field 100 of a later version: the text `mood`.
LATER = b"\xa2\x06\x03new"


def in_a_later_version(table: LogTable) -> LogTable:
    """The table as a version has it that knows the field."""
    file, pool = descriptor_pb2.FileDescriptorProto(), descriptor_pool.DescriptorPool()
    events_pb2.DESCRIPTOR.CopyToProto(file)
    (message,) = (one for one in file.message_type if one.name == table.message.DESCRIPTOR.name)
    message.field.add(name="mood", number=100, label=message.field[0].label, type=FieldDescriptor.TYPE_STRING)
    for known in events_pb2.DESCRIPTOR.dependencies:
        pool.AddSerializedFile(known.serialized_pb)
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(table.message.DESCRIPTOR.full_name))
    return LogTable(table.name, kind, table.key, table.by_date)


@pytest.mark.parametrize("table", LOG_TABLES, ids=lambda table: table.name)
def test_fields_of_a_later_version_come_back_to_whoever_knows_them(table: LogTable, tmp_path: Path) -> None:
    known = table.message(**{table.key: "a"})
    later = table.message.FromString(known.SerializeToString() + LATER)
    log = EventLog(tmp_path)
    log.write(table, to_table(table, [known, later, known]), "p0-0-2")
    rows = log.read(table, log.files(table), table.read_schema.names)
    assert [message.SerializeToString() for message in from_table(table, rows)] == [
        message.SerializeToString() for message in (known, later, known)
    ]
    # What this version writes costs nothing.
    assert rows[WHOLE.name].null_count == 2

    newer = in_a_later_version(table)
    rows = log.read(newer, log.files(newer), newer.read_schema.names)
    assert [message.mood for message in from_table(newer, rows)] == ["", "new", ""]
    # What the later version writes, the earlier one reads.
    log.write(newer, to_table(newer, [newer.message(**{table.key: "b", "mood": "glad"})]), "p0-3-3")
    rows = log.read(table, log.files(table), table.read_schema.names)
    assert sorted(getattr(message, table.key) for message in from_table(table, rows)) == ["a", "a", "a", "b"]


def test_an_impression_of_a_later_version_is_kept_too() -> None:
    inner = Impression.FromString(Impression(item_id="i").SerializeToString() + LATER)
    later = ImpressionList(event_id="e", impressions=[inner])
    plain = ImpressionList(event_id="f", impressions=[Impression(item_id="i")])
    written = [later, plain]
    assert [one.SerializeToString() for one in from_table(IMPRESSIONS, to_table(IMPRESSIONS, written))] == [
        one.SerializeToString() for one in written
    ]


def event(number: int, time_ms: int = T0, **fields: Any) -> Event:
    values = {"user_id": "u", "item_id": f"i{number}", "kind": "click"} | fields
    return Event(event_id=f"e{number:03d}", event_time=from_ms(time_ms), **values)


def write(log: EventLog, events: list[Event], name: str = "p0-0-9") -> list[str]:
    return log.write(EVENTS, to_table(EVENTS, events), name)


def ids(rows: pa.Table) -> list[str]:
    return rows["event_id"].to_pylist()


def test_files_lie_by_date_under_the_given_name(tmp_path: Path) -> None:
    paths = write(EventLog(tmp_path), [event(1), event(2, T0 + DAY_MS), event(3, T0 + 5)])
    assert [path.removeprefix(f"{tmp_path}/") for path in paths] == [
        "events/date=2023-11-14/p0-0-9.parquet",
        "events/date=2023-11-15/p0-0-9.parquet",
    ]
    assert sorted(tmp_path.rglob("*.*")) == sorted(Path(path) for path in paths), "no unfinished file stays behind"


def test_events_come_in_time_order_with_ties_by_id(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    write(log, [event(3, T0 + 2), event(2, T0 + 1)], "b")
    write(log, [event(9, T0 + DAY_MS), event(1, T0 + 1)], "a")
    assert ids(log.events()) == ["e001", "e002", "e003", "e009"]


def test_the_same_batch_again_changes_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    first = write(log, [event(1), event(2)])
    content = [Path(path).read_bytes() for path in first]
    assert write(log, [event(1), event(2)]) == first
    assert [Path(path).read_bytes() for path in first] == content
    assert log.events().num_rows == 2


def test_an_event_in_two_files_is_read_once_and_the_same_id_of_another_user_stays(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    write(log, [event(1), event(2)], "p0-0-1")
    write(log, [event(2), event(3), event(1, T0 + 9), event(1, user_id="other")], "p0-1-3")
    rows = log.events(columns=["event_id", "user_id", "event_time"])
    assert sorted(zip(ids(rows), rows["user_id"].to_pylist(), strict=True)) == [
        ("e001", "other"),
        ("e001", "u"),
        ("e002", "u"),
        ("e003", "u"),
    ]
    assert max(rows["event_time"].cast(pa.int64()).to_pylist()) == T0, "of two copies the earliest stays"


def test_a_time_range_is_half_open_and_reads_by_day_or_month(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    rows = to_table(EVENTS, [event(n, T0 + n * DAY_MS) for n in range(60)])
    log.write(EVENTS, rows.slice(0, 30), "days")
    log.write(EVENTS, rows.slice(30), "months", by_month=True)
    assert {path.name for path in (tmp_path / "events").iterdir()} >= {"date=2023-11-14", "date=2024-01"}
    for first, last in ((0, 60), (3, 4), (28, 33), (55, 200)):
        got = log.events(T0 + first * DAY_MS, T0 + last * DAY_MS, columns=["event_id"])
        assert ids(got) == [f"e{n:03d}" for n in range(first, min(last, 60))]
        assert got.column_names == ["event_id"]


def test_replace_drops_the_files_of_the_last_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    write(log, [event(7)], "other")
    log.replace(EVENTS, [to_table(EVENTS, [event(1)]), to_table(EVENTS, [event(2, T0 + DAY_MS)])], "import-abc")
    log.replace(EVENTS, [to_table(EVENTS, [event(3, T0 + 3 * DAY_MS)])], "import-abc")
    assert ids(log.events()) == ["e007", "e003"]


def test_thin_history_lies_by_month(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.replace(EVENTS, [to_table(EVENTS, [event(n, T0 + n * DAY_MS) for n in range(90)])], "import-abc")
    assert len(list((tmp_path / "events").iterdir())) == 4
    assert log.events().num_rows == 90


def test_the_newest_version_of_an_item_holds_and_a_removed_one_is_gone(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    sources = [Source("headrace.items.v1", 0, offset, T0 + offset) for offset in range(3)]
    log.write(ITEMS, to_table(ITEMS, [Item(item_id=i, title="imported") for i in "abc"]), "z-import")
    log.write(
        ITEMS, to_table(ITEMS, [Item(item_id="b", title="old"), Item(item_id="b", title="new")], sources[:2]), "p0"
    )
    log.write(ITEMS, deletions(ITEMS, ["c"], sources[2:]), "p1")
    assert [(item.item_id, item.title) for item in log.items()] == [("a", "imported"), ("b", "new")]
    assert list(log.users()) == []


def test_messages_come_back_from_the_files(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    shown = ImpressionList(
        event_id="s",
        user_id="u",
        event_time=from_ms(T0),
        impressions=[Impression(item_id="a", position=0, propensity=0.5, sources=["ann"])],
        tags={"prices": "1|2"},
    )
    outcome = Feedback(
        event_id="f", user_id="u", item_id="a", kind="click", event_time=from_ms(T0), recommendation_id="s"
    )
    user = User(user_id="u", labels={"country": "SE"}, segment="x")
    for table, message in ((IMPRESSIONS, shown), (FEEDBACK, outcome), (USERS, user)):
        log.write(table, to_table(table, [message]), "n")
    assert (list(log.impressions()), list(log.feedback()), list(log.users())) == ([shown], [outcome], [user])


def test_user_events_are_what_the_state_sees_of_the_messages(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    written = [
        event(1, value=2.5, confidence=0.5, categories=["a", "b"]),
        event(2, categories=["a"]),
        event(3, user_id="v"),
        event(4, value=0.0),
    ]
    write(log, written)
    assert list(user_events(log.events())) == [as_user_event(message) for message in written]
    assert list(user_events(log.events().slice(1, 2))) == [as_user_event(message) for message in written[1:3]]


def test_columns_alone_make_rows_with_defaults() -> None:
    rows = from_columns(EVENTS, {"event_id": ["a"], "event_time": [T0]})
    assert rows.schema == EVENTS.schema
    assert list(from_table(EVENTS, rows)) == [Event(event_id="a", event_time=from_ms(T0))]


def test_an_empty_log_reads_as_empty(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "nothing")
    assert log.events().num_rows == 0
    assert not log.exists()
    assert list(log.items()) == list(log.impressions()) == []


def test_an_older_file_without_a_column_reads_with_the_default(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    (tmp_path / "events" / "date=2023-11-14").mkdir(parents=True)
    old = to_table(EVENTS, [event(1)]).drop_columns(["surface", "tags"])
    pq.write_table(old, tmp_path / "events" / "date=2023-11-14" / "old.parquet")
    assert list(from_table(EVENTS, log.events())) == [event(1)]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    [path] = write(log, [event(1)])
    Path(path).write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=r"p0-0-9\.parquet"):
        log.events()
    with pytest.raises(ConfigError, match="no column 'colour'"):
        log.events(columns=["colour"])


def test_an_fsspec_address_works_like_a_folder() -> None:
    log = EventLog("memory://test-event-log/root")
    try:
        write(log, [event(2, T0 + DAY_MS), event(1)])
        assert ids(log.events()) == ["e001", "e002"]
        log.replace(EVENTS, [to_table(EVENTS, [event(3)])], "p0-0")
        assert ids(log.events()) == ["e003"]
    finally:
        fsspec.filesystem("memory").rm("/test-event-log", recursive=True)
