"""What serving reads beside the bundle: the editors' rules, and its own note of what may not be shown."""

import json
import os

import pytest

from core.bundle import Manifest
from core.errors import ArtifactError
from core.settings import load_settings
from features.catalog import Catalog
from headrace.v1.events_pb2 import Item
from serving.rules_file import RulesFile
from serving.withheld import Withheld

from .conftest import NOWHERE, until
from .test_tiers import ask, ids

MANIFEST = Manifest("v1", "t", "i", "m", "s", 1000, 0, 8, 3)


def catalogue() -> Catalog:
    catalog = Catalog(load_settings().features)
    for name in ("a", "b", "c"):
        catalog.upsert(Item(item_id=name))
    return catalog


def available(catalog) -> list[bool]:
    return catalog.column("available").tolist()


def test_what_was_taken_from_sale_is_known_at_the_next_start(tmp_path) -> None:
    first, kept = catalogue(), Withheld(tmp_path)
    kept.apply(first, MANIFEST)
    first.upsert(Item(item_id="b", available=False))
    kept.keep(first, MANIFEST, 2000)
    again = catalogue()
    Withheld(tmp_path).apply(again, MANIFEST)
    assert available(again) == [True, False, True]


def test_what_came_back_is_known_too(tmp_path) -> None:
    first, kept = catalogue(), Withheld(tmp_path)
    kept.apply(first, MANIFEST)
    first.remove("b")
    kept.keep(first, MANIFEST, 2000)
    first.upsert(Item(item_id="b"))
    kept.keep(first, MANIFEST, 3000)
    again = catalogue()
    Withheld(tmp_path).apply(again, MANIFEST)
    assert available(again) == [True, True, True]


def test_a_bundle_made_afterwards_knows_better(tmp_path) -> None:
    first, kept = catalogue(), Withheld(tmp_path)
    kept.apply(first, MANIFEST)
    first.remove("b")
    kept.keep(first, MANIFEST, 2000)
    again = catalogue()
    Withheld(tmp_path).apply(again, Manifest("v2", "t", "i", "m", "s", 2500, 0, 8, 3))
    assert available(again) == [True, True, True]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "item_ids": 3}', "\x00"])
def test_a_broken_note_is_left_out(tmp_path, content) -> None:
    (tmp_path / "withheld.json").write_text(content)
    catalog = catalogue()
    Withheld(tmp_path).apply(catalog, MANIFEST)
    assert available(catalog) == [True, True, True]


async def test_a_cold_start_with_everything_down_shows_nothing_that_was_taken_from_sale(house, tmp_path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    note = {"format": 1, "written_time_ms": 4_000_000_000_000, "item_ids": ["item-000", "item-002"]}
    (folder / "withheld.json").write_text(json.dumps(note))
    house.overrides.update(redis="redis://" + NOWHERE, kafka=NOWHERE)
    recommender, _ = await house.open(candidate_target=NOWHERE, ranker_target=NOWHERE, state_path=str(folder))
    assert ids(await recommender.Recommend(ask()))[:2] == ["item-001", "item-003"]


def write(path, content) -> None:
    """Whole or not at all, as an editor's tool should."""
    new = path.with_suffix(".new")
    new.write_text(content)
    os.replace(new, path)


def test_new_rules_hold_and_bad_ones_do_not(tmp_path) -> None:
    path = tmp_path / "rules.json"
    rules = RulesFile(str(path))
    assert rules.current is None
    write(path, '{"pin": [{"item_id": "a", "position": 0}]}')
    assert rules.read_again().pin[0].item_id == "a"
    assert rules.read_again() is None, "nothing has changed"
    write(path, '{"pin": [{"item_id": "b", "position": -1}]}')
    assert rules.read_again() is None
    assert rules.current.pin[0].item_id == "a"
    path.unlink()
    assert rules.read_again() is None
    assert rules.current.pin[0].item_id == "a"


@pytest.mark.parametrize(
    ("content", "where"),
    [("{", "line 1"), ('{"pin": [{"item_id": "a", "position": 900}]}', "pin.0.position"), ('{"pins": []}', "pins")],
)
def test_a_start_with_bad_rules_says_where(tmp_path, content, where) -> None:
    path = tmp_path / "rules.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=where):
        RulesFile(str(path))


async def test_rules_change_answers_without_a_restart(house, tmp_path) -> None:
    house.put_user()
    path = tmp_path / "rules.json"
    recommender, _ = await house.open(rules_path=str(path))
    assert ids(await recommender.Recommend(ask()))[0] != "item-150"
    write(path, '{"pin": [{"item_id": "item-150", "position": 0}]}')

    async def is_pinned() -> bool:
        return ids(await recommender.Recommend(ask()))[0] == "item-150"

    await until(is_pinned)
    write(path, '{"pin": [{"item_id": "item-150", "position": "first"}]}')
    assert await is_pinned()
