"""The crosses of vectors: what they are, and what must not change them."""

import numpy as np
import torch

from features.vectors import CANDIDATE_FEATURES, USER_FEATURES
from ranker.calibration import Calibration
from ranker.model import RankerBatch, RankerConfig, RankerModel, item_table
from ranker.scorer import Scorer
from ranker.similarities import SIMILARITIES, similarities

DIMENSION, TASTES = 4, 3
RNG = np.random.default_rng(0)


def some_batch(history_rows: list[int], candidates: int = 2) -> RankerBatch:
    length = len(history_rows)
    return RankerBatch(
        torch.ones(1, DIMENSION) * 0.5,
        torch.ones(1, 1),
        torch.tensor([history_rows]),
        torch.ones(1, length),
        torch.zeros(1, length),
        torch.zeros(1, len(USER_FEATURES)),
        torch.arange(candidates)[None],
        torch.zeros(1, candidates, len(CANDIDATE_FEATURES)),
    )


def made(history: np.ndarray, rows: list[int]) -> np.ndarray:
    candidates = torch.from_numpy(RNG_CANDIDATES)[None]
    return similarities(candidates, torch.from_numpy(history)[None], some_batch(rows), DIMENSION)[0].numpy()


RNG_CANDIDATES = RNG.normal(size=(2, DIMENSION + TASTES)).astype(np.float32)


def test_sums_of_tastes_over_all_the_last_twenty_the_last_five_and_by_recency() -> None:
    history = RNG.normal(size=(30, DIMENSION + TASTES)).astype(np.float32)
    out = made(history, list(range(30)))
    assert out.shape == (2, SIMILARITIES)
    products = RNG_CANDIDATES[:, DIMENSION:] @ history[:, DIMENSION:].T
    sums = np.stack(
        [
            products.sum(1),
            products[:, -20:].sum(1),
            products[:, -5:].sum(1),
            products @ 0.9 ** np.arange(30)[::-1],
        ],
        1,
    )
    np.testing.assert_allclose(out[:, 9:13], sums, rtol=1e-4)
    np.testing.assert_allclose(out[:, 13:], np.sign(sums) * np.abs(sums) ** 0.5, rtol=1e-4)


def test_cosines_with_the_user_the_last_the_best_and_means() -> None:
    history = RNG.normal(size=(8, DIMENSION + TASTES)).astype(np.float32)
    out = made(history, list(range(8)))
    products = RNG_CANDIDATES[:, :DIMENSION] @ history[:, :DIMENSION].T
    user = RNG_CANDIDATES[:, :DIMENSION] @ np.full(DIMENSION, 0.5, np.float32)
    np.testing.assert_allclose(out[:, 0], user, rtol=1e-5)
    np.testing.assert_allclose(out[:, 1:3], np.exp(np.array([4, 8]) * (user[:, None] - 1)), rtol=1e-4)
    np.testing.assert_allclose(out[:, 3:5], np.stack([products[:, -1], products.max(1)], 1), rtol=1e-5)
    for column in (5, 6, 7):  # all are liked, and all of the same time
        np.testing.assert_allclose(out[:, column], products.mean(1), rtol=1e-4)
    np.testing.assert_allclose(out[:, 8], products[:, -5:].mean(1), rtol=1e-4)


def test_padding_in_front_changes_nothing() -> None:
    history = RNG.normal(size=(7, DIMENSION + TASTES)).astype(np.float32)
    padded = np.concatenate([np.zeros((5, DIMENSION + TASTES), np.float32), history])
    # The best of none known would be 0; here some cosine is positive for each candidate.
    assert ((RNG_CANDIDATES[:, :DIMENSION] @ history[:, :DIMENSION].T) > 0).any(1).all()
    np.testing.assert_allclose(made(padded, [-1] * 5 + list(range(7))), made(history, list(range(7))), rtol=1e-5)


def test_items_beyond_those_of_training_have_no_tastes() -> None:
    model = RankerModel(RankerConfig(DIMENSION, 2, TASTES))
    model.tastes.fill_(1.0)
    table = item_table(model, np.ones((3, DIMENSION), np.float32), np.zeros((3, 4), np.int32), torch.device("cpu"))
    assert table.vectors[:, DIMENSION:].sum(1).tolist() == [0, TASTES, TASTES, 0]


def test_before_training_the_order_is_that_of_the_users_vector() -> None:
    model = RankerModel(RankerConfig(DIMENSION))
    model.begin_as_retrieved()
    vectors = RNG.normal(size=(20, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scorer = Scorer(model, vectors, np.zeros((20, 4), np.int32), Calibration())
    batch = some_batch([3, 5], 20)
    logits = scorer.network.logits(batch, scorer.table)[0, :, 0]
    assert np.argsort(-logits).tolist() == np.argsort(-(vectors @ np.full(DIMENSION, 0.5))).tolist()
