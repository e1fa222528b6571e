"""How much of a crowded machine a process gets beside the others: the kernel's scheduling group of its session.

Used by devstack/keeper.py: a process that starts (imports, artifacts, warm-up: seconds of CPU) yields to those that
serve, until it is ready. Source: sched(7), "The autogroup feature". Invariant: never an error, for without the feature
(another system, a kernel without it) all is as it would be without this module.
"""

from contextlib import suppress
from pathlib import Path

# As of nice(1): a tenth of the share of a process at 0 where both want all, all of it where nobody else wants any.
STARTING = 10
SERVING = 0


def set_share(pid: int, nice: int) -> None:
    """Sets the niceness of a process's session as a whole, of which the process must be the leader."""
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice), "ascii")
