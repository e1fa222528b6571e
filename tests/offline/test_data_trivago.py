"""The Trivago loader on a tiny file of the same format."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from core.codec import to_ms
from core.errors import ConfigError, MalformedEventError
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, from_table
from offline.data import public, trivago

HEADER = (
    "user_id,session_id,timestamp,step,action_type,reference,platform,city,device,current_filters,impressions,prices"
)
ROWS = (
    'U1,s1,1541599523,1,search for destination,Paris,FR,"Paris, France",tablet,,,',
    'U1,s1,1541599530,10,clickout item,200,FR,"Paris, France",tablet,4 Star,100|200|300,70|80|90',
    'U1,s1,1541599530,9,interaction item image,100,FR,"Paris, France",tablet,,,',
    "U2,s2,1541599000,1,interaction item rating,300,DE,Berlin,mobile,,,",
    "U2,s2,1541599001,2,interaction item info,nothing,DE,Berlin,mobile,,,",
    "U2,s2,1541599002,3,clickout item,300,DE,Berlin,mobile,,300|400,100|60",
)


def sample(folder: Path, *rows: str, packed: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    text = "\n".join((HEADER, *(rows or ROWS))) + "\n"
    if packed:
        (folder / "events.csv.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / "events.csv").write_text(text)
    return folder


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    trivago.load(sample(tmp_path / "in"), tmp_path / "log")
    return EventLog(tmp_path / "log")


def test_actions_become_kinds_in_the_order_of_the_steps(log: EventLog) -> None:
    events = list(from_table(EVENTS, log.events()))
    assert [(e.user_id, e.item_id, e.kind) for e in events] == [
        ("U2", "300", "view"),
        ("U2", "300", "click"),
        ("U1", "100", "view"),
        ("U1", "200", "click"),
    ]
    click = events[-1]
    assert dict(click.tags) == {
        "action": "clickout item",
        "city": "Paris, France",
        "filters": "4 Star",
        "platform": "FR",
        "recommendation_id": click.event_id,
    }
    assert (click.session_id, click.device, list(click.categories)) == ("s1", "tablet", ["Paris, France"])


def test_a_clickout_brings_the_list_that_was_shown_with_its_prices(log: EventLog) -> None:
    first, second = log.impressions()
    assert [(i.item_id, i.position, i.propensity) for i in second.impressions] == [
        ("100", 0, 1.0),
        ("200", 1, 1.0),
        ("300", 2, 1.0),
    ]
    assert (second.user_id, second.tags["prices"], to_ms(second.event_time)) == ("U1", "70|80|90", 1541599530000)
    clicks = {dict(tags).get("recommendation_id") for tags in log.events(columns=["tags"])["tags"].to_pylist()}
    assert {first.recommendation_id, second.recommendation_id} <= clicks


def test_hotels_have_the_median_price_and_their_commonest_city(log: EventLog) -> None:
    items = {item.item_id: item for item in log.items()}
    assert {name: item.price for name, item in items.items()} == {"100": 70, "200": 80, "300": 95, "400": 60}
    assert items["300"].labels["city"] == "Berlin"
    assert items["300"].numbers["times_shown"] == 2
    assert [user.labels["platform"] for user in log.users()] == ["FR", "DE"]


def test_what_has_no_hotel_is_counted(tmp_path: Path) -> None:
    summary = trivago.load(sample(tmp_path / "in", packed=False), tmp_path / "log")
    assert dict(summary.skipped) == {
        "search for destination (no hotel)": 1,
        "interaction item info (reference is no hotel number)": 1,
    }
    assert summary.events == 4


def test_a_session_that_counts_its_steps_again_loses_nothing(tmp_path: Path) -> None:
    row = "U1,s1,{},1,interaction item image,100,FR,Paris,tablet,,,"
    trivago.load(sample(tmp_path / "in", row.format(1541599523), row.format(1541600000)), tmp_path / "log")
    assert EventLog(tmp_path / "log").events().num_rows == 2


def test_broken_rows_and_wrong_files_are_named(tmp_path: Path) -> None:
    bad = ROWS[1].replace("70|80|90", "70|80")
    with pytest.raises(MalformedEventError, match=r"line 2, column prices: 2 prices for 3 impressions"):
        trivago.load(sample(tmp_path / "a", bad), tmp_path / "log")
    with pytest.raises(MalformedEventError, match=r"line 2, column timestamp: 'soon' is not a number"):
        trivago.load(sample(tmp_path / "b", ROWS[1].replace("1541599530", "soon")), tmp_path / "log")
    with pytest.raises(ConfigError, match="no Trivago sample here"):
        trivago.load(tmp_path / "log", tmp_path / "log")


def test_a_folder_is_recognised_by_its_files(tmp_path: Path) -> None:
    assert public.recognise(sample(tmp_path / "in")) == "trivago"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "events.csv").write_text("user_id,item_id\n")
    assert public.recognise(tmp_path / "own") is None
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml" / "ratings.csv").touch()
    assert public.recognise(tmp_path / "ml") == "movielens"
    with pytest.raises(ConfigError, match='no such folder; did you mean "own"'):
        public.load("trivago", tmp_path / "onw", tmp_path / "log")


def test_times_are_milliseconds(log: EventLog) -> None:
    times = log.events(columns=["event_time"])["event_time"].cast(pa.int64()).to_pylist()
    assert times == [1541599000000, 1541599002000, 1541599530000, 1541599530000]
