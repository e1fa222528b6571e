"""Probabilities that mean what they say."""

from pathlib import Path

import numpy as np
import pytest

from core.bundle import CALIBRATION
from core.errors import ArtifactError
from ranker.calibration import (
    Calibration,
    Platt,
    expected_calibration_error,
    fit_platt,
    load_calibration,
    save_calibration,
    sigmoid,
)


def drawn(count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn with p = sigmoid(0.5 * logit - 2)."""
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, count).astype(np.float32)
    labels = (rng.random(count) < sigmoid(0.5 * logits - 2)).astype(np.float32)
    return logits, labels


def test_the_fit_finds_scale_and_bias() -> None:
    platt = fit_platt(*drawn())
    assert platt.scale == pytest.approx(0.5, abs=0.05)
    assert platt.bias == pytest.approx(-2, abs=0.1)


def test_calibrated_probabilities_have_a_small_error() -> None:
    logits, labels = drawn()
    assert expected_calibration_error(sigmoid(logits), labels) > 0.2
    assert expected_calibration_error(fit_platt(logits, labels)(logits), labels) < 0.01


@pytest.mark.parametrize("labels", [np.zeros(0), np.zeros(5), np.ones(5)])
def test_nothing_to_fit_is_the_identity(labels: np.ndarray) -> None:
    assert fit_platt(np.linspace(-1, 1, len(labels)).astype(np.float32), labels.astype(np.float32)) == Platt()


def test_a_head_that_is_wrong_keeps_its_order() -> None:
    logits = np.linspace(-3, 3, 100).astype(np.float32)
    platt = fit_platt(logits, (logits < 0).astype(np.float32))
    assert platt.scale > 0
    assert (np.diff(platt(logits)) >= 0).all()


def test_extreme_logits_stay_probabilities() -> None:
    assert sigmoid(np.array([-1e9, 0, 1e9], np.float32)).tolist() == [0.0, 0.5, 1.0]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    calibration = Calibration({"click": Platt(1.5, -0.25), "value": Platt()}, "impressions")
    save_calibration(calibration, tmp_path)
    assert load_calibration(tmp_path) == calibration
    assert calibration.of("conversion") == Platt()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"heads": {"click": {"scale": -1, "bias": 0}}, "fitted_on": ""}', '{"heads": {"click": 1}}'],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / CALIBRATION).write_text(content)
    with pytest.raises(ArtifactError, match="train again"):
        load_calibration(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="train again"):
        load_calibration(tmp_path)
