"""The benchmarks' command line: what comes out, and how it ends."""

import json

import pytest

from benchmarks.command import DATA_VARIABLE, Command, data_folder
from core.errors import ConfigError, StageError


def command() -> Command:
    made = Command("some", "How fast: `python -m benchmarks.some`.", "less of it")
    made.add("--seed", type=int, default=7)
    made.add_work()
    return made


def test_the_last_line_is_one_object_and_the_table_is_elsewhere(capsys, tmp_path) -> None:
    seen = []

    def measure(given, work):
        seen.append(work)
        return {"p50_ms": 1.5}

    argv = ["--json", "--quick", "--work", str(tmp_path)]
    assert command().run(measure, lambda figures, console: console.print(figures), argv=argv) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == {"p50_ms": 1.5, "seed": 7, "quick": True}
    assert "p50_ms" in out.err
    assert seen == [tmp_path]


def test_a_wide_table_is_not_cut(capsys) -> None:
    command().run(lambda *_: {}, lambda _, console: console.print("x" * 150), argv=[])
    assert "x" * 150 in capsys.readouterr().out


def test_figures_that_are_not_good_end_with_one(capsys) -> None:
    assert command().run(lambda *_: {"lost": 1}, lambda *_: None, is_good=lambda f: not f["lost"], argv=[]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (StageError("redis", "is away"), 1, "benchmarks.some: redis: is away\n"),
        (KeyboardInterrupt(), 130, "benchmarks.some: stopped\n"),
    ],
)
def test_what_ends_it_is_one_line(capsys, error, status, line) -> None:
    def measure(*_):
        raise error

    assert command().run(measure, lambda *_: None, argv=["--json"]) == status
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", line)


def test_public_data_is_found_where_it_was_said_to_be(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "told" / "ml-100k"
    folder.mkdir(parents=True)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "told"))
    assert data_folder("ml-100k", None) == folder
    assert data_folder(str(folder), None) == folder
    assert data_folder("ml-100k", tmp_path / "told") == folder
    with pytest.raises(ConfigError, match=rf"other/ml-100k.*{DATA_VARIABLE}"):
        data_folder("ml-100k", tmp_path / "other")
