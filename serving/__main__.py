"""`python -m serving`: the front door as a process.

Invariant: starts with every dependency down as long as a release bundle is on local disk.
"""

import sys

from core.process import run_process
from serving.bootstrap import serve


def main() -> int:
    return run_process("serving", "Answers recommendation requests and takes events in, over gRPC.", serve)


if __name__ == "__main__":
    sys.exit(main())
