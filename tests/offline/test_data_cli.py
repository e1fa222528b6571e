"""The commands `import` and `simulate`, as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.errors import ConfigError
from features.stores.event_log import EventLog
from offline.cli import app

ITEMS = "sku,name,genre\na,Tent,outdoor|camping\nb,Pan,kitchen\n"
EVENTS = "customer,sku,timestamp,shop\nu1,a,1700000000,north\nu2,b,1700000060,south\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "items.csv").write_text(ITEMS)
    (tmp_path / "events.csv").write_text(EVENTS)
    return tmp_path


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_items_then_events_with_flags_alone(folder: Path) -> None:
    log = folder / "log"
    invoke("import", folder / "items.csv", "--kind", "items", "--out", log)
    said = invoke(
        *("import", folder / "events.csv", "--kind", "events", "--event-kind", "click"),
        *("--map", "tags.branch=shop", "--out", log, "--json"),
    )
    summary = json.loads(said)
    assert (summary["rows"], summary["kinds"], summary["notes"]) == ({"events": 2}, {"click": 2}, [])
    rows = EventLog(log).events(columns=["item_id", "tags", "categories"]).to_pylist()
    assert rows[0] == {"item_id": "a", "tags": [("branch", "north")], "categories": ["outdoor", "camping"]}


def test_a_check_shows_columns_counts_and_the_time_span_and_writes_nothing(folder: Path) -> None:
    said = invoke(
        *("import", folder / "events.csv", "--kind", "events", "--event-kind", "click", "--check"),
        *("--out", folder / "log"),
    )
    for part in (
        "customer",
        "user_id",
        "time (s)",
        "1700000000",
        "tags.shop",
        "constant",
        "click 2",
        "2023-11-14",
        "nothing was written",
    ):
        assert part in said
    assert not (folder / "log").exists()


def test_a_check_of_broken_rows_ends_with_code_1(folder: Path) -> None:
    (folder / "items.csv").write_text(ITEMS + "a,again,\n")
    result = CliRunner().invoke(
        app, ["import", str(folder / "items.csv"), "--kind", "items", "--check", "--out", str(folder / "log")]
    )
    assert result.exit_code == 1
    assert "line 4, column sku: 'a' is there already" in result.stdout


def test_a_mapping_file_and_a_flag_above_it(folder: Path) -> None:
    (folder / "map.toml").write_text('kind = "events"\ndelimiter = ","\nconstants = {kind = "view"}\n')
    said = invoke(
        *("import", folder / "events.csv", "--mapping", folder / "map.toml", "--event-kind", "like"),
        *("--out", folder / "log", "--json"),
    )
    assert json.loads(said)["kinds"] == {"like": 2}


def test_a_public_data_set_is_recognised_by_its_folder(folder: Path) -> None:
    data = folder / "ml"
    data.mkdir()
    (data / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.0,964982703\n")
    (data / "movies.csv").write_text("movieId,title,genres\n10,Heat (1995),Action\n")
    assert "movielens" in invoke("import", data, "--check", "--out", folder / "log")
    assert not (folder / "log").exists()
    assert json.loads(invoke("import", data, "--out", folder / "log", "--json"))["kinds"] == {"rating": 1}
    with pytest.raises(ConfigError, match="takes one folder, not 2 paths"):
        invoke("import", data, data, "--kind", "movielens")


def test_simulate_writes_a_log_and_its_truth(folder: Path) -> None:
    arguments = ("simulate", "--users", 20, "--items", 40, "--days", 2, "--seed", 5, "--out", folder / "log")
    summary = json.loads(invoke(*arguments, "--end-time", "2026-05-01T12:00:00Z", "--json"))
    assert summary["rows"]["users"] == 20
    assert summary["end_time"] < "2026-05-01T12"
    assert (folder / "log" / "truth.safetensors").is_file()
    with pytest.raises(ConfigError, match="--end-time tomorrow: say it as in"):
        invoke(*arguments, "--end-time", "tomorrow")


def test_the_default_log_is_the_one_of_the_settings(folder: Path) -> None:
    (folder / "settings.toml").write_text(f'[streams]\nevent_log_path = "{folder}/mine"\n')
    invoke("import", folder / "items.csv", "--kind", "items", "--config", folder / "settings.toml")
    assert len(list(EventLog(folder / "mine").items())) == 2


def test_help_shows_an_example_mapping() -> None:
    assert 'kinds = {"add to basket" = "cart"}' in invoke("import", "--help")


def test_a_known_error_is_one_line_and_exit_code_1(folder: Path) -> None:
    command = [sys.executable, "-m", "offline", "import", str(folder / "item.csv"), "--kind", "items"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f'offline: {folder}/item.csv: no such file; did you mean "items.csv"?\n'
