"""Splitting by time, the summary, and the loaders on real copies where there are some."""

import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from core.errors import ConfigError
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, ITEMS, TIME, from_columns
from offline.data import public
from offline.data.dataset import categories_of, split_by_time, times_of, write_dataset

T0 = 1_700_000_000_000


def rows(times: list[int]) -> pa.Table:
    count = len(times)
    return from_columns(
        EVENTS,
        {
            "event_id": [f"e{n}" for n in range(count)],
            "user_id": ["u"] * count,
            "item_id": ["i"] * count,
            "kind": ["click"] * count,
            "event_time": pa.array([T0 + time for time in times]).cast(TIME),
        },
    )


def test_the_first_share_trains() -> None:
    train, test = split_by_time(rows(list(range(10))), 0.8)
    assert (train.num_rows, test.num_rows) == (8, 2)
    assert times_of(train).max() < times_of(test).min()


def test_events_of_one_time_are_not_split() -> None:
    train, test = split_by_time(rows([0, 1, 2, 2, 2, 2, 2, 2, 2, 3]), 0.8)
    assert (train.num_rows, test.num_rows) == (2, 8)


@pytest.mark.parametrize("times", [[], [1], [5, 5, 5, 5]], ids=["none", "one", "all at one time"])
def test_what_cannot_be_split_is_said(times: list[int]) -> None:
    with pytest.raises(ConfigError, match="cannot be split"):
        split_by_time(rows(times))


def test_rows_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="not in order"):
        split_by_time(rows([3, 1, 2]))


def test_categories_are_looked_up_by_item() -> None:
    items = from_columns(ITEMS, {"item_id": ["a", "b"], "categories": [["x", "y"], ["z"]]})
    assert categories_of(items, ["b", "?", "a", "b"]).to_pylist() == [["z"], [], ["x", "y"], ["z"]]


def test_the_summary_counts_and_says_what_lies_beside(tmp_path: Path) -> None:
    other = write_dataset(tmp_path, "other", {"events": rows([1])}, started=0.0)
    assert other.notes == ()
    summary = write_dataset(tmp_path, "mine", {"events": rows([5, 9])}, started=0.0, skipped={"none": 0, "some": 2})
    assert dict(summary.skipped) == {"some": 2}
    assert "also holds other data" in summary.notes[0]
    assert summary.as_dict()["end_time"] == "2023-11-14T22:13:20+00:00"


def test_a_data_set_whose_name_begins_like_another_stays_apart(tmp_path: Path) -> None:
    write_dataset(tmp_path, "movielens-1m", {"events": rows([1, 2])}, started=0.0)
    write_dataset(tmp_path, "movielens", {"events": rows([1])}, started=0.0)
    assert len(EventLog(tmp_path).files(EVENTS)) == 2


# Folder -> events, and the share of the test events that comes from users with five training events.
_KNOWN = {
    "ml-100k": (100_000, 0.146),
    "ml-latest-small": (100_836, 0.095),
    "ml-1m": (1_000_209, None),
    "trivago": (87_608, None),
}


@pytest.mark.parametrize("name", _KNOWN)
def test_real_copies_load_whole(name: str, tmp_path: Path) -> None:
    base = os.environ.get("HEADRACE_TEST_DATA")
    if not base:
        pytest.skip("HEADRACE_TEST_DATA names no folder of public data sets")
    if not (Path(base) / name).is_dir():
        pytest.skip(f"{base} has no {name}")
    kind = public.recognise(Path(base) / name)
    assert kind is not None
    count, warm_share = _KNOWN[name]
    assert public.load(kind, Path(base) / name, tmp_path).events == count
    events = EventLog(tmp_path).events(columns=["user_id", "event_time"])
    assert events.num_rows == count
    if warm_share is not None:
        train, test = split_by_time(events)
        counted = Counter(pc.cast(train["user_id"], pa.string()).to_pylist())
        warm = [counted[user] >= 5 for user in test["user_id"].to_pylist()]
        assert sum(warm) / len(warm) == pytest.approx(warm_share, abs=0.0006)
