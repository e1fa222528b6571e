"""The blend: score parts, each scaled to 0..1 over the request's candidates, weighted and added.

First step of the re-ranker. Invariant: the contributions of an item add up to its score; a part that says nothing
(absent, or the same for all) contributes nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats64 = npt.NDArray[np.float64]


class Blend(NamedTuple):
    """Scores [C], the names of the parts [P], what each part adds [P, C]."""

    scores: Floats64
    parts: tuple[str, ...]
    contributions: Floats64


def scaled(values: npt.NDArray[np.floating]) -> Floats64:
    """Values moved into 0..1, smallest to largest. What is not a number counts as the smallest."""
    numbers = np.asarray(values, np.float64)
    finite = np.isfinite(numbers)
    if not finite.any():
        return np.zeros(len(numbers), np.float64)
    low, high = float(numbers[finite].min()), float(numbers[finite].max())
    # Halved, so that the range of the largest floats does not overflow.
    spread = high / 2 - low / 2
    if spread <= 0:
        return np.zeros(len(numbers), np.float64)
    return np.clip((np.where(finite, numbers, low) / 2 - low / 2) / spread, 0.0, 1.0)


def blend(parts: Mapping[str, npt.NDArray[np.floating]], weights: Mapping[str, float]) -> Blend:
    """Weighted mean of the scaled parts.

    Args:
        parts: raw values by name, [C] each; at least one.
        weights: by name; a part without one does not count. The weights of the parts present are made to add up to 1.
    """
    count = len(next(iter(parts.values())))
    names = tuple(name for name in parts if weights.get(name, 0.0) > 0)
    if not names:
        return Blend(np.zeros(count, np.float64), (), np.zeros((0, count), np.float64))
    total = sum(weights[name] for name in names)
    contributions = np.stack([scaled(parts[name]) * (weights[name] / total) for name in names])
    return Blend(contributions.sum(axis=0), names, contributions)
