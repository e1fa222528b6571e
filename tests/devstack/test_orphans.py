"""However the supervisor ends, none of its processes is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from devstack.child import tied
from devstack.ports import Ports

RUN_STACK = Path(__file__).with_name("run_stack.py")


@pytest.fixture
def supervisor(tmp_path: Path, ports: Ports) -> Iterator[tuple["subprocess.Popen[str]", dict[str, int]]]:
    command = [sys.executable, str(RUN_STACK), str(tmp_path), *(str(ports.take("tiny")) for _ in range(2))]
    # Tied: when the test run itself is killed, this goes too, and its children with it.
    process = subprocess.Popen(
        tied(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
        process.kill()


def alive_of(children: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. A zombie has ended; whoever inherited it is slow to notice."""
    _, left = psutil.wait_procs(children, timeout=3)
    return [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [
        (signal.SIGINT, True, -signal.SIGINT),
        (signal.SIGTERM, False, 128 + signal.SIGTERM),
        (signal.SIGHUP, False, 128 + signal.SIGHUP),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "kill -9"],
)
def test_no_orphan(
    supervisor: tuple["subprocess.Popen[str]", dict[str, int]], tmp_path: Path, number: int, to_group: bool, code: int
) -> None:
    process, pids = supervisor
    children = [psutil.Process(pid) for pid in pids.values()]
    assert len(children) == 4
    # Ctrl-C goes to the whole foreground group of the terminal.
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait(20) == code
    assert not alive_of(children)
    stops = [line for line in (tmp_path / "journal").read_text().splitlines() if json.loads(line)["what"] == "stop"]
    # In good order, except where there was no chance to.
    assert len(stops) == (0 if number == signal.SIGKILL else 2)


def test_a_second_signal_makes_it_quick_not_unclean(
    supervisor: tuple["subprocess.Popen[str]", dict[str, int]],
) -> None:
    process, pids = supervisor
    children = [psutil.Process(pid) for pid in pids.values()]
    for child in children:
        # Nobody will hear SIGTERM: the stop would take ten seconds.
        child.suspend()
    os.kill(process.pid, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    assert not alive_of(children)


def test_a_command_whose_parent_is_already_gone_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    command = tied([sys.executable, "-c", f"open({str(ran)!r}, 'w')"])
    # As if this process had died between the fork and the tie.
    command[command.index(str(os.getpid()))] = "1"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (125, "the starting process is gone\n")
    assert not ran.exists()
