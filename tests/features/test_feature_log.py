"""Logged features: every bit kept, every row named by its revision, nothing of two moments mixed."""

import threading
import time

import numpy as np
import pytest

from core.errors import MalformedEventError
from core.settings import load_settings
from features import feature_log, item_stats, positions
from features.catalog import Catalog
from features.item_stats import ItemPartial
from features.vectors import CANDIDATE_FEATURES, ranker_input
from features.windows import Position, UserEvent, UserState, apply
from headrace.v1.events_pb2 import Item
from headrace.v1.feature_log_pb2 import LoggedFeatures, StatsRevisions

NOW_MS = 1_780_000_000_000
FEATURES = load_settings().features


def stats(item_id: str, partition: int, events: int, source: int = 9):
    partial = ItemPartial()
    for offset in range(events):
        event = UserEvent(
            "u", offset, item_id, "click", NOW_MS - 1000 + offset, position=Position(source, partition, offset)
        )
        item_stats.apply(partial, event, FEATURES)
    return item_stats.as_message(item_id, partition, partial, FEATURES)


@pytest.fixture
def catalog() -> Catalog:
    catalog = Catalog(FEATURES, with_revisions=True)
    for number in range(5):
        catalog.upsert(Item(item_id=f"i{number}", categories=[f"c{number}"], year=2000 + number))
    catalog.put_stats(stats("i1", -1, 3))
    catalog.put_stats(stats("i1", 2, 2))
    catalog.put_stats(stats("i2", 0, 1))
    return catalog


def noted(catalog: Catalog, item_ids: list[str]) -> LoggedFeatures:
    state = UserState()
    apply(
        state,
        [UserEvent("u", n, f"i{n}", "click", NOW_MS - 9000 + n, position=Position(9, 3, n)) for n in range(2)],
        FEATURES,
    )
    rows = catalog.rows(item_ids)
    scores, bits = np.linspace(0, 1, len(rows), dtype=np.float32), np.ones(len(rows), np.int32)
    made = ranker_input(state, catalog, rows, scores, bits, NOW_MS, FEATURES)
    return feature_log.note(state, item_ids, made, catalog, NOW_MS, "v1")


def test_the_numbers_and_the_revisions_survive_the_message(catalog: Catalog) -> None:
    logged = LoggedFeatures.FromString(noted(catalog, ["i1", "i4", "nowhere"]).SerializeToString())
    assert (logged.bundle_version, logged.as_of_time_ms, logged.candidate_count) == ("v1", NOW_MS, 3)
    assert (logged.state_revision, positions.of_entries(logged.state_offsets)) == (2, {(9, 3): 1})
    numbers = feature_log.read_numbers(logged)
    assert numbers.candidates.shape == (3, len(CANDIDATE_FEATURES))
    assert len(numbers.history_weights) == len(numbers.history_ages) == len(logged.history_digests) == 2
    rows = StatsRevisions.FromString(logged.stats_revisions[0]).revisions
    assert [(one.source_partition, one.revision, one.watermark_ms - NOW_MS) for one in rows] == [
        (-1, 3, -998), (2, 2, -999)
    ]  # fmt: skip
    assert positions.of_entries(rows[1].offsets) == {(9, 2): 1}
    assert logged.stats_revisions[1:] == [b"", b""]
    assert logged.item_digests[2] == 0


def test_a_digest_tells_descriptions_apart_by_what_features_read(catalog: Catalog) -> None:
    (before,) = catalog.digests(catalog.rows(["i3"]))
    catalog.upsert(Item(item_id="i3", categories=["c3"], year=2003, title="other words, the same features"))
    assert catalog.digests(catalog.rows(["i3"])) == [before]
    for change in ({"year": 2004}, {"price": 2.0}, {"categories": ["c3", "d"]}, {"categories": []}):
        catalog.upsert(Item(**{"item_id": "i3", "categories": ["c3"], "year": 2003, **change}))
        assert catalog.digests(catalog.rows(["i3"])) != [before]
    assert catalog.digests(catalog.rows([])) == []


def test_a_catalogue_that_nobody_asks_for_revisions_keeps_none() -> None:
    catalog = Catalog(FEATURES)
    catalog.put_stats(stats("i1", 0, 1))
    assert catalog.stats_revisions(catalog.rows(["i1"])) == [b""]


def test_what_is_kept_stays_together(catalog: Catalog) -> None:
    whole, cut = (noted(catalog, ["i0", "i1", "i2", "i3"]) for _ in range(2))
    feature_log.keep(cut, [2, 0])
    assert list(cut.item_ids) == ["i2", "i0"]
    numbers, before = feature_log.read_numbers(cut), feature_log.read_numbers(whole)
    np.testing.assert_array_equal(numbers.candidates, before.candidates[[2, 0]])
    assert list(cut.item_digests) == [whole.item_digests[2], whole.item_digests[0]]
    assert list(cut.stats_revisions) == [whole.stats_revisions[2], b""]
    assert feature_log.item_bytes(whole, 1) > feature_log.item_bytes(whole, 0) > 4 * len(CANDIDATE_FEATURES)
    feature_log.keep(cut, [])
    assert feature_log.read_numbers(cut).candidates.shape == (0, len(CANDIDATE_FEATURES))


def test_a_difference_in_one_bit_is_named(catalog: Catalog) -> None:
    one = feature_log.read_numbers(noted(catalog, ["i1", "i2"]))
    assert feature_log.differing(one, one) == []
    other = one._replace(candidates=one.candidates.copy(), user=one.user.copy())
    other.candidates[1, 2] = np.nextafter(other.candidates[1, 2], np.float32(9))
    other.user[0] = np.nan
    assert feature_log.differing(one, other) == ["user.log_events", CANDIDATE_FEATURES[2]]
    assert feature_log.differing(other, other) == []
    assert feature_log.differing(one, one._replace(history_ages=one.history_ages[1:])) == ["history_ages"]


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("feature_signature", "another", "signature"),
        ("user", b"\0" * 5, "features.user"),
        ("candidates", b"\0" * 96, "features.candidates"),
        ("history_ages", b"", "features.history_ages"),
    ],
)
def test_a_broken_message_names_its_field(catalog: Catalog, field: str, value: object, problem: str) -> None:
    logged = noted(catalog, ["i1", "i2"])
    setattr(logged, field, value)
    with pytest.raises(MalformedEventError, match=problem):
        feature_log.read_numbers(logged)
    short = noted(catalog, ["i1", "i2"])
    del short.item_digests[1:]
    with pytest.raises(MalformedEventError, match="differ in number"):
        feature_log.read_numbers(short)


def test_while_a_catalogue_is_held_its_rows_are_of_one_revision(catalog: Catalog) -> None:
    """Beside a writer: count, popularity and revision of an item belong to one another."""
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for events in (1, 4):
                catalog.put_stats(stats("i1", 2, events))

    writer = threading.Thread(target=write)
    writer.start()
    rows, seen = catalog.rows(["i1"]), set()
    end = time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < end:
        for _ in range(200):
            with catalog.held():
                clicks = int(catalog.column("clicks")[rows][0])
                time.sleep(0)
                total = int(catalog.column("stats_revision")[rows][0])
                parts = StatsRevisions.FromString(catalog.stats_revisions(rows)[0]).revisions
            assert clicks == total == sum(one.revision for one in parts)
            seen.add(clicks)
    done.set()
    writer.join()
    assert seen == {4, 7}
