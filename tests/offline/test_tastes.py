"""Tastes: items that the same people took are alike, and nothing later is known."""

import numpy as np
import pytest

from core.settings import Settings
from features.windows import UserEvent
from headrace.v1.events_pb2 import Item
from offline.training.tastes import TASTE_WIDTH, tastes_of

ITEMS = [Item(item_id=str(number)) for number in range(12)]


def events_of(lists: list[list[int]], start_ms: int = 0) -> list[UserEvent]:
    return [
        UserEvent(f"u{user}-{start_ms}", hash((user, item)), str(item), "click", start_ms + user)
        for user, items in enumerate(lists)
        for item in items
    ]


@pytest.fixture
def two_crowds() -> list[UserEvent]:
    rng = np.random.default_rng(0)
    return events_of([rng.permutation(5 if user % 2 else np.arange(5, 10))[:3].tolist() for user in range(60)])


def test_items_of_one_crowd_are_alike(two_crowds: list[UserEvent], settings: Settings) -> None:
    made = tastes_of(two_crowds, ITEMS, settings.features, 1000, 7)
    assert made.shape == (12, TASTE_WIDTH)
    products = made @ made.T
    assert abs(products[:5, 5:10]).max() < 1e-4
    assert np.linalg.norm(made[:10], axis=1).min() > 0.1
    # Nobody took them.
    assert not made[10:].any()


def test_later_events_are_not_known(two_crowds: list[UserEvent], settings: Settings) -> None:
    later = events_of([[0, 7, 11]] * 5, start_ms=1000)
    before = tastes_of(two_crowds, ITEMS, settings.features, 1000, 7)
    np.testing.assert_array_equal(tastes_of([*two_crowds, *later], ITEMS, settings.features, 1000, 7), before)
    assert tastes_of([*two_crowds, *later], ITEMS, settings.features, 2000, 7)[11].any()


def test_a_refusal_is_not_a_taste(settings: Settings) -> None:
    skips = [event._replace(kind="skip") for event in events_of([[1, 2, 3]] * 5)]
    assert not tastes_of(skips, ITEMS, settings.features, 1000, 7).any()


def test_no_event_gives_no_taste(settings: Settings) -> None:
    assert not tastes_of([], ITEMS, settings.features, 1000, 7).any()
