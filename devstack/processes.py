"""What a process of the stack is: its command, where it says that it is ready, and what its log says at the end.

Used by the keeper, which runs one of them, and by the stack, which knows them all. Invariant: nothing here starts
or stops anything.
"""

import http.client
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from devstack.ports import LOOPBACK

PROBE_TIMEOUT_SECONDS = 2.0
_TAIL_BYTES = 16_384

# Says why a process is not ready, or nothing.
Probe = Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to keep running.

    `check` decides readiness where there is no admin port. `on_ready` runs each time it has become ready, before
    anything that depends on it is started. Processes of one `wave` are stopped together, the highest wave first.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    admin_port: int | None = None
    depends_on: tuple[str, ...] = ()
    check: Probe | None = None
    on_ready: Callable[[], None] | None = None
    wave: int = 0
    start_timeout_seconds: float = 90
    stop_timeout_seconds: float = 10

    def ready_problem(self) -> str | None:
        if self.check is not None:
            return self.check()
        return None if self.admin_port is None else http_problem(self.admin_port, "/ready")

    def live_problem(self) -> str | None:
        return None if self.admin_port is None else http_problem(self.admin_port, "/live")


def python_module(name: str, *arguments: str) -> tuple[str, ...]:
    """Command of one of our own processes. -P: a folder `core` where the user stands must not hide ours."""
    return (sys.executable, "-P", "-m", name, *arguments)


def http_problem(port: int, path: str) -> str | None:
    """Nothing when the admin port answers 200, else the first line of what it says."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PROBE_TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read(4096).decode("utf-8", "replace")
        return None if response.status == 200 else (text.strip().splitlines() or [str(response.status)])[0]
    except OSError as error:
        return f"no answer on admin port {port} ({error.strerror or type(error).__name__})"
    except http.client.HTTPException as error:
        return f"admin port {port} speaks no HTTP ({type(error).__name__})"
    finally:
        connection.close()


def tcp_problem(port: int) -> str | None:
    try:
        socket.create_connection((LOOPBACK, port), PROBE_TIMEOUT_SECONDS).close()
    except OSError as error:
        return f"no answer on port {port} ({error.strerror or type(error).__name__})"
    return None


def describe_exit(code: int) -> str:
    """`exit code 1`, or `killed by SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def last_line(log: Path, since: int = 0) -> str:
    """The last line of a log that says something: no blank lines, no frames of a Python or Java traceback.

    Args:
        log: the file; one that cannot be read says nothing.
        since: byte offset at which the present run of the process began to write.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(since, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        if line.strip() and not line[0].isspace() and not line.startswith(("Traceback ", "... ")):
            return line.strip()[:400]
    return ""
