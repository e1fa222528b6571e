"""`python -m candidate`: the candidate service.

Invariant: settings, bundle or port that cannot work are one line and exit code 1.
"""

import sys

from candidate.bootstrap import serve
from core.process import run_process

if __name__ == "__main__":
    sys.exit(run_process("candidate", "Candidate generation: retrieves candidates and encodes users.", serve))
