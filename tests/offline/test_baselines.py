"""Baselines know what they have observed, and rank by it."""

import numpy as np
import pytest

from offline.baselines import Markov, Popularity, RecentPopularity, all_baselines

DAY = 86_400_000


def best(baseline, user="u", now_ms=0):
    return np.argsort(-baseline.scores(user, now_ms), kind="stable").tolist()


@pytest.mark.parametrize("baseline", all_baselines(4), ids=lambda baseline: baseline.name)
def test_before_any_event_all_items_are_alike(baseline):
    assert baseline.scores("u", 0).shape == (4,)
    assert len(set(baseline.scores("u", 0).tolist())) == 1


def test_popularity_is_the_count():
    baseline = Popularity(3)
    for row in (2, 2, 1):
        baseline.observe("u", row, 0)
    assert baseline.scores("anybody", 0).tolist() == [0, 1, 2]


def test_recent_popularity_forgets_after_its_window():
    baseline = RecentPopularity(3, window_days=7)
    for row in (1, 1, 1):
        baseline.observe("u", row, 0)
    baseline.observe("v", 2, 6 * DAY)
    assert best(baseline, now_ms=6 * DAY) == [1, 2, 0]
    assert best(baseline, now_ms=7 * DAY) == [2, 1, 0]
    # In silence it falls back on all time.
    assert best(baseline, now_ms=30 * DAY) == [1, 2, 0]


def test_markov_follows_the_last_item_of_the_user():
    baseline = Markov(5)
    for user in "abc":
        baseline.observe(user, 0, 0)
        baseline.observe(user, 3, 1)
    baseline.observe("d", 4, 0)
    baseline.observe("d", 4, 1)
    baseline.observe("e", 0, 2)
    assert best(baseline, "e")[0] == 3
    # No transition from 3: by popularity.
    assert best(baseline, "a")[:2] == [0, 3]
    assert best(baseline, "stranger")[:2] == [0, 3]


def test_scores_asked_for_earlier_do_not_change_what_markov_knows():
    baseline = Markov(3)
    baseline.observe("u", 0, 0)
    baseline.scores("u", 0)[:] = 100
    assert baseline.scores("u", 0).max() < 1
