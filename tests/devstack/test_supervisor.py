import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from core.errors import ConfigError, NotFoundError, StageError
from devstack import keeper, priority, processes
from devstack.keeper import Backoff, State
from devstack.processes import ProcessSpec
from devstack.supervisor import Supervisor

News = list[tuple[str, str]]
MakeSupervisor = Callable[..., Supervisor]


@pytest.fixture
def supervise(tmp_path: Path, news: News) -> Iterator[MakeSupervisor]:
    made: list[Supervisor] = []

    def make(*specs: ProcessSpec, **options: object) -> Supervisor:
        made.append(Supervisor(specs, tmp_path, say=lambda *what: news.append(what), **options))
        return made[-1]

    yield make
    for supervisor in made:
        supervisor.stop_all()


def test_all_is_ready_after_start_and_gone_after_stop(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec]
) -> None:
    supervisor = supervise(tiny("a"), tiny("b", depends_on=("a",)))
    supervisor.start_all(20)
    pids = [supervisor.pid(name) for name in supervisor.names]
    assert all(map(psutil.pid_exists, pids))
    supervisor.stop_all()
    assert not any(map(psutil.pid_exists, pids))
    assert {supervisor.state(name) for name in supervisor.names} == {State.STOPPED}


def test_a_process_starts_after_its_needs_and_waves_stop_in_order(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec], tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    supervisor = supervise(
        tiny("front", "--journal", str(journal), depends_on=("worker",), wave=2),
        tiny("worker", "--journal", str(journal), depends_on=("store",), wave=1),
        tiny("store", "--journal", str(journal)),
    )
    supervisor.start_all(20)
    supervisor.stop_all()
    lines = [(line["name"], line["what"]) for line in map(json.loads, journal.read_text().splitlines())]
    started = [("store", "start"), ("worker", "start"), ("front", "start")]
    assert lines == [*started, ("front", "stop"), ("worker", "stop"), ("store", "stop")]


def test_a_killed_process_is_started_again_and_said_so_in_one_line(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec], news: News
) -> None:
    supervisor = supervise(tiny("a"))
    supervisor.start_all(20)
    first = supervisor.pid("a")
    news.clear()
    os.kill(first, signal.SIGKILL)
    assert supervisor.wait_state("a", State.RESTARTING, 5)
    supervisor.wait_ready("a", 20)
    assert supervisor.pid("a") != first
    assert news[0] == ("a", "ended, killed by SIGKILL; starting again in 0.2 s")
    assert [text.partition(" after")[0] for _, text in news[1:]] == ["ready"]


def test_a_process_killed_on_purpose_stays_dead_until_it_is_started(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec]
) -> None:
    supervisor = supervise(tiny("a"))
    supervisor.start_all(20)
    supervisor.kill("a", signal.SIGKILL, restart=False)
    assert supervisor.wait_state("a", State.STOPPED, 5)
    with pytest.raises(NotFoundError, match="a is not running"):
        supervisor.pid("a")
    for _ in range(3):
        supervisor.start("a")
        supervisor.wait_ready("a", 20)
        supervisor.kill("a", signal.SIGKILL, restart=False)
        # At once, while its keeper may still be on its way out.
    supervisor.start("a")
    supervisor.wait_ready("a", 20)


def test_stop_then_start_at_once(supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec]) -> None:
    supervisor = supervise(tiny("a"))
    supervisor.start_all(20)
    first = supervisor.pid("a")
    supervisor.stop("a")
    assert not psutil.pid_exists(first)
    supervisor.start("a")
    supervisor.wait_ready("a", 20)
    second = supervisor.pid("a")
    supervisor.restart("a")
    supervisor.wait_ready("a", 20)
    assert len({first, second, supervisor.pid("a")}) == 3


def test_a_frozen_process_is_left_alone_when_asked_and_still_stopped_at_the_end(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec]
) -> None:
    supervisor = supervise(tiny("a", stop_timeout_seconds=0.5))
    supervisor.start_all(20)
    pid = supervisor.pid("a")
    supervisor.kill("a", signal.SIGSTOP, restart=False)
    supervisor.stop_all()
    assert not psutil.pid_exists(pid)


