"""The Feast SDK and the thin reader and writer see the same rows, both ways, on a real Redis."""

import time
import warnings
from datetime import UTC, datetime

import pytest

from core.settings import load_settings
from features.definitions import VIEWS, ColumnType
from features.stores.online import OnlineStore, Write

# Importing Feast warns about its own code.
pytestmark = pytest.mark.filterwarnings("ignore")

CELLS = {
    ColumnType.BYTES: b"\x00\xff bytes",
    ColumnType.STRING: "tëxt",
    ColumnType.INT64: -(2**53) - 1,
    ColumnType.DOUBLE: 0.1,
    ColumnType.STRINGS: ["a", "", "ü"],
    ColumnType.FLOATS: [0.5, -1.25, 3.0],
}
KEYS = {"user_id": "user-ä", "item_id": "item 1", "source_partition": "3", "segment": "all"}


@pytest.fixture(scope="module")
def house(shared_redis, tmp_path_factory):
    """Settings, the thin store, and a Feast store on the same Redis and project."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from features.stores import feast_repo

        settings = load_settings(overrides={"redis": {"url": shared_redis.url}, "features": {"project": "contract"}})
        registry = tmp_path_factory.mktemp("feast") / "registry.db"
        begin = time.perf_counter()
        count = feast_repo.apply_feature_repo(settings, registry)
        print(f"applied {count} objects in {time.perf_counter() - begin:.2f} s")
        # Applying again changes nothing and raises nothing.
        feast_repo.apply_feature_repo(settings, registry)
        return OnlineStore(settings.redis, "contract"), feast_repo.feature_store(settings, registry)


def cells_of(view) -> dict:
    return {column.name: CELLS[column.type] for column in view.columns}


def key_of(view) -> tuple:
    return tuple(KEYS[name] for name in view.join_keys)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_the_sdk_reads_what_the_thin_writer_wrote(house, view) -> None:
    thin, feast_store = house
    expected = cells_of(view)
    thin.write([Write(view, key_of(view), expected)])
    read = feast_store.get_online_features(
        features=[f"{view.name}:{name}" for name in expected],
        entity_rows=[{name: KEYS[name] for name in view.join_keys}],
    ).to_dict()
    assert {name: read[name][0] for name in expected} == expected


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_the_thin_reader_reads_what_the_sdk_wrote(house, view) -> None:
    import pandas as pd

    thin, feast_store = house
    keys = {name: f"sdk {value}" for name, value in KEYS.items() if name in view.join_keys}
    expected = cells_of(view)
    now = datetime.now(UTC)
    frame = pd.DataFrame(
        {
            **{name: [value] for name, value in {**keys, **expected}.items()},
            "event_timestamp": [now],
            "created_timestamp": [now],
        }
    )
    if view.streamed:
        feast_store.push(f"{view.name}_push", frame)
    else:
        feast_store.write_to_online_store(view.name, frame)
    (row,) = thin.read(view, [tuple(keys[name] for name in view.join_keys)])
    assert dict(row.cells) == expected
    assert row.time_ms == pytest.approx(now.timestamp() * 1000, abs=1)


def test_a_feature_service_reads_all_its_views_at_once(house) -> None:
    thin, feast_store = house
    for view in VIEWS:
        thin.write([Write(view, key_of(view), cells_of(view))])
    service = feast_store.get_feature_service("serving_v1")
    read = feast_store.get_online_features(
        features=service, entity_rows=[{name: KEYS[name] for name in ("user_id", "segment")}]
    ).to_dict()
    assert read["embedding_revision"] == [CELLS[ColumnType.INT64]]
    assert read["popular_item_ids"] == [CELLS[ColumnType.STRINGS]]


def test_the_thin_writer_wins_over_an_older_row_of_the_sdk_and_the_other_way_round(house) -> None:
    """Feast drops writes that are not newer than the row: the row's time must be the time of the write."""
    import pandas as pd

    thin, feast_store = house
    view = next(view for view in VIEWS if view.name == "user_embedding")

    def push(version: str) -> None:
        now = datetime.now(UTC)
        cells = {**cells_of(view), "embedding_version": version, "user_id": "both"}
        frame = pd.DataFrame({name: [value] for name, value in cells.items()})
        frame["event_timestamp"] = frame["created_timestamp"] = now
        feast_store.push("user_embedding_push", frame)

    def stored() -> str:
        return thin.read(view, [("both",)])[0].cells["embedding_version"]

    push("sdk")
    thin.write([Write(view, ("both",), {**cells_of(view), "embedding_version": "thin"})])
    assert stored() == "thin"
    time.sleep(0.002)
    push("sdk again")
    assert stored() == "sdk again"
