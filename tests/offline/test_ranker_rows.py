"""The ranker's training rows: which questions a log holds, what is retrieved for them, what their features may know."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from candidate.co_visitation import CoVisitation
from candidate.encoder import UserEncoder
from candidate.snapshot import Snapshot
from candidate.sources import CoVisitationSource, Query
from core.settings import Settings
from features import windows
from features.catalog import Catalog
from features.stores.event_log import EventLog
from features.vectors import CANDIDATE_FEATURES, WholeList, ranker_input
from features.windows import UserEvent
from offline.co_visitation import PairsTimeline
from offline.replay import Replay, Shown, read_entries
from offline.training.ranker_candidates import (
    ANN,
    CO_VISITATION,
    ITEM_TO_ITEM,
    CandidateSources,
    Moment,
    Pool,
    draw,
)
from offline.training.ranker_questions import Question, questions_of
from offline.training.ranker_rows import RowMaker
from offline.training.ranker_timeline import Timeline

from .conftest import T0_MS, untrained_towers

MINUTE_MS = 60_000


class TestQuestions:
    def make(self, entries: Sequence[UserEvent | Shown], settings: Settings) -> list[Question]:
        return questions_of(entries, settings)

    def test_what_follows_a_list_answers_it(self, small: Settings) -> None:
        questions = self.make(
            [
                shown("u", 0, "a", "b", "c"),
                event("u", 1, "b", "click"),
                event("u", 2, "b", "purchase"),
                event("u", 2, "c", "dwell", 60),
            ],
            small,
        )
        (question,) = questions
        assert question.shown
        assert question.click == {"a": 0.0, "b": 1.0, "c": 1.0}
        assert list(question.click) == ["a", "b", "c"]
        assert question.conversion == {"b": 1.0}
        assert question.value == {"c": 0.5}

    def test_what_comes_a_session_later_is_a_question_of_its_own(self, small: Settings) -> None:
        first, second = self.make([shown("u", 0, "a"), event("u", 31, "a", "click")], small)
        assert first.click == {"a": 0.0}
        assert (second.shown, second.time_ms, second.click) == (False, T0_MS + 31 * MINUTE_MS, {"a": 1.0})

    def test_events_of_one_moment_are_one_question(self, small: Settings) -> None:
        (question,) = self.make([event("u", 0, "a", "click"), event("u", 0, "b", "view")], small)
        assert question.click == {"a": 1.0, "b": 1.0}

    def test_a_low_rating_is_a_choice_of_little_value(self, small: Settings) -> None:
        good, bad = self.make([event("u", 0, "a", "rating", 3.5), event("u", 1, "b", "rating", 1)], small)
        assert (good.click, good.value) == ({"a": 1.0}, {"a": pytest.approx(3 / 4.5)})
        assert (bad.click, bad.value) == ({"b": 1.0}, {"b": pytest.approx(0.5 / 4.5)})

    def test_what_may_not_be_recommended_again_asks_nothing(self, small: Settings) -> None:
        questions = self.make([event("u", 0, "a", "purchase"), event("u", 60, "a", "click")], small)
        assert [question.time_ms for question in questions] == [T0_MS]

    def test_kinds_that_wish_for_nothing_ask_nothing(self, small: Settings) -> None:
        assert self.make([event("u", 0, "a", "skip")], small) == []

    def test_other_users_answer_nothing(self, small: Settings) -> None:
        first, second = self.make([shown("u", 0, "a"), event("v", 1, "a", "click")], small)
        assert first.click == {"a": 0.0}
        assert second.user_id == "v"


def event(user_id: str, minute: int, item_id: str, kind: str, value: float = 1.0) -> UserEvent:
    return UserEvent(user_id, hash((user_id, minute, item_id, kind)), item_id, kind, T0_MS + minute * MINUTE_MS, value)


def shown(user_id: str, minute: int, *item_ids: str) -> Shown:
    return Shown(UserEvent(user_id, minute, "", "impression", T0_MS + minute * MINUTE_MS), item_ids)


def test_the_timeline_has_the_histories_of_the_states(shop: EventLog, small: Settings) -> None:
    entries, items = list(read_entries(shop)), list(shop.items())
    replay = Replay(items, small.features)
    timeline = Timeline(entries, replay.catalog, small.features)
    looked_at = 0
    for group in replay.groups(entries):
        looked_at += 1
        if looked_at % 23 == 0:
            assert timeline.history_before(group.user_id, group.time_ms) == replay.state(group.user_id).history
            np.testing.assert_allclose(
                timeline.popularity(group.time_ms), replay.catalog.popularity(group.time_ms, 0), rtol=1e-4, atol=1e-6
            )
            shared = timeline.known(group.time_ms) & ~replay.known_items(group.time_ms)
            assert not shared.any()
    assert looked_at > 500


def test_a_drawn_list_has_its_head_and_stands_for_the_whole() -> None:
    by_vector = np.random.default_rng(0).permutation(200).astype(np.float32)
    pool = Pool(None, np.arange(1000, 1200, dtype=np.int32), by_vector, np.full(200, ANN))
    avoid = np.array([1000, 1001], np.int32)
    rows, weights = draw(pool, by_vector, avoid, 40, np.random.default_rng(1))
    assert len(rows) == len(set(rows.tolist())) == 40
    assert not np.isin(rows, avoid).any()
    best = [int(row) for row in 1000 + np.argsort(-by_vector) if row not in avoid]
    assert rows[:20].tolist() == best[:20]
    assert weights[:20].tolist() == [1.0] * 20
    assert weights.sum() == pytest.approx(198)
    few, alone = draw(pool, by_vector, avoid, 1000, np.random.default_rng(1))
    assert (len(few), alone.tolist()) == (198, [1.0] * 198)


def moment_of(replay: Replay, pairs: CoVisitation, now_ms: int) -> Moment:
    catalog = replay.catalog
    popularity = catalog.popularity(now_ms, 0)
    return Moment(catalog.servable(now_ms), popularity, catalog.column("publish_ms"), pairs, now_ms)


def test_features_know_nothing_of_their_own_time(tastes: EventLog, small: Settings) -> None:
    """A row equals what the request computes, as part of its list, from a replay that stops before the question."""
    items = list(tastes.items())
    towers = untrained_towers(items, small)
    entries = list(read_entries(tastes))
    encoder = UserEncoder(towers.towers, small.features)
    sources = CandidateSources(encoder, towers.item_vectors, small)
    questions = questions_of(entries, small)[200:800:60]
    maker = RowMaker(entries, items, sources, small)
    drawn, lists = (maker.make(questions, [whole] * len(questions), lambda _: None) for whole in (False, True))
    retrieval_score, first_source = (CANDIDATE_FEATURES.index(name) for name in ("retrieval_score", "from_ann"))
    moment, parts = None, 0
    for question, row, listed in zip(questions, drawn, lists, strict=True):
        assert row is not None
        assert listed is not None
        replay = Replay(items, small.features)
        before = [entry for entry in entries if entry.time_ms < question.time_ms]
        replay.advance(before)
        bits = np.zeros(len(row.labels), np.int32)
        scores = row.features.candidates[:, retrieval_score]
        state = replay.state(question.user_id)
        whole = WholeList(listed.features.candidate_rows, listed.features.candidates[:, retrieval_score])
        parts += len(row.labels) < len(whole.rows)
        again = ranker_input(
            state, replay.catalog, row.features.candidate_rows, scores, bits, question.time_ms, small.features, whole
        )
        np.testing.assert_array_equal(row.features.candidates[:, :first_source], again.candidates[:, :first_source])
        np.testing.assert_array_equal(row.features.history_rows, again.history_rows)
        np.testing.assert_array_equal(row.features.user, again.user)
        vectors, known = encoder.encode([state], replay.catalog, towers.item_vectors)
        assert (row.user_vector is not None) == bool(known[0])
        if row.user_vector is not None:
            np.testing.assert_allclose(row.user_vector, vectors[0], atol=1e-5)
        # What there is to retrieve is looked up for many questions together, as of the first.
        moment = moment or moment_of(replay, PairsTimeline(before, small).before(question.time_ms), question.time_ms)
        (pool,) = sources.pools([state], replay.catalog, moment)
        seen = replay.catalog.rows(windows.recent_items(state, frozenset(small.serving.exclude_seen_kinds)))
        assert set(whole.rows.tolist()) == set(pool.rows.tolist()) - set(seen.tolist())
        np.testing.assert_allclose(whole.scores, sources.provenance(pool, whole.rows)[0], rtol=1e-4, atol=1e-5)
        clicked = {item for item, label in question.click.items() if label > 0}
        positive = row.features.candidate_rows[row.labels[:, 0] > 0]
        assert {replay.catalog.item_ids[row_] for row_ in positive} == clicked
    assert parts > 2


def test_sources_bring_what_the_candidate_service_would(tastes: EventLog, small: Settings) -> None:
    items = list(tastes.items())
    towers = untrained_towers(items, small)
    sources = CandidateSources(UserEncoder(towers.towers, small.features), towers.item_vectors, small)
    replay = Replay(items, small.features)
    replay.advance(read_entries(tastes))
    catalog: Catalog = replay.catalog
    now_ms = replay.watermark_ms + 1
    known = catalog.servable(now_ms)
    moment = Moment(known, catalog.popularity(now_ms, 0), catalog.column("publish_ms"))
    state = replay.state("user-1")
    known_user, unknown_user = sources.pools([state, replay.state("nobody")], catalog, moment)
    assert known_user.user_vector is not None
    assert unknown_user.user_vector is None
    brought = known_user.source_bits & ANN > 0
    near = known_user.source_bits & ITEM_TO_ITEM > 0
    assert brought.all()  # the quota is larger than the catalogue
    assert near.sum() == min(small.candidate.quotas["item_to_item"], len(items))
    seeds = catalog.rows(entry.item_id for entry in state.history[-small.candidate.item_to_item_seeds :])
    cosines = np.maximum(
        towers.item_vectors @ known_user.user_vector, (towers.item_vectors @ towers.item_vectors[seeds].T).max(1)
    )
    assert (known_user.scores >= cosines[known_user.rows] - 1e-5).all()
    assert (np.diff(known_user.scores) <= 0).all()
    assert not (unknown_user.source_bits & (ANN | ITEM_TO_ITEM)).any()


def test_items_that_go_together_are_those_that_the_candidate_service_would_bring(
    tastes: EventLog, small: Settings
) -> None:
    items, entries = list(tastes.items()), list(read_entries(tastes))
    towers = untrained_towers(items, small)
    sources = CandidateSources(UserEncoder(towers.towers, small.features), towers.item_vectors, small)
    replay = Replay(items, small.features)
    replay.advance(entries)
    catalog, now_ms = replay.catalog, replay.watermark_ms + 1
    pairs = PairsTimeline(entries, small).before(now_ms)
    moment = moment_of(replay, pairs, now_ms)
    state = replay.state("user-1")
    (pool,) = sources.pools([state], catalog, moment)
    seeds = catalog.rows(windows.recent_items(state, frozenset(small.features.positive_kinds)))
    query = Query(None, seeds[: small.candidate.item_to_item_seeds].astype(np.int64), moment.known, now_ms)
    snapshot = cast(Snapshot, SimpleNamespace(catalog=catalog, co_visitation=pairs))
    hits = CoVisitationSource().retrieve(snapshot, query, small.candidate.quotas["co_visitation"])
    assert len(hits.rows) > 5
    brought = pool.rows[pool.source_bits & CO_VISITATION > 0]
    assert set(brought.tolist()) == set(hits.rows.tolist())
    # And nothing of what came later.
    earlier = PairsTimeline(entries, small).before(entries[len(entries) // 2].time_ms)
    assert 0 < earlier.pair_count < pairs.pair_count
