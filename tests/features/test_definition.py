"""Rows of two feature definitions never meet in one project."""

import pytest

from core.errors import StageError
from core.settings import FeaturesSettings, load_settings
from features import windows
from features.stores.definition import DefinitionChangedError, check_definition
from features.stores.online import OnlineStore


def features(**changes) -> FeaturesSettings:
    return load_settings(overrides={"features": changes}).features


@pytest.fixture
def store(shared_redis, request):
    settings = load_settings(overrides={"redis": {"url": shared_redis.url}})
    store = OnlineStore(settings.redis, request.node.name)
    yield store
    store.close()


def test_the_first_one_is_kept_and_the_same_passes(store) -> None:
    check_definition(store, features())
    check_definition(store, features())
    # These say how rows are read, not what is in them.
    check_definition(store, features(session_gap_seconds=7, positive_kinds=["click"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"half_lives_seconds": [60]},
        {"history_length": 3},
        {"duplicate_horizon": 999},
        {"category_buckets": 8},
        {"kind_weights": {"default": 0.5}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_one_is_refused_with_what_changed_and_what_to_run(store, changes) -> None:
    check_definition(store, features())
    with pytest.raises(DefinitionChangedError) as refused:
        check_definition(store, features(**changes))
    text = str(refused.value)
    assert f"{next(iter(changes))} was " in text
    assert "headrace rebuild --project NEW" in text
    check_definition(store, features())


def test_another_encoding_of_states_is_another_definition(store, monkeypatch) -> None:
    check_definition(store, features())
    monkeypatch.setattr(windows, "ENCODING", windows.ENCODING + 1)
    with pytest.raises(DefinitionChangedError, match="encoding was 1, is 2"):
        check_definition(store, features())


def test_a_store_that_is_away_is_no_change() -> None:
    settings = load_settings(overrides={"redis": {"url": "redis://127.0.0.1:9/0"}})
    with pytest.raises(StageError):
        check_definition(OnlineStore(settings.redis, "p"), settings.features)
