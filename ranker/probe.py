"""A sample of real questions that travels in the bundle: to check a form at load, to compare live inputs with training.

Written by offline/training/ranker.py from held-out lists, read by ranker/release.py. Invariant: holds features and
catalogue rows, no user and no item ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from core.bundle import RANKER_PROBE
from core.errors import ArtifactError
from features.catalog import Floats
from features.vectors import CANDIDATE_FEATURES, USER_FEATURES, RankerInput

MAX_LISTS, MAX_CANDIDATES = 128, 500


class Probe(NamedTuple):
    """N lists; each with its own number of candidates."""

    inputs: list[RankerInput]
    # [d] each, None where the user has none.
    user_vectors: list[Floats | None]
    # 1 where the candidate was clicked, [C] each.
    gains: list[Floats]


EMPTY = Probe([], [], [])


def save_probe(probe: Probe, dimension: int, folder: Path) -> None:
    """Writes RANKER_PROBE: at most MAX_LISTS lists of at most MAX_CANDIDATES, the lists' parts one after the other."""
    inputs = [_cut(one) for one in probe.inputs[:MAX_LISTS]]
    counts = [len(one.candidate_rows) for one in inputs]
    none = np.full(dimension, np.nan, np.float32)
    vectors = [none if vector is None else vector for vector in probe.user_vectors[:MAX_LISTS]]
    gains = [gain[:MAX_CANDIDATES] for gain in probe.gains[:MAX_LISTS]]
    tensors = {
        "counts": np.array(counts, np.int32),
        "user_vectors": _stack(vectors, dimension),
        "gains": np.concatenate([*gains, np.zeros(0, np.float32)]).astype(np.float32),
        "history_rows": np.stack([one.history_rows for one in inputs]),
        "history_weights": np.stack([one.history_weights for one in inputs]),
        "history_ages": np.stack([one.history_ages for one in inputs]),
        "users": np.stack([one.user for one in inputs]),
        "candidate_rows": np.concatenate([one.candidate_rows for one in inputs]).astype(np.int32),
        "candidates": np.concatenate([one.candidates for one in inputs]),
    }
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / RANKER_PROBE)


def load_probe(folder: Path) -> Probe:
    """Raises ArtifactError where the file is not what `save_probe` writes."""
    try:
        parts = load_file(folder / RANKER_PROBE)
        ends = np.cumsum(parts["counts"])[:-1]
        rows, candidates, gains = (np.split(parts[name], ends) for name in ("candidate_rows", "candidates", "gains"))
        if parts["candidates"].shape[1] != len(CANDIDATE_FEATURES) or parts["users"].shape[1] != len(USER_FEATURES):
            raise ValueError("other features than this version computes")
        lists = range(len(parts["counts"]))
        inputs = [
            RankerInput(
                parts["history_rows"][index],
                parts["history_weights"][index],
                parts["history_ages"][index],
                parts["users"][index],
                rows[index],
                candidates[index],
            )
            for index in lists
        ]
        vectors = [vector if np.isfinite(vector).all() else None for vector in parts["user_vectors"]]
    except (OSError, ValueError, IndexError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder / RANKER_PROBE} cannot be read ({error}); train again") from error
    return Probe(inputs, vectors, list(gains))


def _cut(one: RankerInput) -> RankerInput:
    return RankerInput(
        one.history_rows,
        one.history_weights,
        one.history_ages,
        one.user,
        one.candidate_rows[:MAX_CANDIDATES],
        one.candidates[:MAX_CANDIDATES],
    )


def _stack(vectors: Sequence[Floats], dimension: int) -> Floats:
    return np.stack(vectors) if vectors else np.zeros((0, dimension), np.float32)
