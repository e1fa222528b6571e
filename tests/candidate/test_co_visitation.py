"""Co-visitation: the pairs follow from the log alone, however it is delivered, and stay within their bounds."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candidate.co_visitation import CoVisitation, load_co_visitation
from candidate.pair_counts import PRIOR_WEIGHT, PairCounts
from core.bundle import CO_VISITATION, CO_VISITATION_FACTS
from core.errors import ArtifactError
from core.settings import CoVisitationSettings, load_settings
from features.windows import Position, UserEvent

T0_MS = 1_700_000_000_000
WINDOW_MS = 600_000
HALF_LIFE_MS = 3_600_000
FEATURES = load_settings().features
SOURCE = 7


def made(**changes: int) -> CoVisitation:
    values = {
        "window_seconds": WINDOW_MS // 1000,
        "window_events": 50,
        "half_life_seconds": HALF_LIFE_MS // 1000,
        "neighbours_max": 100,
        "pairs_max": 100_000,
        "users_max": 1000,
    }
    return CoVisitation(CoVisitationSettings(**{**values, **changes}), FEATURES)


def event(
    number: int, user: int, item: int, time_ms: int = T0_MS, kind: str = "click", partition: int | None = None
) -> UserEvent:
    position = None if partition is None else Position(SOURCE, partition, number)
    return UserEvent(f"user-{user}", 1000 + number, f"item-{item}", kind, time_ms, position=position)


def found(pairs: CoVisitation, item: int, now_ms: int = T0_MS) -> dict[str, float]:
    names, similarity = pairs.similar([f"item-{item}"], now_ms)
    return dict(zip(names, similarity.tolist(), strict=True))


def everything(pairs: CoVisitation, items: int, now_ms: int = T0_MS) -> list[dict[str, float]]:
    return [found(pairs, item, now_ms) for item in range(items)]


def same(one: list[dict[str, float]], other: list[dict[str, float]]) -> bool:
    return all(
        a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-9) for k in a)
        for a, b in zip(one, other, strict=True)
    )


def by_definition(events: Sequence[UserEvent], now_ms: int) -> list[dict[str, float]]:
    """The similarities, straight from what a pair is."""
    weights: defaultdict[tuple[str, str], float] = defaultdict(float)
    totals: defaultdict[str, float] = defaultdict(float)
    for one, two in combinations({e.event_hash: e for e in events}.values(), 2):
        apart = abs(one.time_ms - two.time_ms)
        if one.user_id == two.user_id and one.item_id != two.item_id and apart <= WINDOW_MS:
            kinds = FEATURES.kind_weights
            weight = min(kinds[one.kind], kinds[two.kind])
            weight *= 2.0 ** ((max(one.time_ms, two.time_ms) - now_ms) / HALF_LIFE_MS)
            for a, b in ((one.item_id, two.item_id), (two.item_id, one.item_id)):
                weights[a, b] += weight
                totals[a] += weight
    similar: list[dict[str, float]] = [{} for _ in range(8)]
    for (a, b), weight in weights.items():
        norm = ((totals[a] + PRIOR_WEIGHT) * (totals[b] + PRIOR_WEIGHT)) ** 0.5
        similar[int(a.removeprefix("item-"))][b] = weight / norm
    return similar


steps = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 7), st.integers(0, 3 * WINDOW_MS), st.sampled_from(["view", "click", "cart"])
    ),
    max_size=40,
)


@given(steps, st.data())
@settings(max_examples=150)
def test_any_delivery_of_the_same_messages_gives_the_pairs_of_the_definition(
    chosen: list[tuple[int, int, int, str]], data: st.DataObject
) -> None:
    """Partitions may come in any order to each other, in batches of any size, again and again from anywhere."""
    log: list[list[UserEvent]] = [[], []]
    for number, (user, item, ms, kind) in enumerate(chosen):
        log[user % 2].append(event(number, user, item, T0_MS + ms, kind, user % 2))
    pairs = made()
    at = [0, 0]
    while any(at[p] < len(log[p]) for p in (0, 1)):
        partition = data.draw(st.sampled_from([p for p in (0, 1) if at[p] < len(log[p])]))
        start = data.draw(st.integers(0, at[partition]))
        end = data.draw(st.integers(at[partition] + 1, len(log[partition])))
        pairs.apply(log[partition][start:end])
        at[partition] = end
    now_ms = T0_MS + 3 * WINDOW_MS
    assert same(everything(pairs, 8, now_ms), by_definition([e for part in log for e in part], now_ms))


@given(steps, st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_duplicates_and_late_events_change_nothing(chosen: list[tuple[int, int, int, str]], random: object) -> None:
    events = [event(number, user, item, T0_MS + ms, kind) for number, (user, item, ms, kind) in enumerate(chosen)]
    shuffled = [*events, *events]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    pairs = made(window_events=100)
    pairs.apply(shuffled)
    now_ms = T0_MS + 3 * WINDOW_MS
    assert same(everything(pairs, 8, now_ms), by_definition(events, now_ms))


def test_batching_makes_no_difference_also_where_pairs_have_to_go() -> None:
    """Three thousand items on two hundred places: what goes depends on the order of the log alone."""
    rng = np.random.default_rng(3)
    events = [
        event(number, int(rng.integers(20)), int(rng.zipf(1.3) % 3000), T0_MS + number * 1000)
        for number in range(20_000)
    ]
    one, other = (made(neighbours_max=5, pairs_max=200, users_max=10, window_events=8) for _ in range(2))
    one.apply(events)
    for start in range(0, len(events), 7):
        other.apply(events[start : start + 7])
    now_ms = events[-1].time_ms
    assert everything(one, 100, now_ms) == everything(other, 100, now_ms)
    assert any(everything(one, 100, now_ms))


def test_partitions_may_be_read_one_after_the_other_also_where_windows_overflow() -> None:
    """As a replica does that starts late."""
    rng = np.random.default_rng(4)
    log = [
        event(number, user, int(rng.integers(30)), T0_MS + number * 500, partition=user % 3)
        for number, user in enumerate(rng.integers(0, 60, 3000).tolist())
    ]
    one, other = (made(window_events=4, users_max=10) for _ in range(2))
    one.apply(log)
    for partition in (2, 0, 1):
        other.apply(e for e in log if e.position is not None and e.position.partition == partition)
    now_ms = log[-1].time_ms
    assert same(everything(one, 30, now_ms), everything(other, 30, now_ms))


def test_only_interactions_that_say_more_of_this_make_pairs() -> None:
    pairs = made()
    pairs.apply([event(0, 0, 0), event(1, 0, 1, kind="skip"), event(2, 0, 2, kind="impression")])
    pairs.apply([UserEvent("user-0", 3, "item-3", "rating", T0_MS, value=1.0)])
    assert pairs.pair_count == 0
    pairs.apply([event(4, 0, 4), event(5, 1, 5)])
    assert list(found(pairs, 0)) == ["item-4"]


def test_an_old_pair_weighs_half_after_each_half_life() -> None:
    pairs = PairCounts(HALF_LIFE_MS, 10, 100)
    # So many that the prior does not matter.
    pairs.add("a", T0_MS, [("b", T0_MS, 1e9)])
    pairs.add("a", T0_MS + HALF_LIFE_MS, [("c", T0_MS + HALF_LIFE_MS, 1e9)])
    for now_ms in (T0_MS + HALF_LIFE_MS, T0_MS + 5 * HALF_LIFE_MS):
        names, similarity = pairs.similar(["a"], now_ms)
        # b: 1 of a's 3, all of its own; c: 2 of 3.
        expected = {"b": (1 / 3) ** 0.5, "c": (2 / 3) ** 0.5}
        assert dict(zip(names, similarity.tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ahead", [1, 65, 900, 100_000])
def test_time_may_jump_ahead_by_any_number_of_half_lives(ahead: int) -> None:
    pairs = PairCounts(HALF_LIFE_MS, 10, 100)
    pairs.add("a", T0_MS, [("b", T0_MS, 1.0)])
    later_ms = T0_MS + ahead * HALF_LIFE_MS
    pairs.add("a", later_ms, [("c", later_ms, 1.0)])
    pairs.add("a", T0_MS, [("d", T0_MS, 1.0)])
    names, similarity = pairs.similar(["a"], later_ms)
    assert np.isfinite(similarity).all()
    assert names[int(np.argmax(similarity))] == "c"


def test_an_item_that_goes_with_several_is_more_similar_than_with_one() -> None:
    pairs = made()
    for user in range(10):
        pairs.apply([event(3 * user + n, user, item) for n, item in enumerate((0, 1, 2) if user < 5 else (0, 3, 4))])
    names, similarity = pairs.similar(["item-0", "item-1"], T0_MS)
    values = dict(zip(names, similarity.tolist(), strict=True))
    assert values["item-2"] > values["item-3"]
    assert values["item-3"] == pytest.approx(found(pairs, 0)["item-3"])
    assert all(0 < value < 1 for value in values.values())


def test_memory_is_bounded_and_the_heaviest_pairs_stay() -> None:
    rng = np.random.default_rng(1)
    pairs = made(neighbours_max=20, pairs_max=2000, users_max=50)
    number = 0
    for round_ in range(400):
        # Two items that all meet, and a crowd that nobody meets twice.
        for user in range(5):
            user_id, ms = 5 * round_ + user, T0_MS + round_ * 1000
            crowd = rng.integers(10, 1_000_000, 12).tolist()
            pairs.apply([event(number + n, user_id, item, ms) for n, item in enumerate([0, 1, *crowd])])
            number += 14
    assert pairs.user_count <= 50
    # The merged part has its bound, the delta its own.
    assert pairs.pair_count <= 2000 + 20_001 + 200
    assert max(found(pairs, 0), key=found(pairs, 0).__getitem__) == "item-1"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[CoVisitation], Path]:
    def save(pairs: CoVisitation) -> Path:
        pairs.save(tmp_path)
        return tmp_path

    return save


def again(folder: Path, **changes: int) -> CoVisitation:
    return load_co_visitation(folder, made(**changes)._settings, FEATURES)


@pytest.mark.parametrize("cut", [0, 1, 57, 199, 200])
def test_who_starts_from_a_bundle_agrees_with_who_was_there_from_the_start(
    saved: Callable[[CoVisitation], Path], cut: int
) -> None:
    """The bundle's last messages come again, for the users' windows: they must not count twice."""
    rng = np.random.default_rng(cut)
    log = [event(n, int(rng.integers(6)), int(rng.integers(8)), T0_MS + n * 20_000, partition=0) for n in range(200)]
    undisturbed, trained = made(), made()
    undisturbed.apply(log)
    trained.apply(log[:cut])
    restarted = again(saved(trained))
    restarted.apply(log[max(0, cut - 60) :])
    now_ms = log[-1].time_ms
    assert same(everything(restarted, 8, now_ms), everything(undisturbed, 8, now_ms))


def test_a_bundle_keeps_the_rule_that_it_was_made_by(saved: Callable[[CoVisitation], Path]) -> None:
    pairs = made()
    pairs.apply([event(0, 0, 0), event(1, 0, 1)])
    loaded = again(saved(pairs), half_life_seconds=1, window_seconds=1)
    assert loaded.rule == pairs.rule
    assert found(loaded, 0, T0_MS + HALF_LIFE_MS) == pytest.approx(found(pairs, 0, T0_MS + HALF_LIFE_MS))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _without_an_item(path: Path) -> None:
    facts = json.loads(path.read_text())
    facts["item_ids"] = facts["item_ids"][:-1]
    path.write_text(json.dumps(facts))


def _of_another_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (CO_VISITATION, _cut),
        (CO_VISITATION_FACTS, _cut),
        (CO_VISITATION, Path.unlink),
        (CO_VISITATION_FACTS, Path.unlink),
        (CO_VISITATION_FACTS, _without_an_item),
        (CO_VISITATION_FACTS, _of_another_format),
    ],
    ids=["arrays cut", "facts cut", "no arrays", "no facts", "of other items", "another format"],
)
def test_files_that_do_not_fit_are_refused(
    saved: Callable[[CoVisitation], Path], name: str, damage: Callable[[Path], None]
) -> None:
    pairs = made()
    pairs.apply([event(n, 0, n) for n in range(4)])
    folder = saved(pairs)
    damage(folder / name)
    with pytest.raises(ArtifactError, match=r"co.visitation"):
        again(folder)
