"""What the commands `up` and `demo` are asked for, as the command line hands it on.

Invariant: plain values, checked where they are used.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`headrace demo`.

    `data` is "simulated", "movielens" or "trivago"; the latter two read `path`. `json` asks for the summary as one
    last JSON line on stdout.
    """

    home: Path
    data: str = "simulated"
    path: Path | None = None
    kafka: str = "embedded"
    redis_url: str | None = None
    fixed_ports: bool = False
    keep: bool = False
    json: bool = False
    verbose: bool = False
    config: Path | None = None