def test_a_process_deaf_to_sigterm_is_killed(supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec]) -> None:
    supervisor = supervise(tiny("a", "--deaf", stop_timeout_seconds=0.5))
    supervisor.start_all(20)
    pid = supervisor.pid("a")
    begin = time.monotonic()
    supervisor.stop_all()
    assert not psutil.pid_exists(pid)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("no-such-program",), "did not start, exit code 127: no-such-program: command not found"),
        ((sys.executable, "-c", "import no_such_module"), "ModuleNotFoundError: No module named 'no_such_module'"),
        ((sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"), "did not start, killed by SIGSEGV"),
        ((sys.executable, "-c", ""), "did not start, exit code 0"),
    ],
    ids=["no program", "traceback", "crash", "silent end"],
)
def test_what_does_not_start_is_one_line_and_nothing_is_left(
    supervise: MakeSupervisor,
    tiny: Callable[..., ProcessSpec],
    news: News,
    command: tuple[str, ...],
    expected: str,
) -> None:
    supervisor = supervise(tiny("good"), ProcessSpec("bad", command, check=lambda: "never"))
    with pytest.raises(StageError) as caught:
        supervisor.start_all(20)
    assert str(caught.value).startswith("bad: did not start, ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    # Said once, by the error.
    assert not [text for name, text in news if name == "bad"]
    assert {supervisor.state("good")} == {State.STOPPED}


def test_a_process_that_never_gets_ready_says_what_it_waits_for(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec]
) -> None:
    supervisor = supervise(tiny("a", "--problem", "bundle: none yet", start_timeout_seconds=1))
    with pytest.raises(StageError, match="a: is not ready after 1 s: bundle: none yet"):
        supervisor.start_all(20)


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel has no scheduling groups")
def test_a_process_yields_to_the_others_until_it_is_ready(supervise: MakeSupervisor) -> None:
    problems = ["still reading"]
    command = (sys.executable, "-c", "import signal; signal.pause()")
    supervisor = supervise(ProcessSpec("a", command, check=lambda: problems[0] if problems else None))
    supervisor.start("a")
    assert supervisor.wait_state("a", State.STARTING, 10)
    group = Path(f"/proc/{supervisor.pid('a')}/autogroup")
    assert group.read_text().endswith(f"nice {priority.STARTING}\n")
    problems.clear()
    supervisor.wait_ready("a", 10)
    assert group.read_text().endswith("nice 0\n")


def test_a_process_that_hangs_is_killed_and_started_again(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec], news: News, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_LIVE_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(keeper, "_LIVE_FAILURES_MAX", 2)
    monkeypatch.setattr(processes, "PROBE_TIMEOUT_SECONDS", 0.2)
    supervisor = supervise(tiny("a"))
    supervisor.start_all(20)
    first = supervisor.pid("a")
    os.kill(first, signal.SIGSTOP)
    assert supervisor.wait_state("a", State.RESTARTING, 10)
    supervisor.wait_ready("a", 20)
    assert not psutil.pid_exists(first)
    assert ("a", "does not answer /live any more, killed") in news


def test_verbose_shows_the_logs_and_keeps_them(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = supervise(tiny("a", "--fail", "caf\xe9 is closed"), verbose=True)
    with pytest.raises(StageError, match="exit code 1: caf\xe9 is closed"):
        supervisor.start_all(20)
    assert capsys.readouterr().err == "         a | caf\xe9 is closed\n"
    assert (tmp_path / "a.log").read_text() == "caf\xe9 is closed\n"


def test_a_process_that_keeps_dying_is_given_up(
    supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec], news: News
) -> None:
    supervisor = supervise(tiny("a", "--die-after-seconds", "0.15"), tiny("b"))
    supervisor.start_all(20)
    supervisor._keepers["a"]._backoff = Backoff(limit=2, first_seconds=0.01)
    assert supervisor.wait_state("a", State.FAILED, 20)
    text = news[-1][1]
    assert text.startswith("ended more than 2 times within 60 s, given up: exit code 3: tiny: worn out")
    with pytest.raises(StageError, match="given up"):
        supervisor.wait_ready("a", 1)
    assert supervisor.state("b") is State.READY


def test_a_need_that_is_not_there_is_named(supervise: MakeSupervisor, tiny: Callable[..., ProcessSpec]) -> None:
    with pytest.raises(ConfigError, match="a depends on b, which is not among a"):
        supervise(tiny("a", depends_on=("b",)))


def test_backoff_doubles_and_forgets() -> None:
    backoff = Backoff(limit=3, window_seconds=60, first_seconds=0.2)
    assert [backoff.after_death(now) for now in (0.0, 1.0, 2.0)] == [0.2, 0.4, 0.8]
    assert backoff.after_death(3.0) is None
    assert backoff.after_death(100.0) == 0.2
