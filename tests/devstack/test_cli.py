"""The command as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from core.errors import ConfigError
from devstack.child import tied
from devstack.cli import HeadraceGroup
from devstack.stack import only_one

HEADRACE = [sys.executable, "-m", "devstack"]


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*HEADRACE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def test_help_is_quick_and_names_every_command() -> None:
    best = 10.0
    for _ in range(3):
        begin = time.monotonic()
        done = run("--help")
        best = min(best, time.monotonic() - begin)
    assert done.returncode == 0
    for command in ("demo", "up", "check", "topics", "dead-letter", "erase", "rebuild", "history", "skew"):
        assert f" {command} " in done.stdout
    assert best < 0.7


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "up", "check", "topics", "erase", "rebuild", "history", "skew"),
        *("dead-letter list", "dead-letter show", "dead-letter redrive"),
    ],
)
def test_a_command_teaches_by_example(command: str) -> None:
    done = run(*command.split(), "--help")
    assert "Example: " in done.stdout
    assert f"headrace {command}" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, devstack.cli; print({'torch', 'faiss', 'feast', 'confluent_kafka', 'faust'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_version() -> None:
    assert run("--version").stdout == f"headrace {version('headrace')}\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("up", "--kafka", "nowhere"), 'headrace: kafka "nowhere": give embedded, local or HOST:PORT'),
        (("up", "--config", "no-such.toml"), "headrace: settings file no-such.toml: No such file"),
        (("up", "--home", "/proc/nowhere"), "headrace: /proc/nowhere/stack: No such file or directory; give a folder"),
        (("topics",), "headrace: kafka: no broker answers at 127.0.0.1:1"),
    ],
    ids=["kafka", "config", "home", "no broker"],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(arguments: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    options = () if "--home" in arguments or arguments[0] == "topics" else ("--home", str(tmp_path))
    done = run(*arguments, *options, HEADRACE_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(problem)
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("headrace:")]) == 1


def test_a_demo_leaves_alone_what_no_demo_made(tmp_path: Path) -> None:
    bundle = tmp_path / "bundles" / "v1" / "manifest.json"
    bundle.parent.mkdir(parents=True)
    bundle.write_text("{}")
    done = run("demo", "--home", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"headrace: a demo starts afresh, but {bundle.parents[1]} was not made by one")
    assert bundle.exists()


def test_a_demo_leaves_a_running_stack_alone(tmp_path: Path) -> None:
    (tmp_path / ".demo").touch()
    kept = tmp_path / "bundles"
    kept.mkdir()
    with only_one(tmp_path / "stack"):
        done = run("demo", "--home", str(tmp_path))
    assert done.returncode == 1
    assert "another stack" in done.stderr
    assert kept.exists()


def test_every_command_ends_its_errors_in_one_place() -> None:
    group = typer.Typer(cls=HeadraceGroup)

    @group.command()
    def wrong() -> None:
        raise ConfigError("give another one")

    @group.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert CliRunner().invoke(group, ["wrong"]).exit_code == 1
    assert CliRunner().invoke(group, ["wrong"]).stderr == "headrace: give another one\n"
    assert CliRunner().invoke(group, ["interrupted"]).exit_code == 130


def test_topics_of_a_running_broker(tmp_path: Path) -> None:
    with subprocess.Popen(
        tied([sys.executable, "-m", "devstack.kafka_broker"]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as broker:
        assert broker.stdout is not None
        announced = json.loads(broker.stdout.readline())
        environment = {
            "KAFKA_BOOTSTRAP_SERVERS": announced["bootstrap_servers"],
            "HEADRACE_KAFKA__LOG_ID": announced["log_id"],
        }
        before = run("topics", "--check", **environment)
        assert before.returncode == 1
        assert "headrace.events.v1: missing; make it with `headrace topics`" in before.stderr
        made = run("topics", **environment)
        assert made.returncode == 0
        assert "made headrace.events.v1\n" in made.stdout
        assert run("topics", "--check", **environment).returncode == 0
        broker.terminate()


def test_ctrl_c_while_starting_is_clean(tmp_path: Path) -> None:
    """Ctrl-C in the first second of `headrace up`, whatever it is doing then."""
    process = subprocess.Popen(
        tied([*HEADRACE, "up", "--home", str(tmp_path)]),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stderr is not None
        # The first of Redis and Kafka is up: the others have not begun yet.
        assert "ready after" in process.stderr.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
        assert not psutil.wait_procs(children, timeout=5)[1]
