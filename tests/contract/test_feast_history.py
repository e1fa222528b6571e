"""Feast's offline side: point-in-time joins on the history derived from an event log."""

import pandas as pd
import pyarrow.parquet as pq
import pytest

from core.codec import from_ms
from core.settings import load_settings
from features import item_stats, windows
from features.stores import feast_repo
from features.stores.erasures import Erasure, Erasures
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, IMPRESSIONS, ITEMS, USERS, Source, deletions, to_table
from features.windows import Position, as_user_event
from headrace.v1.events_pb2 import Event, Impression, ImpressionList, Item, ItemStats, User
from offline import history
from offline.history import write_history

# Importing Feast warns about its own code, and so do its file sources.
pytestmark = pytest.mark.filterwarnings("ignore")

NOW_MS = 1_700_000_000_000
HOUR_MS = 3_600_000


def event(number: int, user_id: str) -> Event:
    return Event(event_id=f"e{number}", user_id=user_id, item_id=f"i{number}", kind="click", categories=["tea"],
                 event_time=from_ms(NOW_MS + number * HOUR_MS))  # fmt: skip


EVENTS_SENT = [event(number, "ada" if number % 3 else "bob") for number in range(12)]
# Of item i1, on the topic's partition 2: the last one is the first again.
STREAMED = [
    Event(event_id=f"s{number % 2}", user_id="eve", item_id="i1", kind="click",
          event_time=from_ms(NOW_MS + (30 + number) * HOUR_MS))
    for number in range(3)
]  # fmt: skip
STREAMED_FILE = "0000000000000003-p2-000000000000-000000000002"
SHOWN = ImpressionList(event_id="l", user_id="eve", event_time=from_ms(NOW_MS + 40 * HOUR_MS),
                       impressions=[Impression(item_id="i1"), Impression(item_id="i2")])  # fmt: skip


@pytest.fixture
def store(shared_redis, tmp_path, monkeypatch):
    settings = load_settings(overrides={"redis": {"url": shared_redis.url}, "features": {"project": "history"}})
    log = EventLog(tmp_path / "log")
    log.write(EVENTS, to_table(EVENTS, [*EVENTS_SENT, event(20, "gone")]), "import-00000")
    users = [User(user_id="ada", segment="anglers")]
    log.write(USERS, to_table(USERS, users, [Source("users", 0, 1, NOW_MS)]), "0000000000000001-p0-0-1")
    items = [Item(item_id="i1", title=title) for title in ("Old", "New", "Again")]
    places = [Source("items", 0, number, NOW_MS + hours * HOUR_MS) for number, hours in ((0, 1), (1, 5), (4, 9))]
    log.write(ITEMS, to_table(ITEMS, items, places), "0000000000000002-p0-0-4")
    gone = deletions(ITEMS, ["i1"], [Source("items", 0, 3, NOW_MS + 7 * HOUR_MS)])
    log.write(ITEMS, gone, "0000000000000002-p0-3-3")
    log.write(EVENTS, to_table(EVENTS, STREAMED, [Source("events", 2, n, NOW_MS) for n in range(3)]), STREAMED_FILE)
    log.write(IMPRESSIONS, to_table(IMPRESSIONS, [SHOWN]), "import-00000")
    Erasures(log.root).add(Erasure("gone", Position(1, 0, 5)))
    folder = tmp_path / "feast"
    assert vars(write_history(log.root, folder, settings))["user_state"] == len(EVENTS_SENT) + len(STREAMED)
    # Again: the folders are replaced.
    summary = write_history(log.root, folder, settings)
    assert (summary.user_state, summary.user_profile, summary.item_profile) == (15, 1, 4)
    # One of the streamed events is a duplicate: the sums are written again, as they are. Two were shown.
    assert summary.item_stats == len(EVENTS_SENT) + len(STREAMED) + 2
    monkeypatch.setenv(feast_repo.OFFLINE_VARIABLE, str(folder))
    registry = tmp_path / "registry.db"
    feast_repo.apply_feature_repo(settings, registry)
    return feast_repo.feature_store(settings, registry), settings


