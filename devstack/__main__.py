"""`headrace`, or `python -m devstack`.

Invariant: no logic here.
"""

import sys


def main() -> None:
    try:
        from devstack.cli import app

        app(prog_name="headrace")
    except KeyboardInterrupt:
        # Before the command itself had begun.
        sys.exit(130)


if __name__ == "__main__":
    main()
