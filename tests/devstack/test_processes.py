from pathlib import Path

import pytest

from devstack.ports import Ports
from devstack.processes import describe_exit, http_problem, last_line


@pytest.mark.parametrize(
    ("code", "text"), [(0, "exit code 0"), (1, "exit code 1"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")]
)
def test_an_exit_code_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", ""),
        ("one\ntwo\n\n", "two"),
        ('Traceback (most recent call last):\n  File "a.py", line 1\nValueError: no\n', "ValueError: no"),
        ("Exception: broken\n\tat kafka.Kafka.main(Kafka.scala)\n\t... 3 more\n", "Exception: broken"),
        ("caf\xe9", "caf\ufffd"),
    ],
    ids=["nothing", "trailing blank", "python traceback", "java traceback", "not utf-8"],
)
def test_the_last_line_that_says_something(tmp_path: Path, log: str, expected: str) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(log.encode("latin-1"))
    assert last_line(path) == expected


def test_the_last_line_is_of_the_present_run_only(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("old news\n")
    assert last_line(path, since=path.stat().st_size) == ""
    assert last_line(tmp_path / "none.log") == ""


def test_a_silent_admin_port_is_a_problem(ports: Ports) -> None:
    port = ports.take("a")
    assert http_problem(port, "/ready") == f"no answer on admin port {port} (Connection refused)"
