"""The Trivago sample (RecSys Challenge 2019, `events.csv.gz`) as an event log: hotel search sessions.

Reads the user's own copy. A clickout becomes a `click` event and the impression list that it came from (the hotels in
the order shown; their prices in tag `prices`, separated by "|"); the other actions on a hotel are views.
Invariant: events of a session keep the order of its steps, also within one second; actions without a hotel are
counted as skipped.
"""

import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from core.errors import ConfigError
from features.stores.event_rows import EVENTS, IMPRESSIONS, ITEMS, TIME, USERS, from_columns
from offline.data.dataset import DatasetSummary, Progress, categories_of, no_progress, write_dataset
from offline.data.reading import Columns, broken_row, read_columns

NAME = "trivago"
FILES = ("events.csv.gz", "events.csv")
_COLUMNS = (
    "user_id session_id timestamp step action_type reference platform city device current_filters impressions prices"
)
_CLICK = "clickout item"
# Their words -> kind of event; the tag `action` keeps the words. What is not named here has no hotel (filters, sort
# orders, destinations).
KINDS = {
    _CLICK: "click",
    "interaction item image": "view",
    "interaction item info": "view",
    "interaction item rating": "view",
    "interaction item deals": "view",
    "search for item": "view",
}


def find(path: Path) -> Path | None:
    """The events file, if `path` is it or its folder and it is Trivago's."""
    return next((file for file in (path, *(path / name for name in FILES)) if file.is_file()), None)


def load(path: Path, out: Path | str, progress: Progress = no_progress) -> DatasetSummary:
    """Reads the sample at `path` (the file or its folder) and writes it into the log `out`.

    Raises:
        ConfigError: no such file there, or not its columns.
        MalformedEventError: a broken row; names file, line and column.
    """
    started = time.monotonic()
    file = find(path)
    if file is None:
        raise ConfigError(f"{path}: no Trivago sample here (none of {', '.join(FILES)}); give its folder")
    progress("reading trivago", 0.0)
    rows = read_columns(file, _COLUMNS.split(), ",", header=True)
    times = (rows.numbers("timestamp") * 1000).astype(np.int64)
    steps = rows.numbers("step").astype(np.int64)
    progress("sorting hotels and sessions", 0.3)
    lists = _lists(rows)
    items = _items(rows, lists)
    actions = Counter(rows["action_type"])
    skipped = {f"{action} (no hotel)": count for action, count in actions.items() if action not in KINDS}
    kept = _with_hotel(rows, times, steps, skipped)
    tables = {
        EVENTS.name: _events(rows, kept, times, steps, items),
        IMPRESSIONS.name: _impressions(rows, [row for row in kept if row in lists], times, steps, lists),
        ITEMS.name: items,
        USERS.name: _users(rows),
    }
    progress("writing trivago", 0.7)
    summary = write_dataset(out, NAME, tables, started=started, skipped=skipped)
    progress("wrote trivago", 1.0)
    return summary


def _with_hotel(
    rows: Columns, times: npt.NDArray[np.int64], steps: npt.NDArray[np.int64], skipped: dict[str, int]
) -> list[int]:
    """Rows that become events, in order of time and step."""
    kept = []
    for row in np.lexsort((steps, times)).tolist():
        if rows["action_type"][row] in KINDS:
            if rows["reference"][row].isdigit():
                kept.append(row)
            else:
                reason = f"{rows['action_type'][row]} (reference is no hotel number)"
                skipped[reason] = skipped.get(reason, 0) + 1
    return kept


def _lists(rows: Columns) -> dict[int, tuple[list[str], list[str]]]:
    """Hotels and prices of the clickouts, by row."""
    lists = {}
    for row, text in enumerate(rows["impressions"]):
        if not text:
            continue
        hotels, prices = text.split("|"), rows["prices"][row].split("|")
        if len(hotels) != len(prices):
            problem = f"{len(prices)} prices for {len(hotels)} impressions; mend or remove the line"
            raise broken_row(rows.path, rows.lines[row], "prices", problem)
        if not all(price.isdigit() for price in prices):
            raise broken_row(rows.path, rows.lines[row], "prices", "must be whole numbers separated by |")
        lists[row] = (hotels, prices)
    return lists


