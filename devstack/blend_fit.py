"""Blend weights from what users chose: a softmax over each moment's candidates, its weights held at 0 or above.

The arithmetic of `headrace tune`. Score parts are scaled as the re-ranker scales them, so the weights mean there what
they mean here. Invariant: pure; the log-likelihood is concave in the weights, so the fit does not depend on its start.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serving.rerank.blend import scaled

Floats64 = npt.NDArray[np.float64]
# Pulls weights that the data says nothing of towards 0.
_RIDGE = 1e-3
_STEPS, _LEAST_GAIN = 400, 1e-7


class Choice(NamedTuple):
    """One moment: the score parts of its candidates, and which of them the user chose."""

    # Part -> raw values. [C] each
    parts: Mapping[str, npt.NDArray[np.floating]]
    chosen: int
    segment: str = ""


def fit_weights(choices: Sequence[Choice], names: Sequence[str]) -> dict[str, float]:
    """Weights of the parts, adding up to 1, that make the choices most likely.

    Args:
        choices: at least one.
        names: the parts to weigh; one that a moment lacks says nothing there.
    """
    scaled_parts = [
        np.stack([scaled(choice.parts[name]) if name in choice.parts else _silent(choice) for name in names])
        for choice in choices
    ]
    chosen = [choice.chosen for choice in choices]
    weights = np.full(len(names), 1.0)
    before, step, value = weights, 1.0, -np.inf
    for _ in range(_STEPS):
        gained, gradient = _likelihood(weights, scaled_parts, chosen)
        if gained < value:
            # Too far: back, and more carefully.
            weights, step = before, step / 2
            if step < 1e-4:
                break
            continue
        if gained - value < _LEAST_GAIN:
            break
        before, value = weights, gained
        weights = np.maximum(weights + step * gradient * len(names), 0.0)
        step *= 1.1
    total = float(weights.sum())
    if total <= 0:
        return dict.fromkeys(names, 1 / len(names))
    return {name: round(float(weight) / total, 4) for name, weight in zip(names, weights, strict=True)}


def _likelihood(weights: Floats64, parts: Sequence[Floats64], chosen: Sequence[int]) -> tuple[float, Floats64]:
    """Mean log-likelihood of the choices less the ridge, and its gradient. Shape [P]."""
    value, gradient = 0.0, np.zeros_like(weights)
    for values, at in zip(parts, chosen, strict=True):
        scores = weights @ values
        scores -= scores.max()
        shares = np.exp(scores)
        shares /= shares.sum()
        value += float(np.log(max(shares[at], 1e-300)))
        gradient += values[:, at] - values @ shares
    count = len(chosen)
    return value / count - _RIDGE * float(weights @ weights), gradient / count - 2 * _RIDGE * weights


def _silent(choice: Choice) -> Floats64:
    return np.zeros(len(next(iter(choice.parts.values()))), np.float64)
