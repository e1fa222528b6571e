"""`python -m streams`: the stream worker."""

import sys

from core.process import run_process
from streams.bootstrap import serve

if __name__ == "__main__":
    sys.exit(run_process("streams", "Reads events and keeps user states, item statistics and embeddings fresh.", serve))