def _items(rows: Columns, lists: dict[int, tuple[list[str], list[str]]]) -> pa.Table:
    """Hotels: the median of the prices shown, and the city in whose searches they were met most."""
    prices: dict[str, list[int]] = defaultdict(list)
    cities: dict[str, Counter[str]] = defaultdict(Counter)
    for row, (action, reference, city) in enumerate(
        zip(rows["action_type"], rows["reference"], rows["city"], strict=True)
    ):
        if action in KINDS and reference.isdigit():
            cities[reference][city] += 1
        if row in lists:
            for hotel, price in zip(*lists[row], strict=True):
                prices[hotel].append(int(price))
                cities[hotel][city] += 1
    hotels = sorted(cities, key=lambda hotel: (len(hotel), hotel))
    # Of equally frequent cities the first by name, so that the result does not hang on the order of the file.
    city_of = [min(cities[hotel].items(), key=lambda entry: (-entry[1], entry[0]))[0] for hotel in hotels]
    return from_columns(
        ITEMS,
        {
            "item_id": hotels,
            "title": [f"Hotel {hotel}, {city}" for hotel, city in zip(hotels, city_of, strict=True)],
            "categories": [[city] if city else [] for city in city_of],
            "price": [float(median(prices[hotel])) if hotel in prices else None for hotel in hotels],
            "numbers": [[("times_shown", float(len(prices.get(hotel, ()))))] for hotel in hotels],
            "labels": [[("city", city)] for city in city_of],
        },
    )


def _users(rows: Columns) -> pa.Table:
    """Users with the platform (country) and device that they used first."""
    first = {user: row for row, user in reversed(list(enumerate(rows.ids("user_id"))))}
    users = sorted(first)
    platforms = [rows["platform"][first[user]] for user in users]
    devices = [rows["device"][first[user]] for user in users]
    labels = [[("device", device), ("platform", platform)] for device, platform in zip(devices, platforms, strict=True)]
    return from_columns(USERS, {"user_id": users, "labels": labels, "segment": platforms})


def _events(
    rows: Columns, kept: list[int], times: npt.NDArray[np.int64], steps: npt.NDArray[np.int64], items: pa.Table
) -> pa.Table:
    item_ids = pa.array([rows["reference"][row] for row in kept], pa.string())
    tags = []
    for row in kept:
        columns = {"action": "action_type", "city": "city", "filters": "current_filters", "platform": "platform"}
        tag = {name: rows[column][row] for name, column in columns.items()}
        if rows["impressions"][row]:
            tag["recommendation_id"] = _event_id(rows, steps, row)
        tags.append([(name, text) for name, text in tag.items() if text])
    return from_columns(
        EVENTS,
        _who_and_when(rows, kept, times)
        | {
            "event_id": [_event_id(rows, steps, row) for row in kept],
            "item_id": item_ids,
            "kind": [KINDS[rows["action_type"][row]] for row in kept],
            "tags": tags,
            "categories": categories_of(items, item_ids),
        },
    )


def _impressions(
    rows: Columns,
    kept: list[int],
    times: npt.NDArray[np.int64],
    steps: npt.NDArray[np.int64],
    lists: dict[int, tuple[list[str], list[str]]],
) -> pa.Table:
    """One list per clickout, at the clickout's time: when it was first shown is not known."""
    shown = [
        [
            {"item_id": hotel, "position": position, "propensity": 1.0, "score": 0.0, "sources": []}
            for position, hotel in enumerate(lists[row][0])
        ]
        for row in kept
    ]
    ids = [_event_id(rows, steps, row) for row in kept]
    return from_columns(
        IMPRESSIONS,
        _who_and_when(rows, kept, times)
        | {
            "event_id": [f"{name}-shown" for name in ids],
            "recommendation_id": ids,
            "impressions": shown,
            "tags": [[("prices", "|".join(lists[row][1]))] for row in kept],
        },
    )


def _who_and_when(rows: Columns, kept: list[int], times: npt.NDArray[np.int64]) -> dict[str, list[str] | pa.Array]:
    return {
        "user_id": [rows["user_id"][row] for row in kept],
        "event_time": pa.array(times[kept]).cast(TIME),
        "surface": ["hotel_search"] * len(kept),
        "device": [rows["device"][row] for row in kept],
        "session_id": [rows["session_id"][row] for row in kept],
    }


def _event_id(rows: Columns, steps: npt.NDArray[np.int64], row: int) -> str:
    # A session may begin to count its steps again, hence the time; steps in five digits, so that the order of the
    # ids is the order of the steps.
    return f"{rows['session_id'][row]}-{rows['timestamp'][row]}-{steps[row]:05d}"
