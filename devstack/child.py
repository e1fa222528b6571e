"""Runs a command that cannot outlive its starter: `python -m devstack.child PARENT_PID -- COMMAND…`.

Every process of the stack is started through here. Invariant: the kernel kills the command with SIGKILL the moment
the starting thread is gone, also after a kill -9. Imports the standard library only, so that it costs milliseconds.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
# Exit codes of a shell, for the same two reasons.
_NOT_EXECUTABLE = 126
_NOT_FOUND = 127
_PARENT_GONE = 125


def tied(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` tied to the calling process.

    The tie is to the calling *thread*: start it from one that stays until the command has ended.
    """
    # Isolated and without site-packages: the wrapper needs neither, and starts in a third of the time.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), "--", *command]


def main(arguments: list[str]) -> int:
    """Ties this process to its parent and becomes the command. Returns only when that fails."""
    if len(arguments) < 3 or arguments[1] != "--" or not arguments[0].isdigit():
        return _complain(2, "usage: python -m devstack.child PARENT_PID -- COMMAND...")
    parent, command = int(arguments[0]), arguments[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            return _complain(_PARENT_GONE, f"prctl failed: {os.strerror(ctypes.get_errno())}")
    # The parent may have gone before the kernel knew of the tie.
    if os.getppid() != parent:
        return _complain(_PARENT_GONE, "the starting process is gone")
    try:
        os.execvp(command[0], command)  # noqa: S606 - this process becomes the command
    except FileNotFoundError:
        return _complain(_NOT_FOUND, f"{command[0]}: command not found")
    except OSError as error:
        return _complain(_NOT_EXECUTABLE, f"{command[0]}: {error.strerror}")


def _complain(code: int, problem: str) -> int:
    print(problem, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
