"""Evaluation predicts each event from what came before it, and counts honestly."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from core.bundle import CURRENT
from core.codec import from_ms
from core.errors import ConfigError
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, ITEMS, to_table
from headrace.v1.events_pb2 import Event, Item
from offline import evaluate as evaluation
from offline.cli import app
from offline.evaluate import RANKING, RETRIEVAL, evaluate, ranks_of

START = 1_700_000_000_000


def ranks(targets, scores, allowed=None):
    scores = np.array(scores, np.float32)
    mask = np.ones(len(scores), np.bool_) if allowed is None else np.array(allowed, np.bool_)
    return ranks_of(np.array(targets, np.int64), scores, mask).tolist()


def test_the_rank_is_the_place_among_what_may_be_recommended():
    assert ranks([0, 1, 2], [0.1, 0.9, 0.5]) == [2, 0, 1]
    assert ranks([0], [0.1, 0.9, 0.5], [True, False, True]) == [1]


def test_a_tie_counts_as_a_loss():
    assert ranks([0, 1], [0.5, 0.5, 0.1]) == [1, 1]
    assert ranks([2], [-np.inf, -np.inf, -np.inf]) == [2]


def test_what_may_not_be_recommended_is_a_miss():
    assert ranks([1], [0.1, 0.9, 0.5], [True, False, True]) == [3]


def test_figures_of_known_ranks():
    hr, ndcg, recall = evaluation._figures(np.array([0, 2, 9, 10, 99, 100]))
    assert hr == 0.5
    assert recall == pytest.approx(5 / 6)
    assert ndcg == pytest.approx((1 + 1 / 2 + 1 / np.log2(11)) / 6)
    assert evaluation._figures(np.zeros(0, np.int64)) == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def evaluated(shop, settings, tmp_path_factory):
    registry = tmp_path_factory.mktemp("evaluated")
    return registry, evaluate(shop.root, registry, settings, device="cpu", progress=False)


def test_all_ways_are_measured_on_the_same_events(evaluated, shop):
    registry, result = evaluated
    names = [row.name for row in result.rows]
    assert names == ["popularity", "popularity, last 7 days", "first-order Markov", RETRIEVAL, RANKING]
    assert result.events == shop.events().num_rows
    assert 0 < result.warm_predicted_events <= result.predicted_events <= result.events - result.train_events
    for row in result.rows:
        assert 0 <= row.ndcg_at_10 <= row.hr_at_10 <= row.recall_at_100 <= 1
        assert 0 <= row.warm_ndcg_at_10 <= row.warm_hr_at_10 <= row.warm_recall_at_100 <= 1
    assert result.rows[3].hr_at_10 > 0
    assert result.rows[4].hr_at_10 > 0
    assert not (registry / CURRENT).exists(), "its bundle never serves"


def test_it_trains_once_and_a_limit_thins_evenly(evaluated, shop, settings, monkeypatch):
    registry, whole = evaluated
    monkeypatch.setattr("offline.train.train_towers", None)
    part = evaluate(shop.root, registry, settings, device="cpu", limit=60, progress=False)
    assert part.bundle_version == whole.bundle_version
    assert 30 <= part.predicted_events <= 120 < whole.predicted_events
    again = evaluate(shop.root, registry, settings, device="cpu", limit=60, progress=False)
    assert again.rows == part.rows


def test_popularity_knows_the_test_events_before_but_not_the_one_it_predicts(tmp_path, settings, bundle, shop):
    """Two users read a, then b: at the second b, b is popular; at the first, b is unheard of."""
    log = EventLog(tmp_path)
    happened = [("u", "a", 0), ("v", "a", 1), ("u", "b", 10), ("v", "b", 20), ("v", "a", 30)]
    rows = [
        Event(event_id=f"e{at}", user_id=user, item_id=item, kind="click", event_time=from_ms(START + at * 1000))
        for user, item, at in happened
    ]
    log.write(EVENTS, to_table(EVENTS, rows), "x")
    log.write(ITEMS, to_table(ITEMS, [Item(item_id=name) for name in "abc"]), "x")
    predictor = evaluation._Predictor(log, list(log.items()), START + 5000, settings)
    found = []

    def note(group, targets, _models):
        seen = predictor._seen[group.user_id]
        known = predictor.replay.known_items(group.time_ms)
        scores = predictor._baselines[0].scores(group.user_id, group.time_ms)
        found.append((group.user_id, targets.tolist(), sorted(seen), known.tolist(), scores.tolist()))

    predictor._predict_group = note
    predictor.predict(None, None, evaluation.Reporter(shown=False))
    assert found == [
        ("u", [1], [0], [True, False, False], [2, 0, 0]),
        ("v", [1], [0], [True, True, False], [2, 1, 0]),
    ], "what the user had before is nothing to predict"
    assert predictor._moments() == 2
    assert predictor._baselines[0].scores("w", 0).tolist() == [2, 2, 0]


def test_a_log_too_small_to_split_says_so(tmp_path, settings):
    log = EventLog(tmp_path)
    one = Event(event_id="e", user_id="u", item_id="i", kind="click", event_time=from_ms(START))
    log.write(EVENTS, to_table(EVENTS, [one]), "x")
    with pytest.raises(ConfigError, match="cannot be split"):
        evaluate(tmp_path, tmp_path / "registry", settings, progress=False)


def test_the_command_prints_a_table_or_json(evaluated, shop, settings, tmp_path):
    registry, whole = evaluated
    config = tmp_path / "quick.toml"
    quick = settings.offline
    names = ("dimension", "max_epochs", "ranker_epochs", "ranker_max_rows", "batch_scores_per_user", "popularity_items")
    config.write_text("[offline]\n" + "".join(f"{name} = {getattr(quick, name)}\n" for name in names))
    arguments = ["evaluate", "--data", shop.root, "--registry", str(registry), "--config", str(config), "--limit", "20"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0, table.output
    assert "first-order Markov" in table.stdout
    assert "NDCG@10" in table.stdout
    result = CliRunner().invoke(app, [*arguments, "--json"])
    printed = json.loads(result.stdout)
    assert printed["bundle_version"] == whole.bundle_version
    assert [row["name"] for row in printed["rows"]] == [row.name for row in whole.rows]