def test_a_full_last_file_stays(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(history, "_ROWS_PER_FILE", len(EVENTS_SENT) // 2)
    log = EventLog(tmp_path / "log")
    log.write(EVENTS, to_table(EVENTS, EVENTS_SENT), "import-00000")
    write_history(log.root, tmp_path / "out", load_settings())
    files = sorted((tmp_path / "out" / "user_state").iterdir())
    assert [pq.read_metadata(path).num_rows for path in files] == [6, 6]


def expected(user_id: str, as_of_ms: int, settings) -> bytes:
    state = windows.UserState()
    mine = [as_user_event(one) for one in EVENTS_SENT if one.user_id == user_id]
    windows.apply(state, [one for one in mine if one.time_ms <= as_of_ms], settings.features)
    return windows.encode(state)


def test_historical_features_are_the_states_of_their_moments(store) -> None:
    feast, settings = store
    moments = [("ada", 5 * HOUR_MS), ("ada", 7 * HOUR_MS + 1), ("bob", 3 * HOUR_MS - 1), ("bob", 99 * HOUR_MS)]
    asked = pd.DataFrame(
        {
            "user_id": [user_id for user_id, _ in moments],
            "event_timestamp": pd.to_datetime([NOW_MS + after for _, after in moments], unit="ms", utc=True),
        }
    )
    features = ["user_state:state", "user_state:revision", "user_profile:profile_segment"]
    rows = feast.get_historical_features(entity_df=asked, features=features).to_df()
    found = {(row.user_id, row.event_timestamp.value // 1_000_000): row for row in rows.itertuples()}
    for user_id, after in moments:
        row = found[user_id, NOW_MS + after]
        assert bytes(row.state) == expected(user_id, NOW_MS + after, settings)
        assert row.revision == windows.decode(bytes(row.state)).revision
        assert (row.profile_segment == "anglers") == (user_id == "ada")


def test_before_the_first_event_and_after_an_erasure_there_is_nothing(store) -> None:
    feast, _ = store
    asked = pd.DataFrame(
        {
            "user_id": ["ada", "gone"],
            "event_timestamp": pd.to_datetime([NOW_MS - 1, NOW_MS + 99 * HOUR_MS], unit="ms", utc=True),
        }
    )
    rows = feast.get_historical_features(entity_df=asked, features=["user_state:revision"]).to_df()
    assert rows["revision"].isna().all()


def asked_of(keys: dict[str, list[str]], *hours: float) -> pd.DataFrame:
    moments = [NOW_MS + round(after * HOUR_MS) for after in hours]
    return pd.DataFrame({**keys, "event_timestamp": pd.to_datetime(moments, unit="ms", utc=True)})


def test_an_item_is_as_it_was_described_at_the_moment(store) -> None:
    feast, _ = store
    hours = (0.5, 1, 6, 8, 10)
    asked = asked_of({"item_id": ["i1"] * len(hours)}, *hours)
    rows = feast.get_historical_features(entity_df=asked, features=["item_profile:title", "item_profile:item"]).to_df()
    rows = rows.sort_values("event_timestamp")
    # Described, described anew, removed, back. Of a moment before the first row Feast gives none.
    assert [None if pd.isna(title) else title for title in rows["title"]] == ["Old", "New", None, "Again"]
    assert [Item.FromString(bytes(raw)).title for raw in rows["item"] if raw is not None and not pd.isna(raw)] == [
        "Old", "New", "Again"
    ]  # fmt: skip


def test_statistics_of_an_item_are_the_sums_of_the_moment(store) -> None:
    feast, settings = store
    # i1: one imported event (hour 1), streamed ones (30, 31, a duplicate at 32), shown at 40.
    hours = {"-1": (0.5, 1, 39, 41), "2": (29, 30, 31.5, 99)}
    # Of a moment before the first row Feast gives none.
    expected = {"-1": [1, 1, 2], "2": [1, 2, 2]}
    asked = pd.concat(
        [
            asked_of({"item_id": ["i1"] * 4, "source_partition": [partition] * 4}, *moments)
            for partition, moments in hours.items()
        ]
    )
    features = ["item_stats:stats", "item_stats:revision"]
    rows = feast.get_historical_features(entity_df=asked, features=features).to_df().sort_values("event_timestamp")
    for partition, revisions in expected.items():
        mine = rows[rows["source_partition"] == partition]
        assert [None if pd.isna(number) else number for number in mine["revision"]] == revisions
    # Added up, as online: what a single pass over all events until then says.
    last = rows.groupby("source_partition").last()
    total = item_stats.add_up(item_stats.decode(ItemStats.FromString(bytes(raw))) for raw in last["stats"])
    single = item_stats.ItemPartial()
    for one in (EVENTS_SENT[1], *STREAMED[:2]):
        item_stats.apply(single, as_user_event(one), settings.features)
    item_stats.apply(single, windows.as_impression_event(SHOWN)._replace(item_id="i1"), settings.features)
    assert (total.revision, total.watermark_ms, total.kinds) == (single.revision, single.watermark_ms, single.kinds)
    assert [sums for _, sums in total.popularity] == pytest.approx([sums for _, sums in single.popularity])
