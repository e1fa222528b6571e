"""The regression gate: fixed inputs and weights must give the recorded scores, within 0.02 on probabilities.

A change that moves them on purpose records them anew: `RECORD_SCORES=1 pytest tests/ranker/test_regression.py`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from features.catalog import Catalog
from features.vectors import SIGNATURE, RankerInput
from features.windows import UserState
from ranker.calibration import Calibration, Platt
from ranker.model import HEADS, RankerConfig, RankerModel
from ranker.scorer import Scorer

DIMENSION, ITEMS, TASTE_WIDTH = 16, 40, 8
TOLERANCE = 0.02
RECORDED = Path(__file__).with_name("recorded_scores.json")
State = Callable[..., UserState]
Input = Callable[..., RankerInput]


def fixed_model() -> RankerModel:
    """Weights from numpy's uniform stream, which does not change: the same on every machine and with every torch."""
    model = RankerModel(RankerConfig(DIMENSION, ITEMS, TASTE_WIDTH, trained_heads=HEADS)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith(("_mean", "_std")):
                # A stream of its own for each, and an attention that says something.
                rng, scale = np.random.default_rng(list(name.encode())), 12 if name.startswith(("query", "key")) else 5
                values = (rng.random(tuple(tensor.shape)) - 0.5) * scale / max(1.0, tensor.shape[-1] ** 0.5)
                tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    return model


def fixed_vectors() -> np.ndarray:
    vectors = np.cos(np.arange(ITEMS * DIMENSION, dtype=np.float64) * 0.37).reshape(ITEMS, DIMENSION)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_fixed_inputs_give_the_recorded_scores(catalog: Catalog, state_of: State, input_of: Input) -> None:
    if os.environ.get("RECORD_SCORES"):
        content = {"feature_signature": SIGNATURE, "scores": fixed_scores(catalog, state_of, input_of)}
        RECORDED.write_text(json.dumps(content) + "\n", "utf-8")
    recorded = json.loads(RECORDED.read_text("utf-8"))
    assert recorded["feature_signature"] == SIGNATURE, "the features have another meaning: record the scores anew"
    scores = fixed_scores(catalog, state_of, input_of)
    spread = 0.0
    for name, expected in recorded["scores"].items():
        np.testing.assert_allclose(scores[name], expected, atol=TOLERANCE, err_msg=name)
        spread = max(spread, float(np.ptp(expected)))
    # Scores that are all alike would hide any change.
    assert spread > 10 * TOLERANCE


@pytest.mark.parametrize("moved", ["heads.weight", "query.weight", "crosses.0.up.weight", "user.bias"])
def test_the_gate_sees_a_moved_weight(catalog: Catalog, state_of: State, input_of: Input, moved: str) -> None:
    recorded = json.loads(RECORDED.read_text("utf-8"))["scores"]
    model = fixed_model()
    with torch.no_grad():
        model.get_parameter(moved).mul_(-1.5)
    scores = fixed_scores(catalog, state_of, input_of, model)
    assert max(np.abs(np.array(scores[name]) - expected).max() for name, expected in recorded.items()) > TOLERANCE


def fixed_scores(
    catalog: Catalog, state_of: State, input_of: Input, model: RankerModel | None = None
) -> dict[str, list[float]]:
    calibration = Calibration({"click": Platt(1.2, -0.3)}, "sampled")
    scorer = Scorer(model or fixed_model(), fixed_vectors(), catalog.column("categories"), calibration)
    inputs = [input_of(state_of(*range(1, 13)), 4, 5, 6, 7, 30, 999), input_of(state_of(), 8, 9, 10)]
    first, second = scorer.score(inputs, [np.full(DIMENSION, 0.25, np.float32), None])
    parts = {"click": (first.click, second.click), "conversion": (first.conversion, second.conversion)}
    parts |= {"value": (first.value, second.value), "score": (first.score, second.score)}
    return {name: np.concatenate(both).round(5).tolist() for name, both in parts.items()}
