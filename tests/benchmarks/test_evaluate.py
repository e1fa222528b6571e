"""The quality benchmark finds its data and says what is wrong in one line."""

import sys

import pytest

from benchmarks.evaluate import event_log, main
from core.errors import ConfigError
from features.stores.event_log import EventLog

RATINGS = "userId,movieId,rating,timestamp\n1,10,4.0,1000000000\n1,20,3.5,1000000060\n2,10,5.0,1000000120\n"
MOVIES = "movieId,title,genres\n10,Ten (2010),Drama\n20,Twenty (2020),Comedy|Drama\n"


@pytest.fixture
def movielens(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "ratings.csv").write_text(RATINGS)
    (folder / "movies.csv").write_text(MOVIES)
    return folder


def test_public_files_become_a_log_once(movielens, tmp_path):
    log = event_log(movielens, tmp_path / "work")
    assert log == tmp_path / "work" / "tiny"
    assert EventLog(log).events().num_rows == 3
    (movielens / "ratings.csv").write_text("broken")
    assert event_log(movielens, tmp_path / "work") == log


def test_an_event_log_is_taken_as_it_is(movielens, tmp_path):
    log = event_log(movielens, tmp_path / "work")
    assert event_log(log, tmp_path / "other") == log


def test_what_is_neither_is_named(tmp_path):
    with pytest.raises(ConfigError, match="neither MovieLens nor Trivago files nor an event log"):
        event_log(tmp_path, tmp_path / "work")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--dataset", str(tmp_path / "none")])
    assert main() == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.evaluate: --dataset ")
    assert error.count("\n") == 1
