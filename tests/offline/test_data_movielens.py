"""MovieLens loaders on tiny files of the same formats."""

import gzip
from pathlib import Path

import pytest

from core.codec import to_ms
from core.errors import ConfigError, MalformedEventError
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, from_table
from offline.data import movielens

FILMS_1M = "1::Toy Story (1995)::Animation|Comedy\n2::Léon (1994)::Thriller\n"
USERS_1M = "7::F::1::10::48067\n8::M::56::16::70072\n"


def put(folder: Path, name: str, text: str, encoding: str = "utf-8") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = text.encode(encoding)
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def small(folder: Path) -> Path:
    put(
        folder,
        "ratings.csv",
        "userId,movieId,rating,timestamp\n1,10,4.0,964982703\n2,10,0.5,964982700\n1,11,5.0,964981247\n",
    )
    put(
        folder,
        "movies.csv",
        'movieId,title,genres\n10,"American President, The (1995)",Comedy|Drama\n11,Untitled,(no genres listed)\n',
    )
    return folder


def test_latest_small_becomes_ratings_in_time_order_with_genres(tmp_path: Path) -> None:
    summary = movielens.load(small(tmp_path / "in"), tmp_path / "log")
    log = EventLog(tmp_path / "log")
    events = list(from_table(EVENTS, log.events()))
    assert [(e.user_id, e.item_id, e.kind, e.value, to_ms(e.event_time)) for e in events] == [
        ("1", "11", "rating", 5.0, 964981247000),
        ("2", "10", "rating", 0.5, 964982700000),
        ("1", "10", "rating", 4.0, 964982703000),
    ]
    assert [list(e.categories) for e in events] == [[], ["Comedy", "Drama"], ["Comedy", "Drama"]]
    first, second = log.items()
    assert (first.title, first.year, list(first.categories)) == (
        "American President, The (1995)",
        1995,
        ["Comedy", "Drama"],
    )
    assert not second.HasField("year")
    assert (summary.events, summary.event_users, summary.event_items, dict(summary.kinds)) == (3, 2, 2, {"rating": 3})


def test_100k_reads_genre_flags_and_users(tmp_path: Path) -> None:
    put(tmp_path / "in", "u.data", "5\t1\t3\t881250949\n6\t1\t4\t881250950\n")
    flags = "|".join("1" if n in (1, 5) else "0" for n in range(19))
    put(tmp_path / "in", "u.item", f"1|Señor (1994)|01-Jan-1994||http://x|{flags}\n", "latin-1")
    put(tmp_path / "in", "u.user", "5|24|M|writer|00501\n6|53|F|other|94043\n")
    movielens.load(tmp_path / "in", tmp_path / "log")
    log = EventLog(tmp_path / "log")
    [item] = log.items()
    assert (item.title, list(item.categories), item.labels["imdb_uri"]) == (
        "Señor (1994)",
        ["Action", "Comedy"],
        "http://x",
    )
    young, old = log.users()
    assert (young.segment, young.labels["zip"], young.numbers["age"]) == ("18-24", "00501", 24)
    assert (old.segment, old.labels["gender"], old.labels["occupation"]) == ("50-55", "F", "other")


def test_1m_reads_the_official_file_and_the_one_of_orders_alone(tmp_path: Path) -> None:
    for folder in ("official", "ordered"):
        put(tmp_path / folder, "movies.dat", FILMS_1M, "latin-1")
        put(tmp_path / folder, "users.dat", USERS_1M)
    put(tmp_path / "official", "ratings.dat", "7::1::5::978300760\n8::2::3::978302109\n7::2::4::978300000\n")
    put(
        tmp_path / "ordered",
        "ratings_ordered.csv.gz",
        "user_id,movie_id,rating,pos\n7,2,4,0\n7,1,5,1\n8,2,3,0\n",
    )
    orders = {}
    for folder in ("official", "ordered"):
        summary = movielens.load(tmp_path / folder, tmp_path / f"log-{folder}")
        log = EventLog(tmp_path / f"log-{folder}")
        events = list(from_table(EVENTS, log.events()))
        orders[folder] = [event.item_id for event in events if event.user_id == "7"]
        assert [user.segment for user in log.users()] == ["under 18", "56+"]
        assert [user.labels["occupation"] for user in log.users()] == ["K-12 student", "self-employed"]
        assert [item.title for item in log.items()] == ["Toy Story (1995)", "Léon (1994)"]
        assert bool(summary.notes) == (folder == "ordered"), "made times are said"
    assert orders == {"official": ["2", "1"], "ordered": ["2", "1"]}


def test_the_folder_around_the_files_will_do_and_twice_is_once(tmp_path: Path) -> None:
    small(tmp_path / "in" / "ml-latest-small")
    for _ in range(2):
        movielens.load(tmp_path / "in", tmp_path / "log")
    assert EventLog(tmp_path / "log").events().num_rows == 3


def test_no_movielens_there_says_which_files_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no MovieLens here .*u\.data.*ratings\.csv"):
        movielens.load(tmp_path, tmp_path / "log")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("ratings.csv", "0.5,", "half,", r"ratings\.csv, line 3, column rating: 'half' is not a number"),
        ("ratings.csv", "2,10,0.5,964982700", "2,10,0.5", r"ratings\.csv, line 3: 3 columns instead of 4"),
        ("movies.csv", "\n11,", "\n,", r"movies\.csv, line 3, column movieId: must not be empty"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    file = small(tmp_path) / name
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(MalformedEventError, match=message):
        movielens.load(tmp_path, tmp_path / "log")
    assert not EventLog(tmp_path / "log").exists()


def test_a_wrong_column_suggests_the_right_one(tmp_path: Path) -> None:
    file = small(tmp_path) / "ratings.csv"
    file.write_text(file.read_text().replace("timestamp", "timestmp"))
    with pytest.raises(ConfigError, match=r"no column 'timestamp' among .*; did you mean .timestmp."):
        movielens.load(tmp_path, tmp_path / "log")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    (small(tmp_path) / "movies.csv").rename(tmp_path / "movie.csv")
    with pytest.raises(ConfigError, match=r'movies\.csv: no such file; did you mean "movie\.csv"'):
        movielens.load(tmp_path, tmp_path / "log")
