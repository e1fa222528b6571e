"""`headrace import`: what is understood of a file, what becomes of its rows, and what is said when it is wrong."""

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import ManualClock
from core.codec import MAX_TIME_MS, MIN_TIME_MS, from_ms, to_ms
from core.errors import ConfigError, MalformedEventError
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, from_table
from headrace.v1.events_pb2 import Event, Item, Preference, User
from offline.data.convert import is_numeric, recognise_time_unit
from offline.data.importer import Importer, ImportResult
from offline.data.mapping import ImportMapping, parse_pairs, read_mapping

EVENTS_CSV = "user,sku,action,timestamp\nu1,a,View,1700000000\nu1,b,click,1700000060\nu2,a,view,1700000030\n"


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def run(out: Path, *paths: Path, **values: Any) -> ImportResult:
    options = {name: values.pop(name) for name in ("skip_broken", "check_only", "clock") if name in values}
    return Importer(out, ImportMapping(**values), **options).run(paths)


def events_of(out: Path) -> list[Event]:
    return list(from_table(EVENTS, EventLog(out).events()))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_events_are_recognised_by_their_column_names(tmp_path: Path, log: Path) -> None:
    file = put(tmp_path / "e.csv", EVENTS_CSV)
    result = run(log, file, kind="events", fields={"item_id": "sku"})
    assert [(e.user_id, e.item_id, e.kind, to_ms(e.event_time)) for e in events_of(log)] == [
        ("u1", "a", "view", 1_700_000_000_000),
        ("u2", "a", "view", 1_700_000_030_000),
        ("u1", "b", "click", 1_700_000_060_000),
    ]
    assert [(c.column, c.field, c.type, c.reason) for c in result.files[0].columns] == [
        ("user", "user_id", "text", "recognised"),
        ("sku", "item_id", "text", "mapped"),
        ("action", "kind", "text", "recognised"),
        ("timestamp", "event_time", "time (s)", "recognised"),
    ]
    assert dict(result.summary.kinds) == {"view": 2, "click": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.csv", EVENTS_CSV),
        ("tabs.txt", EVENTS_CSV.replace(",", "\t")),
        ("semicolons.csv", EVENTS_CSV.replace(",", ";")),
        ("colons.dat", EVENTS_CSV.replace(",", "::")),
        ("marked.csv", "\ufeff" + EVENTS_CSV),
        ("packed.csv.gz", gzip.compress(EVENTS_CSV.encode())),
    ],
)
def test_any_delimiter_packed_or_not(tmp_path: Path, log: Path, name: str, content: str | bytes) -> None:
    run(log, put(tmp_path / name, content), kind="events")
    assert [event.item_id for event in events_of(log)] == ["a", "a", "b"]


def test_a_file_without_column_names_is_told_them(tmp_path: Path, log: Path) -> None:
    file = put(tmp_path / "e.csv", "1,7,1700000000\n2,8,1700000060\n")
    with pytest.raises(ConfigError, match=r"first line names no columns \(1, 7, 1700000000\).*--columns"):
        run(log, file, kind="events", constants={"kind": "view"})
    run(log, file, kind="events", constants={"kind": "view"}, columns=("user", "item", "time"))
    assert [(event.user_id, event.item_id) for event in events_of(log)] == [("1", "7"), ("2", "8")]


