"""`python -m ranker`: the ranker service.

Invariant: settings, bundle or port that cannot work are one line and exit code 1.
"""

import sys

from core.process import run_process
from ranker.bootstrap import serve

if __name__ == "__main__":
    sys.exit(run_process("ranker", "Ranking: scores the candidates of users, batched across requests.", serve))
