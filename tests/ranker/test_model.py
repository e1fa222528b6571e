"""The network: what a score depends on, and what it does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.bundle import RANKER, RANKER_CONFIG
from core.errors import ArtifactError
from features.catalog import Catalog
from features.vectors import USER_FEATURES, RankerInput
from features.windows import UserState
from ranker.calibration import Calibration
from ranker.model import ItemTable, RankerConfig, RankerModel, load_ranker, save_ranker
from ranker.scorer import Scorer, collate

State = Callable[..., UserState]
Input = Callable[..., RankerInput]
DIMENSION = 16


@pytest.fixture
def vector() -> np.ndarray:
    return np.full(DIMENSION, 0.25, np.float32)


def test_a_logit_per_candidate_and_head(scorer: Scorer, state_of: State, input_of: Input) -> None:
    batch = collate([input_of(state_of(1, 2), 3, 4, 5), input_of(state_of(), 6)], [None, None], DIMENSION, 40)
    assert scorer.model(batch, scorer.table).shape == (2, 3, 3)


def test_the_order_of_the_candidates_does_not_matter(
    scorer: Scorer, state_of: State, input_of: Input, vector: np.ndarray
) -> None:
    one = input_of(state_of(1, 2, 3), 4, 5, 6, 7)
    turned = replace(one, candidate_rows=one.candidate_rows[::-1].copy(), candidates=one.candidates[::-1].copy())
    straight, reverse = scorer.score([one, turned], [vector, vector])
    np.testing.assert_allclose(straight.score, reverse.score[::-1], atol=1e-6)


def test_a_user_scores_the_same_alone_and_beside_others(
    scorer: Scorer, state_of: State, input_of: Input, vector: np.ndarray
) -> None:
    one = input_of(state_of(1, 2, 3), 4, 5, 6)
    others = [input_of(state_of(7, 8), *range(30)), input_of(state_of(), 9, 10)]
    (alone,) = scorer.score([one], [vector])
    together = scorer.score([others[0], one, others[1]], [None, vector, None])[1]
    for ours, theirs in zip(alone[:5], together[:5], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_no_more_rows_in_a_pass_than_the_caches_hold(scorer: Scorer) -> None:
    passes = list(scorer._passes([500, 2000, 500, 0, 500, 500, 500]))
    assert sorted(index for one in passes for index in one) == [0, 1, 2, 4, 5, 6]
    assert all(len(one) * 500 <= 2048 for one in passes)
    assert [1] in passes


def test_no_candidates_give_no_scores(scorer: Scorer, state_of: State, input_of: Input) -> None:
    empty, one = scorer.score([input_of(state_of(1)), input_of(state_of(1), 2)], [None, None])
    assert empty.score.shape == empty.confidence.shape == (0,)
    assert one.score.shape == (1,)


def test_unknown_items_score_with_no_confidence(scorer: Scorer, state_of: State, input_of: Input) -> None:
    (scores,) = scorer.score([input_of(state_of(1, 2), 6, 999, -1)], [None])
    assert np.isfinite(scores.score).all()
    assert scores.confidence[0] > 0.5
    assert scores.confidence[1:].tolist() == [0.0, 0.0]
    assert scores.score[1] > 0


def test_confidence_is_lower_for_unknown_users_and_rare_items(scorer: Scorer, state_of: State, input_of: Input) -> None:
    known, unknown = scorer.score([input_of(state_of(1), 6, 7), input_of(state_of(), 6, 7)], [None, None])
    assert known.confidence[0] == pytest.approx(2 * unknown.confidence[0])
    assert known.confidence[1] < known.confidence[0]  # item-7 was never clicked


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_replaced_and_counted(
    scorer: Scorer, state_of: State, input_of: Input, vector: np.ndarray, broken: float
) -> None:
    one = input_of(state_of(1, 2), 3, 4)
    one.candidates[0, :] = broken
    one.user[1] = broken
    one.history_weights[-1] = broken
    (scores,) = scorer.score([one], [vector * broken])
    assert all(np.isfinite(part).all() for part in scores[:5])
    assert scores.replaced_count == one.candidates.shape[1] + 1 + DIMENSION


def test_scores_are_probabilities(scorer: Scorer, state_of: State, input_of: Input, vector: np.ndarray) -> None:
    (scores,) = scorer.score([input_of(state_of(1, 2), *range(40))], [vector])
    for part in scores[:5]:
        assert part.dtype == np.float32
        assert ((part >= 0) & (part <= 1)).all()


def test_a_fresh_click_changes_the_order(scorer: Scorer, state_of: State, input_of: Input, vector: np.ndarray) -> None:
    before, after = scorer.score(
        [input_of(state_of(1, 2), *range(20, 40)), input_of(state_of(1, 2, 25), *range(20, 40))], [vector, vector]
    )
    assert np.argsort(-before.score).tolist() != np.argsort(-after.score).tolist()


def test_heads_without_labels_score_zero(catalog: Catalog, state_of: State, input_of: Input) -> None:
    model = RankerModel(RankerConfig(DIMENSION)).eval()
    vectors = np.zeros((len(catalog), DIMENSION), np.float32)
    scorer = Scorer(model, vectors, catalog.column("categories"), Calibration())
    (scores,) = scorer.score([input_of(state_of(1), 2, 3)], [None])
    assert not scores.conversion.any()
    assert not scores.value.any()
    np.testing.assert_array_equal(scores.score, scores.click)


def test_a_position_only_shifts_a_list_that_was_shown(scorer: Scorer, state_of: State, input_of: Input) -> None:
    batch = collate([input_of(state_of(1), 2, 3)], [None], DIMENSION, 40)
    model = scorer.model
    with torch.no_grad():
        model.position.weight[1:] = 0.5
        plain = model(batch, scorer.table)
        torch.testing.assert_close(model(batch, scorer.table, torch.tensor([[-1, -1]])), plain)
        torch.testing.assert_close(model(batch, scorer.table, torch.tensor([[0, 900]])), plain + 0.5)


def test_categories_of_later_items_are_learnt(scorer: Scorer, catalog: Catalog) -> None:
    table = scorer.table
    assert len(table) == 40
    table.put_categories(70, np.array([[5, 6, 0, 0]], np.int32))
    assert len(table) >= 71
    assert table.categories[71].tolist() == [5, 6, 0, 0]
    assert not table.vectors[41:].any()
    assert table.categories[1:41].tolist() == catalog.column("categories").tolist()
    assert table.vector_count == 40


def test_vectors_with_gaps_are_read_as_none() -> None:
    table = ItemTable(np.array([[np.nan, 1.0]], np.float32), np.zeros((1, 4), np.int32))
    assert table.vectors[1].tolist() == [0.0, 1.0]


def test_the_scale_comes_from_the_rows(scorer: Scorer) -> None:
    users, candidates = torch.rand(50, len(USER_FEATURES)) * 4, torch.rand(80, scorer.model.candidate_mean.shape[0])
    candidates[:, 3] = 2.0
    scorer.model.set_scale(users, candidates)
    torch.testing.assert_close(scorer.model.user_mean, users.mean(0))
    assert scorer.model.candidate_std[3] == 1.0


class TestArtifact:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        torch.manual_seed(1)
        save_ranker(RankerModel(RankerConfig(DIMENSION, trained_heads=("click", "value"))), tmp_path)
        return tmp_path

    def test_what_is_loaded_scores_as_what_was_saved(
        self, tmp_path: Path, scorer: Scorer, state_of: State, input_of: Input
    ) -> None:
        saved = save_ranker(scorer.model, tmp_path)
        loaded = load_ranker(tmp_path)
        assert loaded.config == saved.config
        assert loaded.config.model_version
        batch = collate([input_of(state_of(1, 2), 3, 4)], [None], DIMENSION, 40)
        torch.testing.assert_close(loaded(batch, scorer.table), scorer.model(batch, scorer.table))

    def test_other_weights_are_another_version(self, tmp_path: Path) -> None:
        versions = set()
        for seed in range(2):
            torch.manual_seed(seed)
            versions.add(save_ranker(RankerModel(RankerConfig(DIMENSION)), tmp_path).config.model_version)
        assert len(versions) == 2

    def test_features_of_another_signature_are_refused(self, saved: Path) -> None:
        file = saved / RANKER_CONFIG
        text = file.read_text()
        signature = load_ranker(saved).config.feature_signature
        file.write_text(text.replace(signature, "0123456789abcdef"))
        with pytest.raises(ArtifactError, match=r"reads features 0123456789abcdef.*train again"):
            load_ranker(saved)

    @pytest.mark.parametrize("name", [RANKER, RANKER_CONFIG])
    def test_a_missing_or_cut_file_is_refused(self, saved: Path, name: str) -> None:
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ArtifactError, match="train again or roll back"):
            load_ranker(saved)
        (saved / name).unlink()
        with pytest.raises(ArtifactError, match="train again or roll back"):
            load_ranker(saved)

    def test_weights_that_the_configuration_does_not_describe_are_refused(self, saved: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        save_ranker(RankerModel(RankerConfig(DIMENSION)), other)
        (saved / RANKER).write_bytes((other / RANKER).read_bytes())
        with pytest.raises(ArtifactError, match="is not what"):
            load_ranker(saved)
