"""`python -m offline`: the offline commands without the rest of `headrace`.

Invariant: a known error is one line on stderr and exit code 1.
"""

import sys

from core.errors import RecommenderError
from offline.cli import app


def main() -> None:
    try:
        app(prog_name="python -m offline")
    except RecommenderError as error:
        print(f"offline: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    main()
