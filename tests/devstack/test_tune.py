"""Blend weights from choices, and the bundle that they go into."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.bundle import BLEND, open_current
from core.errors import ConfigError
from core.settings import load_settings
from devstack.blend_fit import Choice, fit_weights
from devstack.blend_replay import PARTS, BlendReplay, Plan
from devstack.tune import tune
from features.catalog import Catalog
from features.stores.event_log import EventLog
from offline.data.dataset import times_of
from offline.data.simulator import SimulatorConfig, simulate
from offline.models import Models
from offline.train import train

TRAINING = {
    "offline": {"max_epochs": 2, "ranker_epochs": 1, "ranker_max_rows": 4000, "batch_scores_per_user": 20, "blocks": 1}
}


def choices_by(weights, count=400, seed=1, sharp=8.0) -> list[Choice]:
    """Choices of somebody who weighs the parts so."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        parts = {name: draw.random(30) for name in weights}
        scores = sharp * sum(weight * parts[name] for name, weight in weights.items())
        shares = np.exp(scores - scores.max())
        made.append(Choice(parts, int(draw.choice(30, p=shares / shares.sum()))))
    return made


def test_the_weights_behind_the_choices_are_found() -> None:
    found = fit_weights(choices_by({"a": 0.6, "b": 0.4, "c": 0.0}, count=2000), ["a", "b", "c"])
    assert found["a"] == pytest.approx(0.6, abs=0.06)
    assert found["b"] == pytest.approx(0.4, abs=0.06)
    assert found["c"] == pytest.approx(0.0, abs=0.06)
    assert sum(found.values()) == pytest.approx(1.0, abs=0.001)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.1, 20))
def test_weights_are_shares_whatever_was_chosen(seed, sharp) -> None:
    found = fit_weights(choices_by({"a": 1.0, "b": -1.0}, count=40, seed=seed, sharp=sharp), ["a", "b", "missing"])
    assert all(0 <= weight <= 1 for weight in found.values())
    assert sum(found.values()) == pytest.approx(1.0, abs=0.001)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    home = tmp_path_factory.mktemp("shop")
    simulate(SimulatorConfig(users=150, items=120, seed=5, end_time_ms=1_780_000_000_000), home / "log")
    log = EventLog(home / "log")
    times = np.sort(times_of(log.events(columns=["event_time"])))
    cut = int(times[int(len(times) * 0.7)])
    values = load_settings(overrides=TRAINING)
    train(home / "log", home / "bundles", values, before_ms=cut, progress=False)
    return home, log, cut, values


def test_a_tuned_bundle_has_the_same_models_and_its_own_weights(shop) -> None:
    home, _, _, values = shop
    before = open_current(home / "bundles")
    tuned = tune(home / "log", home / "bundles", values, limit=300)
    after = open_current(home / "bundles")
    assert after.version == tuned.bundle_version != before.version
    assert after.manifest.model_version == before.manifest.model_version
    content = json.loads(after.file(BLEND).read_text())
    assert content["weights"] == tuned.weights
    assert set(tuned.weights) == set(PARTS)
    assert tuned.choices >= 50


def test_a_log_without_news_cannot_tune(shop, tmp_path) -> None:
    home, log, cut, values = shop
    old = EventLog(tmp_path / "old")
    from features.stores.event_rows import EVENTS, ITEMS

    old.write(EVENTS, log.events(end_ms=cut), "old")
    old.write(ITEMS, log.states(ITEMS), "old")
    with pytest.raises(ConfigError, match="0 choices"):
        tune(tmp_path / "old", home / "bundles", values)


def test_nothing_of_the_future_is_in_a_moment(shop) -> None:
    home, log, cut, values = shop
    bundle = open_current(home / "bundles")
    items = list(bundle.items())
    catalog = Catalog(values.features)
    for item in items:
        catalog.upsert(item)
    replay = BlendReplay(log, items, Models.load(bundle.path, catalog, values, "cpu"), values)
    moments = list(replay.moments(Plan(cut, delays_ms=(0, 600_000), every=20)))
    prompt, late = moments[::2], moments[1::2]
    assert {moment.delay_ms for moment in prompt} == {0}
    assert {moment.delay_ms for moment in late} == {600_000}
    assert [moment.time_ms for moment in prompt] == [moment.time_ms for moment in late]
    assert any(moment.warm for moment in prompt)
    changed = 0
    for now, then in zip(prompt, late, strict=True):
        assert now.targets.tolist() == then.targets.tolist()
        assert (np.diff(now.rows) > 0).all()
        assert all(len(values) == len(now.rows) for values in now.parts.values())
        if now.rows.tolist() == then.rows.tolist():
            # Batch scores do not depend on how late the signals are; the user's affinity does.
            assert now.parts["batch"].tolist() == then.parts["batch"].tolist()
            changed += now.parts["affinity"].tolist() != then.parts["affinity"].tolist()
    assert changed
