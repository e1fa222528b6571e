"""Training the ranker: something is learnt, nothing of what came later, and the files agree."""

from pathlib import Path

import numpy as np
import pytest
import torch

from core.bundle import CALIBRATION, RANKER, RANKER_CONFIG
from core.codec import from_ms
from core.errors import ConfigError
from core.settings import Settings, load_settings
from features.catalog import Catalog
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, IMPRESSIONS, to_table
from features.vectors import ranker_input
from features.windows import UserEvent
from headrace.v1.events_pb2 import Event
from offline.ndcg import ndcg
from offline.replay import Replay, read_entries
from offline.training.ranker import train_ranker
from offline.training.ranker_candidates import ANN
from offline.training.ranker_distil import STUDENT_SHAPE, Teacher
from offline.training.ranker_quality import auc
from ranker.calibration import load_calibration
from ranker.forms import TorchNetwork
from ranker.model import LIGHT, RankerConfig, RankerModel, load_ranker
from ranker.probe import load_probe
from ranker.scorer import Scorer

from .conftest import DIMENSION, HOUR_MS, ITEMS_PER_TASTE, T0_MS, TASTES, untrained_towers

Trained = tuple[Path, dict[str, float]]


@pytest.fixture(scope="module")
def trained(tastes: EventLog, small: Settings, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    work = tmp_path_factory.mktemp("ranker")
    items = list(tastes.items())
    made = train_ranker(tastes, items, untrained_towers(items, small), small, work, device="cpu", progress=False)
    return work, made.metrics


def test_a_planted_preference_is_learnt(trained: Trained) -> None:
    _, metrics = trained
    assert metrics["auc"] > 0.75
    assert metrics["ndcg_at_10"] > 1.2 * metrics["retrieval_ndcg_at_10"]


def test_the_probabilities_are_calibrated(trained: Trained) -> None:
    work, metrics = trained
    assert metrics["ece"] < 0.06
    assert load_calibration(work).fitted_on in ("impressions", "retrieved")


def test_a_light_scorer_comes_with_it(trained: Trained) -> None:
    work, _ = trained
    light = load_ranker(work, LIGHT)
    assert light.config.teacher_version == load_ranker(work).config.model_version
    # No second copy of the items' tastes; no part that reads the history.
    assert (light.config.items, light.tastes.numel(), light.config.reads_history) == (0, 0, False)


def test_lists_that_the_light_scorer_cuts_keep_their_order(trained: Trained, tastes: EventLog, small: Settings) -> None:
    work, _ = trained
    items = list(tastes.items())
    catalog = Catalog.of_items(items, small.features)
    vectors = untrained_towers(items, small).item_vectors
    scorer = Scorer(load_ranker(work), vectors, catalog.column("categories"), load_calibration(work))
    scorer.light = TorchNetwork(load_ranker(work, LIGHT), torch.device("cpu"))
    probe = load_probe(work)

    def quality(keep: int | None) -> float:
        made = scorer.score(probe.inputs, probe.user_vectors, keep)
        return float(np.mean([ndcg(one.click, gains) for one, gains in zip(made, probe.gains, strict=True)]))

    longest = max(len(one.candidate_rows) for one in probe.inputs)
    assert quality(longest // 3) > 0.95 * quality(None)


def test_a_student_learns_what_its_teacher_thinks(tastes: EventLog, small: Settings, tmp_path: Path) -> None:
    items = list(tastes.items())
    settings = load_settings(overrides={"offline": {**small.offline.model_dump(), "ranker_student": True}})
    towers = untrained_towers(items, settings)
    made = train_ranker(tastes, items, towers, settings, tmp_path, device="cpu", progress=False)
    assert made.teacher is not None
    assert made.teacher.config.attention_width > 0
    student = load_ranker(tmp_path)
    assert (student.config.attention_width, student.config.cross_layers) == (0, 0)
    assert student.parameter_count() < made.teacher.parameter_count() / 4
    assert load_ranker(tmp_path, LIGHT).config.teacher_version == student.config.model_version
    assert made.metrics["ndcg_at_10"] > 0.9 * made.metrics["teacher_ndcg_at_10"]


def test_a_teachers_opinion_is_mixed_into_known_targets_alone() -> None:
    teacher = Teacher(RankerModel(RankerConfig(DIMENSION)), 0.25)
    mixed = teacher.mixed(torch.tensor([1.0, 0.0, np.nan]), torch.tensor([0.2, 0.8, 0.9]))
    np.testing.assert_allclose(mixed.numpy(), [0.8, 0.2, np.nan], rtol=1e-6)


def test_a_student_begins_with_the_parts_that_fit() -> None:
    torch.manual_seed(0)
    full, student = RankerModel(RankerConfig(DIMENSION)), RankerModel(STUDENT_SHAPE(DIMENSION))
    Teacher(full, 0.5).start(student)
    torch.testing.assert_close(student.user.weight, full.user.weight)
    assert not student.heads.weight.any()
    assert student.layers[0].weight.shape != full.layers[0].weight.shape


def test_the_files_are_there_and_the_ranker_follows_a_click(
    trained: Trained, tastes: EventLog, small: Settings
) -> None:
    work, _ = trained
    assert all((work / name).is_file() for name in (RANKER, RANKER_CONFIG, CALIBRATION))
    items = list(tastes.items())
    replay = Replay(items, small.features)
    replay.advance(read_entries(tastes))
    catalog = replay.catalog
    vectors = untrained_towers(items, small).item_vectors
    scorer = Scorer(load_ranker(work), vectors, catalog.column("categories"), load_calibration(work))
    rows = catalog.rows(f"{taste}-{number}" for taste in range(TASTES) for number in range(5, ITEMS_PER_TASTE))
    now_ms = T0_MS + 100 * HOUR_MS
    best = []
    for taste in range(TASTES):
        user_id = f"new-{taste}"
        for number in range(3):
            clicked = UserEvent(
                user_id,
                taste * 10 + number,
                f"{taste}-{number}",
                "click",
                now_ms + number,
                categories=(f"taste {taste}",),
            )
            replay.advance([clicked])
        zeros, ones = np.zeros(len(rows), np.float32), np.full(len(rows), ANN, np.int32)
        made = ranker_input(replay.state(user_id), replay.catalog, rows, zeros, ones, now_ms + 60_000, small.features)
        (scores,) = scorer.score([made], [None])
        top = [catalog.item_ids[row] for row in rows[np.argsort(-scores.score)[:5]]]
        best.append(sum(item_id.startswith(f"{taste}-") for item_id in top))
    assert sum(best) >= 0.7 * 5 * TASTES


def test_the_same_training_gives_the_same_model(
    trained: Trained, tastes: EventLog, small: Settings, tmp_path: Path
) -> None:
    items = list(tastes.items())
    towers = untrained_towers(items, small)
    again = train_ranker(tastes, items, towers, small, tmp_path, device="cpu", progress=False)
    assert again.model.config.model_version == load_ranker(trained[0]).config.model_version


def test_events_from_before_ms_on_change_nothing(
    tastes: EventLog, small: Settings, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before_ms = T0_MS + 30 * HOUR_MS
    items = list(tastes.items())
    towers = untrained_towers(items, small)
    cut = EventLog(tmp_path_factory.mktemp("cut"))
    cut.write(EVENTS, tastes.rows(EVENTS, end_ms=before_ms), "events")
    cut.write(IMPRESSIONS, tastes.rows(IMPRESSIONS, end_ms=before_ms), "lists")
    versions = [
        train_ranker(log, items, towers, small, tmp_path, device="cpu", before_ms=limit, progress=False)
        for log, limit in ((tastes, before_ms), (cut, None))
    ]
    assert versions[0].model.config.model_version == versions[1].model.config.model_version


def test_a_log_with_nothing_to_learn_says_what_is_needed(small: Settings, tmp_path: Path, tastes: EventLog) -> None:
    items = list(tastes.items())
    log = EventLog(tmp_path / "log")
    skip = Event(event_id="1", user_id="u", item_id="0-1", kind="skip", event_time=from_ms(T0_MS))
    log.write(EVENTS, to_table(EVENTS, [skip]), "events")
    with pytest.raises(ConfigError, match="import more events"):
        train_ranker(log, items, untrained_towers(items, small), small, tmp_path, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("scores", "gains", "missed", "expected"),
    [
        ([3, 2, 1], [1, 0, 0], 0, 1.0),
        ([3, 2, 1], [0, 1, 0], 0, 1 / np.log2(3)),
        ([3, 2, 1], [0, 0, 0], 1, 0.0),
        ([3, 2, 1], [1, 0, 0], 1, 1 / (1 + 1 / np.log2(3))),
        ([], [], 0, 0.0),
    ],
)
def test_ndcg(scores: list[float], gains: list[float], missed: int, expected: float) -> None:
    assert ndcg(np.array(scores, np.float32), np.array(gains, np.float32), missed) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [([1, 2, 3, 4], [0, 0, 1, 1], 1.0), ([4, 3, 2, 1], [0, 0, 1, 1], 0.0), ([1, 1], [0, 1], 0.5), ([1], [1], 0.5)],
)
def test_auc(scores: list[float], labels: list[float], expected: float) -> None:
    assert auc(np.array(scores, np.float32), np.array(labels, np.float32)) == pytest.approx(expected)
