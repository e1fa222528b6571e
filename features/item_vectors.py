"""The item vectors of a bundle, as its file holds them.

Read by candidate, ranker, serving and offline, each of which knows what else they must agree with. Invariant: what
cannot be read is an ArtifactError that names the file.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from core.bundle import VECTORS_VERSION
from core.errors import ArtifactError
from features.catalog import Floats


def read_item_vectors(path: Path) -> tuple[Floats, str | None]:
    """The vectors, [n, d] in the order of the bundle's items, and which towers made them (None: it does not say).

    Raises:
        ArtifactError: the file is missing, cut short, or holds no vectors.
    """
    try:
        with safe_open(path, "numpy") as file:
            vectors: Floats = file.get_tensor("vectors").astype(np.float32, copy=False)
            return vectors, (file.metadata() or {}).get(VECTORS_VERSION)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); train again with `headrace train`, or roll back"
        ) from error
