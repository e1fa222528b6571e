"""Feast's offline side: point-in-time joins on the history derived from an event log."""

import pandas as pd
import pyarrow.parquet as pq
import pytest

from core.codec import from_ms
from core.settings import load_settings
from features import windows
from features.stores import feast_repo
from features.stores.erasures import Erasure, Erasures
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, USERS, Source, to_table
from features.windows import Position, as_user_event
from headrace.v1.events_pb2 import Event, User
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


@pytest.fixture
def store(shared_redis, tmp_path, monkeypatch):
    settings = load_settings(overrides={"redis": {"url": shared_redis.url}, "features": {"project": "history"}})
    log = EventLog(tmp_path / "log")
    log.write(EVENTS, to_table(EVENTS, [*EVENTS_SENT, event(20, "gone")]), "import-00000")
    users = [User(user_id="ada", segment="anglers")]
    log.write(USERS, to_table(USERS, users, [Source("users", 0, 1, NOW_MS)]), "0000000000000001-p0-0-1")
    Erasures(log.root).add(Erasure("gone", Position(1, 0, 5)))
    folder = tmp_path / "feast"
    assert vars(write_history(log.root, folder, settings))["user_state"] == len(EVENTS_SENT)
    # Again: the folders are replaced.
    summary = write_history(log.root, folder, settings)
    assert (summary.user_state, summary.user_profile) == (len(EVENTS_SENT), 1)
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
