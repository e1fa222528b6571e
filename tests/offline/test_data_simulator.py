"""The simulated shop: repeatable, consistent in itself, and true to the truth that it says."""

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from core.clock import ManualClock
from core.codec import CHECKS, to_ms
from core.errors import ConfigError
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, from_table
from headrace.v1.events_pb2 import Event, ImpressionList
from offline.data.dataset import DatasetSummary
from offline.data.simulator import SimulatorConfig, simulate
from offline.data.simulator_world import CATEGORIES

END_MS = 1_790_000_000_000
CONFIG = SimulatorConfig(users=250, items=300, days=7, seed=3, events=12_000, end_time_ms=END_MS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture(scope="module")
def summary(root: Path) -> DatasetSummary:
    return simulate(CONFIG, root)


@pytest.fixture(scope="module")
def events(root: Path, summary: DatasetSummary) -> list[Event]:
    return list(from_table(EVENTS, EventLog(root).events()))


@pytest.fixture(scope="module")
def lists(root: Path, summary: DatasetSummary) -> list[ImpressionList]:
    return list(EventLog(root).impressions())


@pytest.fixture(scope="module")
def truth(root: Path, summary: DatasetSummary) -> dict[str, npt.NDArray[np.float32]]:
    return load_file(root / "truth.safetensors")


def number(name: str) -> int:
    return int(name[1:])


def test_there_is_about_as_much_as_asked_for(summary: DatasetSummary) -> None:
    assert summary.events == pytest.approx(12_000, rel=0.2)
    assert (summary.rows["items"], summary.rows["users"]) == (300, 250)
    assert set(summary.kinds) == {"click", "view", "dwell", "cart", "purchase"}
    assert summary.kinds["click"] > summary.kinds["cart"] > summary.kinds["purchase"] > 0


def test_the_same_seed_and_end_time_give_the_same_files(tmp_path: Path, root: Path, events: list[Event]) -> None:
    simulate(CONFIG, tmp_path)
    for name in ("events", "impressions", "items", "users"):
        first, second = (
            {p.relative_to(base): p.read_bytes() for p in base.glob(f"{name}/**/*.parquet")}
            for base in (root, tmp_path)
        )
        assert first == second
    assert (root / "truth.safetensors").read_bytes() == (tmp_path / "truth.safetensors").read_bytes()


def test_another_seed_replaces_it_with_something_else(tmp_path: Path) -> None:
    small = SimulatorConfig(users=20, items=40, days=2, end_time_ms=END_MS)
    simulate(small, tmp_path)
    first = EventLog(tmp_path).events()
    simulate(SimulatorConfig(users=20, items=40, days=2, seed=8, end_time_ms=END_MS), tmp_path)
    assert not EventLog(tmp_path).events().equals(first)
    assert (
        set(EventLog(tmp_path).events(columns=["event_id"])["event_id"].to_pylist())
        & set(first["event_id"].to_pylist())
        == set()
    )


def test_all_messages_pass_the_checks_of_the_topics(
    root: Path, events: list[Event], lists: list[ImpressionList]
) -> None:
    log = EventLog(root)
    for message in [*events, *lists, *log.items(), *log.users()]:
        CHECKS[type(message)](message)


def test_all_happens_in_the_days_before_the_end(events: list[Event]) -> None:
    times = [to_ms(event.event_time) for event in events]
    assert END_MS - 7 * 86_400_000 <= min(times) < END_MS - 6 * 86_400_000
    assert END_MS - 86_400_000 < max(times) < END_MS
    assert times == sorted(times)
    assert [event.event_id for event in events] == sorted(event.event_id for event in events)


def test_an_end_time_of_its_own_is_the_last_full_hour(tmp_path: Path) -> None:
    simulate(SimulatorConfig(users=5, items=20, days=1), tmp_path, clock=ManualClock(END_MS + 12_345))
    said = json.loads((tmp_path / "truth.json").read_text())["config"]["end_time_ms"]
    assert said == END_MS // 3_600_000 * 3_600_000


def test_nothing_is_shown_or_touched_before_it_is_published(
    root: Path, events: list[Event], lists: list[ImpressionList]
) -> None:
    published = {item.item_id: to_ms(item.publish_time) for item in EventLog(root).items()}
    start_ms = END_MS - 7 * 86_400_000
    new = {name for name, time_ms in published.items() if time_ms > start_ms}
    assert 10 < len(new) < 100
    assert all(published[event.item_id] <= to_ms(event.event_time) for event in events)
    assert all(published[i.item_id] <= to_ms(shown.event_time) for shown in lists for i in shown.impressions)
    assert new & {event.item_id for event in events}, "new items are found, too"


def test_a_click_is_on_an_item_of_its_list_after_it_was_shown(events: list[Event], lists: list[ImpressionList]) -> None:
    by_id = {shown.recommendation_id: shown for shown in lists}
    clicks = [event for event in events if event.kind == "click"]
    for click in clicks:
        shown = by_id[click.tags["recommendation_id"]]
        assert click.item_id in {impression.item_id for impression in shown.impressions}
        assert to_ms(shown.event_time) < to_ms(click.event_time)
        assert (shown.user_id, shown.session_id, shown.device) == (click.user_id, click.session_id, click.device)
    assert {event.kind for event in events if not event.tags} <= {"view", "dwell", "cart", "purchase"}


def test_lists_have_positions_propensities_and_each_item_once(lists: list[ImpressionList]) -> None:
    for shown in lists:
        assert [impression.position for impression in shown.impressions] == list(range(len(shown.impressions)))
        assert len({impression.item_id for impression in shown.impressions}) == len(shown.impressions)
        assert all(0 < impression.propensity <= 1 for impression in shown.impressions)
    assert {s for shown in lists for i in shown.impressions for s in i.sources} == {"trending", "batch", "item_to_item"}


def test_who_buys_has_put_it_into_the_cart_and_pays_its_price(root: Path, events: list[Event]) -> None:
    price = {item.item_id: item.price for item in EventLog(root).items()}
    carts = {(event.session_id, event.item_id) for event in events if event.kind == "cart"}
    purchases = [event for event in events if event.kind == "purchase"]
    assert all(
        (event.session_id, event.item_id) in carts and event.value == price[event.item_id] for event in purchases
    )
    assert all(0 < event.value <= 600 for event in events if event.kind == "dwell")


def test_events_carry_the_categories_of_their_items(root: Path, events: list[Event]) -> None:
    categories = {item.item_id: list(item.categories) for item in EventLog(root).items()}
    assert all(list(event.categories) == categories[event.item_id] for event in events)
    assert {names[1] for names in categories.values()} == set(CATEGORIES)


def test_true_affinity_shows_in_the_clicks(
    lists: list[ImpressionList], events: list[Event], truth: dict[str, npt.NDArray[np.float32]]
) -> None:
    """Of the items shown to a user, the clicked ones are nearer to the true interests."""
    clicked = {(event.tags["recommendation_id"], event.item_id) for event in events if event.kind == "click"}
    affinity, was_clicked = [], []
    for shown in lists:
        rows = [number(impression.item_id) for impression in shown.impressions]
        affinity.extend(truth["item_vectors"][rows] @ truth["user_interest_mean"][number(shown.user_id)])
        was_clicked.extend((shown.recommendation_id, impression.item_id) in clicked for impression in shown.impressions)
    flags = np.array(was_clicked)
    assert np.corrcoef(np.array(affinity), flags)[0, 1] > 0.1
    assert np.mean(np.array(affinity)[flags]) > np.mean(np.array(affinity)[~flags]) + 0.1


def test_what_stands_higher_is_clicked_more(lists: list[ImpressionList], events: list[Event]) -> None:
    clicked = {(event.tags["recommendation_id"], event.item_id) for event in events if event.kind == "click"}
    counts = Counter(
        impression.position
        for shown in lists
        for impression in shown.impressions
        if (shown.recommendation_id, impression.item_id) in clicked
    )
    assert counts[0] > 1.5 * counts[4] > 1.5 * counts[9] > 0


def test_the_next_item_is_like_the_last_one_of_the_session(
    events: list[Event], truth: dict[str, npt.NDArray[np.float32]]
) -> None:
    """More than the user's lasting interests say: that is what a sequence model can win."""
    sessions: dict[str, list[int]] = defaultdict(list)
    owner = {}
    for event in events:
        if event.kind in ("click", "view"):
            sessions[event.session_id].append(number(event.item_id))
            owner[event.session_id] = number(event.user_id)
    vectors = truth["item_vectors"]
    pairs = [(a, b, owner[name]) for name, items in sessions.items() for a, b in pairwise(items)]
    to_last = np.mean([vectors[a] @ vectors[b] for a, b, _ in pairs])
    to_interest = np.mean([truth["user_interest_mean"][user] @ vectors[b] for _, b, user in pairs])
    assert to_last > to_interest > 0.1


def test_interests_drift(truth: dict[str, npt.NDArray[np.float32]]) -> None:
    likeness = np.sum(truth["user_interest_start"] * truth["user_interest_end"], axis=1)
    assert 0.5 < np.mean(likeness) < 0.99
    assert np.allclose(np.linalg.norm(truth["user_interest_start"], axis=1), 1, atol=1e-5)


def test_texts_tell_the_category(root: Path) -> None:
    words: dict[str, set[str]] = defaultdict(set)
    for item in EventLog(root).items():
        assert item.title
        words[item.categories[1]] |= set(item.text.split())
    assert "belay" in words["outdoor/climbing"]
    assert all("belay" not in found for name, found in words.items() if name != "outdoor/climbing")


@pytest.mark.parametrize(
    ("users", "items", "days"), [(1, 20, 1), (30, 20, 2), (40, 2500, 3)], ids=["one user", "few items", "many items"]
)
def test_any_size(tmp_path: Path, users: int, items: int, days: int) -> None:
    summary = simulate(SimulatorConfig(users=users, items=items, days=days, end_time_ms=END_MS), tmp_path)
    assert summary.rows["items"] == items
    assert EventLog(tmp_path).events().num_rows == summary.events > 0


@pytest.mark.parametrize("wrong", [{"users": 0}, {"items": 5}, {"days": 0}, {"events": 10}])
def test_numbers_out_of_range_are_named(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        simulate(SimulatorConfig(**wrong), tmp_path)


def test_times_are_whole_in_the_log(root: Path, events: list[Event]) -> None:
    assert EventLog(root).events(columns=["event_time"]).schema.field("event_time").type == pa.timestamp("ms", "UTC")
