"""What runs beside the request: data, training, batch scores, release bundles, evaluation, replay.

Invariant: takes only model, index and artifact code from candidate and ranker; writes event logs and bundles.
"""

import os

# Read when torch loads its OpenMP. Threads that spin while they wait for each other make a training several times
# slower as soon as another process wants a core; threads that sleep cost next to nothing where they are alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