def test_json_lines_take_our_own_field_names_and_nested_values(tmp_path: Path, log: Path) -> None:
    rows = [
        {
            "item_id": "a",
            "title": "Tent",
            "categories": ["outdoor", "camping"],
            "price": 12.5,
            "labels": {"colour": "red"},
            "vectors": {"image": [0.5, 1.0]},
            "available": False,
            "publish_time": "2026-05-01T12:00:00+02:00",
        },
        {"item_id": "b", "colour": "blue", "weight": 3},
    ]
    file = put(tmp_path / "items.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    run(log, file, kind="items")
    first = Item(
        item_id="a",
        title="Tent",
        categories=["outdoor", "camping"],
        price=12.5,
        labels={"colour": "red"},
        available=False,
        publish_time=from_ms(int(datetime(2026, 5, 1, 10, tzinfo=UTC).timestamp() * 1000)),
    )
    first.vectors["image"].values.extend([0.5, 1.0])
    assert list(EventLog(log).items()) == [
        first,
        Item(item_id="b", labels={"colour": "blue"}, numbers={"weight": 3}),
    ]


def test_parquet_keeps_its_types(tmp_path: Path, log: Path) -> None:
    pq.write_table(
        pa.table(
            {
                # Whole numbers with a gap somewhere arrive as floats.
                "user_id": pa.array([1.0, 2.0]),
                "product_id": pa.array([10, 11]),
                "event_time": pa.array([1_700_000_000_123, 1_700_000_001_000], pa.timestamp("ms")),
                "event_type": ["buy", "buy"],
                "amount": pa.array([9.5, None]),
                "tags": pa.array([[("branch", "north")], []], pa.map_(pa.string(), pa.string())),
                "loyal": [True, False],
            }
        ),
        tmp_path / "e.parquet",
    )
    run(log, tmp_path / "e.parquet", kind="events", kinds={"buy": "purchase"})
    first, second = events_of(log)
    assert (first.user_id, first.item_id, first.kind, first.value) == ("1", "10", "purchase", 9.5)
    assert to_ms(first.event_time) == 1_700_000_000_123
    assert dict(first.tags) == {"branch": "north", "loyal": "true"}
    assert not second.HasField("value")


def test_users_take_labels_numbers_and_preferences(tmp_path: Path, log: Path) -> None:
    file = put(tmp_path / "u.csv", "id,country,age,zip,preferences\n7,SE,31,00501,drama:0.5|horror:-1\n8,,,,\n")
    run(log, file, kind="users", fields={"segment": "country"})
    assert list(EventLog(log).users()) == [
        User(
            user_id="7",
            segment="SE",
            numbers={"age": 31},
            labels={"zip": "00501"},
            preferences=[Preference(category="drama", weight=0.5), Preference(category="horror", weight=-1)],
        ),
        User(user_id="8"),
    ]


def test_a_mapping_file_says_it_all(tmp_path: Path, log: Path) -> None:
    mapping = put(
        tmp_path / "map.toml",
        """
        kind = "events"
        list_separator = "/"
        time_format = "%d.%m.%Y %H:%M"
        ignore = ["note"]
        [fields]
        user_id = "who"
        item_id = "what"
        event_time = "when"
        categories = "path"
        "tags.shop" = "branch"
        [constants]
        kind = "heart"
        surface = "till"
        "tags.origin" = "export"
        [kinds]
        heart = "like"
        """,
    )
    file = put(tmp_path / "e.csv", "who,what,when,path,branch,note\nu,i,01.05.2026 12:30,a/b,north,secret\n")
    result = Importer(log, read_mapping(mapping)).run([file])
    [event] = events_of(log)
    assert (event.kind, event.surface, list(event.categories)) == ("like", "till", ["a", "b"])
    assert dict(event.tags) == {"shop": "north", "origin": "export"}
    assert to_ms(event.event_time) == int(datetime(2026, 5, 1, 12, 30, tzinfo=UTC).timestamp() * 1000)
    assert ("note", "ignored") in [(column.column, column.reason) for column in result.files[0].columns]


def test_events_take_the_categories_of_items_that_are_there(tmp_path: Path, log: Path) -> None:
    items = put(tmp_path / "i.csv", "sku,genre\na,outdoor|camping\n")
    file = put(tmp_path / "e.csv", EVENTS_CSV)
    run(log, items, kind="items")
    result = run(log, file, kind="events")
    assert {event.item_id: list(event.categories) for event in events_of(log)} == {"a": ["outdoor", "camping"], "b": []}
    assert result.summary.notes[0].startswith("1 events are of items that the log does not have")


def test_events_take_the_segment_of_users_that_are_there(tmp_path: Path, log: Path) -> None:
    users = put(tmp_path / "u.csv", "user_id,segment\nu1,anglers\n")
    run(log, users, kind="users")
    run(log, put(tmp_path / "e.csv", EVENTS_CSV), kind="events", fields={"item_id": "sku"})
    segments = {event.user_id: event.segment for event in events_of(log)}
    assert segments.pop("u1") == "anglers"
    assert set(segments.values()) == {""}


def test_the_same_file_again_replaces(tmp_path: Path, log: Path) -> None:
    file = put(tmp_path / "e.csv", EVENTS_CSV)
    run(log, file, kind="events")
    run(log, file, kind="events", constants={"surface": "app"})
    assert [event.surface for event in events_of(log)] == ["app"] * 3


def test_a_longer_export_of_the_same_data_adds_only_what_is_new(tmp_path: Path, log: Path) -> None:
    twice = EVENTS_CSV + "u2,a,view,1700000030\n"
    run(log, put(tmp_path / "monday.csv", twice), kind="events")
    run(log, put(tmp_path / "tuesday.csv", twice + "u3,a,view,1700000090\n"), kind="events")
    assert [event.user_id for event in events_of(log)] == ["u1", "u2", "u2", "u1", "u3"]


def test_the_later_import_of_an_item_holds(tmp_path: Path, log: Path) -> None:
    clock = ManualClock(1_700_000_000_000)
    for title in ("first", "second"):
        clock.advance(1000)
        run(log, put(tmp_path / f"{title}.csv", f"item_id,title\na,{title}\n"), kind="items", clock=clock)
    assert [item.title for item in EventLog(log).items()] == ["second"]


def test_a_check_writes_nothing_and_shows_the_first_problems(tmp_path: Path, log: Path) -> None:
    file = put(tmp_path / "e.csv", EVENTS_CSV + "u3,a,view,soon\n,a,view,1700000000\n")
    result = run(log, file, kind="events", time_unit="s", check_only=True)
    [report] = result.files
    assert (report.rows, report.broken) == (3, 2)
    assert ["line 5, column timestamp" in report.problems[0], "line 6, column user" in report.problems[1]] == [True] * 2
    assert not log.exists()


def test_broken_rows_stop_the_import_or_are_kept_aside(tmp_path: Path, log: Path) -> None:
    file = put(tmp_path / "e.csv", EVENTS_CSV + "u3,a,view,soon\nu3,a\n")
    with pytest.raises(
        MalformedEventError, match=r"e\.csv, line 5, column timestamp: 'soon' is not a time in s.*--skip-broken"
    ):
        run(log, file, kind="events", time_unit="s")
    assert not log.exists(), "a file is written whole or not at all"
    result = run(log, file, kind="events", time_unit="s", skip_broken=True)
    assert (result.broken, len(events_of(log)), result.summary.skipped["broken rows"]) == (2, 3, 2)
    [kept] = (log / "broken").iterdir()
    entries = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [5, 6]
    assert entries[0]["row"] == {"user": "u3", "sku": "a", "action": "view", "timestamp": "soon"}


@pytest.mark.parametrize(
    ("content", "values", "message"),
    [
        ("", {}, "is empty"),
        ("user,item,kind,time\n", {}, "has column names but no rows"),
        ("user,item,time\n1,2,3\n", {}, "nothing says what kind of event.*--event-kind"),
        (
            "usr,item,kind,time\nu,i,k,1\n",
            {},
            r"no column for user_id among usr, item, kind, time.*--map user_id=COLUMN",
        ),
        (EVENTS_CSV, {"fields": {"user_id": "usr"}}, r"no column 'usr' among .*did you mean .user.\?"),
        (EVENTS_CSV, {"fields": {"usr_id": "user"}}, r"events have no field 'usr_id'; did you mean .user_id."),
        (
            EVENTS_CSV,
            {"fields": {"labels.x": "user"}},
            r"events have no field 'labels\.x'; there are event_id, .*tags\.NAME",
        ),
        (EVENTS_CSV, {"constants": {"value": "much"}}, "constant value: 'much' is not a number"),
        ("a,a\n1,2\n", {}, "two columns are called 'a'"),
        ("[{}]", {}, "a JSON list; one object per line"),
        (b"\xff\xfe,x\n1,2\n", {}, "--encoding latin-1"),
        (EVENTS_CSV, {"encoding": "utf-99"}, "unknown encoding.*--encoding"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    tmp_path: Path, log: Path, content: str | bytes, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run(log, put(tmp_path / "e.csv", content), kind="events", **values)
    assert "\n" not in str(caught.value)


def test_damaged_packed_and_missing_files_are_named(tmp_path: Path, log: Path) -> None:
    with pytest.raises(ConfigError, match="not a whole gzip file"):
        run(log, put(tmp_path / "e.csv.gz", gzip.compress(EVENTS_CSV.encode())[:-12]), kind="events")
    with pytest.raises(ConfigError, match="not a whole Parquet file"):
        run(log, put(tmp_path / "e.parquet", b"PAR1 and no more"), kind="events")
    with pytest.raises(ConfigError, match="is a folder"):
        run(log, tmp_path, kind="events")
    with pytest.raises(ConfigError, match="there is no folder"):
        run(log, tmp_path / "no" / "e.csv", kind="events")
    with pytest.raises(ConfigError, match="items, users or events"):
        run(log, put(tmp_path / "ok.csv", EVENTS_CSV))


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("items", "item_id,price\na,1\nb,2\na,3\n", "line 4, column item_id: 'a' is there already, on line 2"),
        ("items", "item_id,price\na,cheap\n", "line 2, column price: 'cheap' is not a number"),
        ("items", "item_id,year\na,1999.5\n", "line 2, column year: '1999.5' is not a whole number"),
        ("items", "item_id,available\na,perhaps\n", "line 2, column available: 'perhaps' is neither yes nor no"),
        ("users", 'user_id,preferences\na,"drama"\n', "line 2, column preferences: 'drama' is not of the form"),
        (
            "users",
            "user_id,preferences\na,drama:2\n",
            r"line 2, column preferences: preferences\[0\].weight must be in",
        ),
        ("users", "user_id\n" + "x" * 200 + "\n", "line 2, column user_id: user_id 200 characters, the limit is 128"),
        ("events", "user,item,kind,time\nu,i,k,1e5\n", "line 2, column time: event_time is not between 1971 and 2100"),
        (
            "events",
            "uuid,user,item,kind,time\n" + "e,u,i,k,1700000000\n" * 2,
            "line 3, column uuid: 'e' is there already",
        ),
    ],
)
def test_a_broken_row_is_named_with_its_column(tmp_path: Path, log: Path, kind: str, rows: str, message: str) -> None:
    with pytest.raises(MalformedEventError, match=message):
        run(log, put(tmp_path / "f.csv", rows), kind=kind)


def test_text_in_a_column_that_began_as_numbers_says_how_to_keep_it(tmp_path: Path, log: Path) -> None:
    rows = "\n".join(f"i{n},{n}" for n in range(1200))
    file = put(tmp_path / "i.csv", f"item_id,size\n{rows}\nlast,XL\n")
    with pytest.raises(
        MalformedEventError, match=r"line 1202, column size: 'XL' is not a number; say --map labels\.size"
    ):
        run(log, file, kind="items")
    run(log, file, kind="items", fields={"labels.size": "size"})
    assert {item.labels["size"] for item in EventLog(log).items()} >= {"3", "XL"}


def test_an_id_in_two_files_of_one_import_is_named(tmp_path: Path, log: Path) -> None:
    files = [put(tmp_path / name, "item_id\na\n") for name in ("one.csv", "two.csv")]
    with pytest.raises(MalformedEventError, match=r"two\.csv, line 2, .*one\.csv, line 2"):
        run(log, *files, kind="items")
    assert not log.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = ", "not valid TOML"),
        ('kind = "things"', "kind: Input should be 'items', 'users' or 'events'"),
        ("field = {}", "field: Extra inputs are not permitted; did you mean .fields."),
    ],
)
def test_a_wrong_mapping_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_mapping(put(tmp_path / "map.toml", text))


def test_flags_win_over_the_file_and_pairs_need_an_equals_sign() -> None:
    mapping = ImportMapping(kind="events", fields={"user_id": "a", "item_id": "b"})
    assert dict(mapping.updated(kind=None, fields=parse_pairs(["user_id=c"])).fields) == {
        "user_id": "c",
        "item_id": "b",
    }
    with pytest.raises(ConfigError, match="say it as field=column"):
        parse_pairs(["user_id"])


@given(st.integers(MIN_TIME_MS + 70_000_000_000, MAX_TIME_MS))
@settings(max_examples=200)
def test_units_of_time_are_told_by_size(time_ms: int) -> None:
    assert recognise_time_unit([time_ms / 1000]) == "s"
    assert recognise_time_unit([str(time_ms)]) == "ms"
    assert recognise_time_unit([time_ms * 1000]) == "us"
    assert recognise_time_unit(["2026-05-01"]) == "iso"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(value, True) for value in ("1.5", "-3", "0", "0.5", 3)],
        *[(value, False) for value in ("00501", "1_000", "nan", "", "x", True, None)],
    ],
)
def test_codes_that_look_like_numbers_stay_text(value: object, expected: bool) -> None:
    assert is_numeric(value) is expected
