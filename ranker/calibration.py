"""From logits to probabilities that mean what they say: one Platt scaling per head.

Fitted by training on held-out time, applied by ranker/scorer.py. Source: Platt, "Probabilistic Outputs for Support
Vector Machines", 1999; ECE as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Invariant:
scales are positive, so calibration never changes the order of a head.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.bundle import CALIBRATION
from core.errors import ArtifactError

Floats = npt.NDArray[np.float32]
_LEAST_SCALE, _MOST_SCALE = 0.05, 20.0
_BINS = 15


@dataclass(frozen=True, slots=True)
class Platt:
    """p = sigmoid(scale * logit + bias)."""

    scale: float = 1.0
    bias: float = 0.0

    def __call__(self, logits: Floats) -> Floats:
        return sigmoid(np.float32(self.scale) * logits + np.float32(self.bias))


@dataclass(frozen=True)
class Calibration:
    """The scaling of each head by name; a head without one is taken as it is."""

    heads: Mapping[str, Platt] = field(default_factory=dict)
    # What the probabilities are of: "impressions" (an item that is shown), "retrieved" or "sampled" lists.
    fitted_on: str = "none"

    def of(self, head: str) -> Platt:
        return self.heads.get(head, Platt())


def sigmoid(logits: Floats) -> Floats:
    out: Floats = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
    return out


def fit_platt(logits: Floats, labels: Floats, steps: int = 50) -> Platt:
    """Maximum likelihood of labels in 0..1 by Newton's method with a weak prior towards scale 1.

    Returns the identity where there is nothing to fit (no rows, or labels of one kind).
    """
    if len(labels) == 0 or float(labels.min()) == float(labels.max()):
        return Platt()
    x = np.stack([logits.astype(np.float64), np.ones(len(logits))], 1)
    prior = np.array([1.0, 0.0])
    weights = prior.copy()
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -40, 40)))
        gradient = x.T @ (p - labels) + (weights - prior)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - np.clip(step, -2, 2)
        if float(np.abs(step).max()) < 1e-8:
            break
    return Platt(float(np.clip(weights[0], _LEAST_SCALE, _MOST_SCALE)), float(weights[1]))


def expected_calibration_error(probabilities: Floats, labels: Floats, bins: int = _BINS) -> float:
    """Mean distance between predicted and observed rate over equal-width bins, weighted by their rows, 0..1."""
    if len(labels) == 0:
        return 0.0
    index = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    predicted = np.bincount(index, probabilities, bins)
    observed = np.bincount(index, labels, bins)
    return float(np.abs(predicted - observed).sum() / len(labels))


def save_calibration(calibration: Calibration, folder: Path) -> None:
    content = {
        "heads": {name: asdict(platt) for name, platt in sorted(calibration.heads.items())},
        "fitted_on": calibration.fitted_on,
    }
    (folder / CALIBRATION).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def load_calibration(folder: Path) -> Calibration:
    """Raises ArtifactError where the file is missing or not what `save_calibration` writes."""
    try:
        content = json.loads((folder / CALIBRATION).read_text("utf-8"))
        heads = {name: Platt(float(part["scale"]), float(part["bias"])) for name, part in content["heads"].items()}
        if not all(platt.scale > 0 and np.isfinite([platt.scale, platt.bias]).all() for platt in heads.values()):
            raise ValueError("a scale is not positive, or a number not finite")
        return Calibration(heads, str(content["fitted_on"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{folder / CALIBRATION} cannot be read ({error}); train again or roll back") from error
