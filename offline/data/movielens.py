"""MovieLens as an event log: 100k, 1M and the `ratings.csv` family (latest-small, 20M, 25M, 32M).

Reads the user's own copy (https://grouplens.org/datasets/movielens/); nothing of it is shipped. Invariant: one
`rating` event per rating, its value the stars, its categories the film's genres, each user's order kept.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError
from features.stores.event_rows import EVENTS, ITEMS, TIME, USERS, from_columns
from offline.data.dataset import DatasetSummary, Progress, categories_of, no_progress, write_dataset
from offline.data.reading import Columns, broken_row, read_columns

_YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)\s*$")
# fmt: off
_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
_OCCUPATIONS = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)
# fmt: on
_AGES = ((1, "under 18"), (18, "18-24"), (25, "25-34"), (35, "35-44"), (45, "45-49"), (50, "50-55"), (56, "56+"))
# Where only the order is known, each user's ratings are put one minute apart from here on (the year of ML-1M).
_ORDER_START_MS, _ORDER_STEP_MS = 956_703_600_000, 60_000

_Parts = tuple[pa.Table, pa.Table, pa.Table | None, tuple[str, ...]]


def find(path: Path) -> tuple[str, Path] | None:
    """The variant that lies in `path`, or in one folder below it: (name, folder)."""
    below = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    for folder in (path, *below):
        for name, (marker, _) in _VARIANTS.items():
            if (folder / marker).is_file():
                return name, folder
    return None


def load(path: Path, out: Path | str, progress: Progress = no_progress) -> DatasetSummary:
    """Reads the MovieLens folder `path` and writes it into the log `out`.

    Raises:
        ConfigError: no MovieLens files there, or files that are not what their names say.
        MalformedEventError: a broken row; names file, line and column.
    """
    started = time.monotonic()
    found = find(path)
    if found is None:
        markers = ", ".join(marker for marker, _ in _VARIANTS.values())
        raise ConfigError(f"{path}: no MovieLens here (none of {markers}); give the unpacked folder")
    name, folder = found
    progress(f"reading {name}", 0.0)
    events, items, users, notes = _VARIANTS[name][1](folder)
    progress(f"writing {name}", 0.6)
    unknown = pc.sum(pc.invert(pc.is_in(events["item_id"], items["item_id"].combine_chunks()))).as_py()
    if unknown:
        notes = (*notes, f"{unknown} ratings are of films that the film list does not have")
    tables = {EVENTS.name: events, ITEMS.name: items} | ({} if users is None else {USERS.name: users})
    summary = write_dataset(out, name, tables, started=started, notes=notes)
    progress(f"wrote {name}", 1.0)
    return summary


def _load_100k(folder: Path) -> _Parts:
    ratings = read_columns(folder / "u.data", ("user", "item", "rating", "timestamp"), "\t")
    names = ("item", "title", "release", "video", "uri", *_GENRES_100K)
    films = read_columns(folder / "u.item", names, "|", encoding="latin-1")
    flags = np.array([films[genre] for genre in _GENRES_100K]).T == "1"
    genres = [[genre for genre, flag in zip(_GENRES_100K, row, strict=True) if flag] for row in flags]
    labels = [{"imdb_uri": uri} if uri else {} for uri in films["uri"]]
    items = _items(films, genres, labels)
    people = read_columns(folder / "u.user", ("user", "age", "gender", "occupation", "zip"), "|")
    users = _users(people, people["occupation"], people.numbers("age"), [{"age": age} for age in people.numbers("age")])
    return _rated(ratings, items, ratings.numbers("timestamp") * 1000, "ml-100k"), items, users, ()


def _load_csv(folder: Path) -> _Parts:
    ratings = read_columns(folder / "ratings.csv", ("userId", "movieId", "rating", "timestamp"), ",", header=True)
    films = read_columns(folder / "movies.csv", ("movieId", "title", "genres"), ",", header=True)
    items = _items(films, [_genres(text) for text in films["genres"]], key="movieId")
    times = ratings.numbers("timestamp") * 1000
    return _rated(ratings, items, times, "ml", keys=("userId", "movieId")), items, None, ()


def _load_1m(folder: Path) -> _Parts:
    ratings = read_columns(folder / "ratings.dat", ("user", "item", "rating", "timestamp"), "::")
    items, users = _films_and_people_1m(folder)
    return _rated(ratings, items, ratings.numbers("timestamp") * 1000, "ml-1m"), items, users, ()


def _load_1m_ordered(folder: Path) -> _Parts:
    ratings = read_columns(
        folder / "ratings_ordered.csv.gz", ("user_id", "movie_id", "rating", "pos"), ",", header=True
    )
    items, users = _films_and_people_1m(folder)
    times = _ORDER_START_MS + ratings.numbers("pos") * _ORDER_STEP_MS
    note = "times are made from each user's order (all users start together): split by user, not by time"
    return _rated(ratings, items, times, "ml-1m", keys=("user_id", "movie_id")), items, users, (note,)


def _films_and_people_1m(folder: Path) -> tuple[pa.Table, pa.Table | None]:
    films = read_columns(folder / "movies.dat", ("item", "title", "genres"), "::", encoding="latin-1")
    items = _items(films, [_genres(text) for text in films["genres"]])
    # The 10M set has the same files but for this one.
    if not (folder / "users.dat").is_file():
        return items, None
    people = read_columns(folder / "users.dat", ("user", "gender", "age", "occupation", "zip"), "::")
    codes = people.numbers("occupation").astype(int)
    unknown = np.flatnonzero((codes < 0) | (codes >= len(_OCCUPATIONS)))
    if len(unknown):
        raise broken_row(people.path, people.lines[unknown[0]], "occupation", "is a code of 0..20")
    return items, _users(people, [_OCCUPATIONS[code] for code in codes], people.numbers("age"), None)


_VARIANTS: dict[str, tuple[str, Callable[[Path], _Parts]]] = {
    "movielens-100k": ("u.data", _load_100k),
    "movielens": ("ratings.csv", _load_csv),
    "movielens-1m": ("ratings.dat", _load_1m),
    "movielens-1m-ordered": ("ratings_ordered.csv.gz", _load_1m_ordered),
}


def _rated(
    ratings: Columns,
    items: pa.Table,
    times_ms: npt.NDArray[np.float64],
    prefix: str,
    keys: tuple[str, str] = ("user", "item"),
) -> pa.Table:
    """One event per rating, in time order."""
    order = np.argsort(times_ms, kind="stable")
    users, films = (np.array(ratings.ids(name))[order] for name in keys)
    item_ids = pa.array(films, pa.string())
    return from_columns(
        EVENTS,
        {
            "event_id": [f"{prefix}-{user}-{film}" for user, film in zip(users, films, strict=True)],
            "user_id": pa.array(users, pa.string()),
            "item_id": item_ids,
            "kind": pa.repeat(pa.scalar("rating"), len(order)),
            "event_time": pa.array(times_ms[order].astype(np.int64)).cast(TIME),
            "value": ratings.numbers("rating")[order],
            "categories": categories_of(items, item_ids),
        },
    )


def _items(
    films: Columns, genres: list[list[str]], labels: list[dict[str, str]] | None = None, key: str = "item"
) -> pa.Table:
    years = [_YEAR.search(title) for title in films["title"]]
    columns = {
        "item_id": films.ids(key),
        "title": films["title"],
        "year": [int(year[1]) if year else None for year in years],
        "categories": genres,
    }
    if labels is not None:
        columns["labels"] = [list(label.items()) for label in labels]
    return from_columns(ITEMS, columns)


def _users(
    people: Columns, occupations: list[str], ages: npt.NDArray[np.float64], numbers: list[dict[str, float]] | None
) -> pa.Table:
    groups = [next(name for least, name in reversed(_AGES) if age >= least) if age >= 1 else "" for age in ages]
    columns = {
        "user_id": people.ids("user"),
        "labels": [
            [("age_group", group), ("gender", gender), ("occupation", occupation), ("zip", zip_code)]
            for group, gender, occupation, zip_code in zip(
                groups, people["gender"], occupations, people["zip"], strict=True
            )
        ],
        "segment": groups,
    }
    if numbers is not None:
        columns["numbers"] = [list(number.items()) for number in numbers]
    return from_columns(USERS, columns)


def _genres(text: str) -> list[str]:
    return [genre for genre in text.split("|") if genre and genre != "(no genres listed)"]
