"""Model health: what is like training, what is not, what is missing."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import REGISTRY

from core.settings import Settings
from features.vectors import CANDIDATE_FEATURES, RankerInput
from features.windows import UserState
from ranker import health
from ranker.health import BINS, NAMES, SCORE, Health, Reference, rows_of, shares_of, stability

T0_MS = 1_700_000_000_000
State = Callable[..., UserState]
Input = Callable[..., RankerInput]


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def some_rows(shift: float = 0.0, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (20_000, len(NAMES))).astype(np.float32)


def test_the_same_distribution_is_stable_and_another_is_not() -> None:
    reference = Reference(some_rows())
    same = stability(reference.expected, shares_of(reference.count(some_rows(seed=2))))
    moved = stability(reference.expected, shares_of(reference.count(some_rows(1.0, seed=2))))
    assert same.max() < 0.01
    assert moved.min() > 0.25


def test_the_index_is_that_of_the_formula() -> None:
    expected, live = np.full((1, 2), 0.5), np.array([[0.75, 0.25]])
    by_hand = 0.25 * np.log(1.5) - 0.25 * np.log(0.5)
    assert stability(expected, live)[0] == pytest.approx(by_hand)


def test_every_row_is_counted_in_one_bin() -> None:
    rows = some_rows()
    counts = Reference(rows).count(rows)
    assert counts.shape == (len(NAMES), BINS)
    assert (counts.sum(axis=1) == len(rows)).all()
    np.testing.assert_allclose(counts / len(rows), 1 / BINS, atol=0.001)


def test_a_flag_that_is_always_off_may_stay_off() -> None:
    off = np.zeros((100, len(NAMES)), np.float32)
    reference = Reference(off)
    assert stability(reference.expected, shares_of(reference.count(off))).max() == 0
    assert stability(reference.expected, shares_of(reference.count(off + 1))).min() > 1


def test_a_moved_feature_shows_in_its_metric(
    settings: Settings, state_of: State, input_of: Input, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_WINDOW_ROWS", 10)
    one, scores = input_of(state_of(1, 2), *range(16)), np.linspace(0, 1, 16, dtype=np.float32)
    watched = Health(Reference(rows_of(one, scores)), settings.features)
    watched.see([state_of(1, 2)], [None], [T0_MS], [one], [scores])
    name = "headrace_ranker_feature_stability_index"
    assert sample(name, feature="log_price") == pytest.approx(0, abs=1e-6)
    assert sample(name, feature=SCORE) == pytest.approx(0, abs=1e-6)
    moved = one.candidates.copy()
    moved[:, CANDIDATE_FEATURES.index("log_price")] += 10
    watched.see([state_of(1, 2)], [None], [T0_MS], [replace(one, candidates=moved)], [scores])
    assert sample(name, feature="log_price") > 0.25
    assert sample(name, feature="retrieval_score") == pytest.approx(0, abs=1e-6)


def test_missing_and_stale_users_are_counted(settings: Settings, state_of: State) -> None:
    def counts() -> dict[str, float]:
        name = "headrace_ranker_features_total"
        return {status: sample(name, feature="user_state", status=status) for status in ("present", "missing", "stale")}

    before = counts()
    late_ms = T0_MS + settings.features.stale_after_seconds * 1000 + 3_600_000
    states = [state_of(1), state_of(1), UserState()]
    empty = np.zeros(0, np.float32)
    Health(None, settings.features).see(states, [None] * 3, [T0_MS + 1, late_ms, T0_MS], [], [empty] * 0)
    assert {status: count - before[status] for status, count in counts().items()} == {
        "present": 1,
        "missing": 1,
        "stale": 1,
    }
