"""Training the ranker: which questions a log holds, what their features may know, and that something is learnt."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from candidate.co_visitation import CoVisitation
from candidate.encoder import UserEncoder
from candidate.history import kind_names
from candidate.snapshot import Snapshot
from candidate.sources import CoVisitationSource, Query
from candidate.towers import Towers, TowersConfig
from core.bundle import CALIBRATION, RANKER, RANKER_CONFIG
from core.codec import from_ms
from core.errors import ConfigError
from core.settings import Settings, load_settings
from features import windows
from features.catalog import Catalog
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, IMPRESSIONS, ITEMS, to_table
from features.vectors import CANDIDATE_FEATURES, WholeList, ranker_input
from features.windows import UserEvent
from headrace.v1.events_pb2 import Event, Impression, ImpressionList, Item
from offline.co_visitation import PairsTimeline
from offline.replay import Replay, Shown, read_entries
from offline.training.ranker import train_ranker
from offline.training.ranker_candidates import (
    ANN,
    CO_VISITATION,
    ITEM_TO_ITEM,
    CandidateSources,
    Moment,
    Pool,
    draw,
)
from offline.training.ranker_distil import STUDENT_SHAPE, Teacher
from offline.training.ranker_quality import auc, ndcg
from offline.training.ranker_questions import Question, questions_of
from offline.training.ranker_rows import RowMaker
from offline.training.ranker_timeline import Timeline
from offline.training.towers import TrainedTowers
from ranker.calibration import load_calibration
from ranker.model import LIGHT, RankerConfig, RankerModel, load_ranker
from ranker.scorer import Scorer

T0_MS = 1_700_000_000_000
MINUTE_MS, HOUR_MS = 60_000, 3_600_000
TASTES, ITEMS_PER_TASTE, DIMENSION = 4, 15, 16


@pytest.fixture(scope="module")
def small() -> Settings:
    return load_settings(overrides={"offline": {"seed": 3, "ranker_epochs": 6, "ranker_max_rows": 20_000}})


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


# A world with a planted preference: everybody clicks items of one taste; vectors of items say the taste, the user
# tower knows nothing (its weights are random).
@pytest.fixture(scope="module")
def tastes(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    log = EventLog(tmp_path_factory.mktemp("tastes"))
    rng = np.random.default_rng(2)
    items = [
        Item(item_id=f"{taste}-{number}", categories=[f"taste {taste}"], publish_time=from_ms(T0_MS - HOUR_MS))
        for taste in range(TASTES)
        for number in range(ITEMS_PER_TASTE)
    ]
    events, lists = [], []
    for user in range(120):
        taste, left = user % TASTES, rng.permutation(ITEMS_PER_TASTE).tolist()
        for step in range(10):
            time_ms = T0_MS + step * 5 * HOUR_MS + user * 1000
            liked = f"{taste}-{left.pop()}"
            others = [f"{int(rng.integers(TASTES))}-{int(rng.integers(ITEMS_PER_TASTE))}" for _ in range(7)]
            listed = list(dict.fromkeys(rng.permutation([liked, *others]).tolist()))
            if user % 2:
                impressions = [Impression(item_id=item, position=at, propensity=1) for at, item in enumerate(listed)]
                lists.append(
                    ImpressionList(
                        event_id=f"l{user}-{step}",
                        user_id=f"user-{user}",
                        event_time=from_ms(time_ms),
                        impressions=impressions,
                    )
                )
            clicked = [liked] if rng.random() < 0.9 else [others[0]]
            events.extend(
                Event(
                    event_id=f"e{user}-{step}",
                    user_id=f"user-{user}",
                    item_id=item_id,
                    kind="click",
                    event_time=from_ms(time_ms + 30_000),
                    categories=[f"taste {item_id.split('-')[0]}"],
                )
                for item_id in clicked
            )
    log.write(ITEMS, to_table(ITEMS, items), "items")
    log.write(EVENTS, to_table(EVENTS, events), "events")
    log.write(IMPRESSIONS, to_table(IMPRESSIONS, lists), "lists")
    return log


def untrained_towers(items: Sequence[Item], settings: Settings) -> TrainedTowers:
    torch.manual_seed(0)
    kinds = kind_names(settings.features)
    ids = tuple(item.item_id for item in items)
    towers = Towers(TowersConfig(DIMENSION, 1, 2, settings.features.history_length, kinds, ids)).eval()
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(TASTES, DIMENSION))
    vectors = np.array([centres[int(item.item_id[0])] + 0.5 * rng.normal(size=DIMENSION) for item in items], np.float32)
    return TrainedTowers(towers, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), {})


Trained = tuple[Path, dict[str, float]]


@pytest.fixture(scope="module")
def trained(tastes: EventLog, small: Settings, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    work = tmp_path_factory.mktemp("ranker")
    items = list(tastes.items())
    made = train_ranker(tastes, items, untrained_towers(items, small), small, work, device="cpu", progress=False)
    return work, made.metrics


def test_a_planted_preference_is_learnt(trained: Trained) -> None:
    _, metrics = trained
    assert metrics["auc"] > 0.75
    assert metrics["ndcg_at_10"] > 1.2 * metrics["retrieval_ndcg_at_10"]


def test_the_probabilities_are_calibrated(trained: Trained) -> None:
    work, metrics = trained
    assert metrics["ece"] < 0.06
    assert load_calibration(work).fitted_on in ("impressions", "retrieved")


def test_a_light_scorer_comes_with_it(trained: Trained) -> None:
    work, metrics = trained
    light = load_ranker(work, LIGHT)
    assert light.config.teacher_version == load_ranker(work).config.model_version
    # No second copy of the items' tastes; no part that reads the history.
    assert (light.config.items, light.tastes.numel(), light.config.reads_history) == (0, 0, False)
    assert metrics["light_ndcg_at_10"] > metrics["retrieval_ndcg_at_10"]


def test_a_student_learns_what_its_teacher_thinks(tastes: EventLog, small: Settings, tmp_path: Path) -> None:
    items = list(tastes.items())
    settings = load_settings(overrides={"offline": {**small.offline.model_dump(), "ranker_student": True}})
    towers = untrained_towers(items, settings)
    made = train_ranker(tastes, items, towers, settings, tmp_path, device="cpu", progress=False)
    assert made.teacher is not None
    assert made.teacher.config.attention_width > 0
    student = load_ranker(tmp_path)
    assert (student.config.attention_width, student.config.cross_layers) == (0, 0)
    assert student.parameter_count() < made.teacher.parameter_count() / 4
    assert load_ranker(tmp_path, LIGHT).config.teacher_version == student.config.model_version
    assert made.metrics["ndcg_at_10"] > 0.9 * made.metrics["teacher_ndcg_at_10"]


def test_a_teachers_opinion_is_mixed_into_known_targets_alone() -> None:
    teacher = Teacher(RankerModel(RankerConfig(DIMENSION)), 0.25)
    mixed = teacher.mixed(torch.tensor([1.0, 0.0, np.nan]), torch.tensor([0.2, 0.8, 0.9]))
    np.testing.assert_allclose(mixed.numpy(), [0.8, 0.2, np.nan], rtol=1e-6)


def test_a_student_begins_with_the_parts_that_fit() -> None:
    torch.manual_seed(0)
    full, student = RankerModel(RankerConfig(DIMENSION)), RankerModel(STUDENT_SHAPE(DIMENSION))
    Teacher(full, 0.5).start(student)
    torch.testing.assert_close(student.user.weight, full.user.weight)
    assert not student.heads.weight.any()
    assert student.layers[0].weight.shape != full.layers[0].weight.shape


def test_the_files_are_there_and_the_ranker_follows_a_click(
    trained: Trained, tastes: EventLog, small: Settings
) -> None:
    work, _ = trained
    assert all((work / name).is_file() for name in (RANKER, RANKER_CONFIG, CALIBRATION))
    items = list(tastes.items())
    replay = Replay(items, small.features)
    replay.advance(read_entries(tastes))
    catalog = replay.catalog
    vectors = untrained_towers(items, small).item_vectors
    scorer = Scorer(load_ranker(work), vectors, catalog.column("categories"), load_calibration(work))
    rows = catalog.rows(f"{taste}-{number}" for taste in range(TASTES) for number in range(5, ITEMS_PER_TASTE))
    now_ms = T0_MS + 100 * HOUR_MS
    best = []
    for taste in range(TASTES):
        user_id = f"new-{taste}"
        for number in range(3):
            clicked = UserEvent(
                user_id,
                taste * 10 + number,
                f"{taste}-{number}",
                "click",
                now_ms + number,
                categories=(f"taste {taste}",),
            )
            replay.advance([clicked])
        zeros, ones = np.zeros(len(rows), np.float32), np.full(len(rows), ANN, np.int32)
        made = ranker_input(replay.state(user_id), replay.catalog, rows, zeros, ones, now_ms + 60_000, small.features)
        (scores,) = scorer.score([made], [None])
        top = [catalog.item_ids[row] for row in rows[np.argsort(-scores.score)[:5]]]
        best.append(sum(item_id.startswith(f"{taste}-") for item_id in top))
    assert sum(best) >= 0.7 * 5 * TASTES


def test_the_same_training_gives_the_same_model(
    trained: Trained, tastes: EventLog, small: Settings, tmp_path: Path
) -> None:
    items = list(tastes.items())
    towers = untrained_towers(items, small)
    again = train_ranker(tastes, items, towers, small, tmp_path, device="cpu", progress=False)
    assert again.model.config.model_version == load_ranker(trained[0]).config.model_version


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


def test_events_from_before_ms_on_change_nothing(
    tastes: EventLog, small: Settings, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before_ms = T0_MS + 30 * HOUR_MS
    items = list(tastes.items())
    towers = untrained_towers(items, small)
    cut = EventLog(tmp_path_factory.mktemp("cut"))
    cut.write(EVENTS, tastes.rows(EVENTS, end_ms=before_ms), "events")
    cut.write(IMPRESSIONS, tastes.rows(IMPRESSIONS, end_ms=before_ms), "lists")
    versions = [
        train_ranker(log, items, towers, small, tmp_path, device="cpu", before_ms=limit, progress=False)
        for log, limit in ((tastes, before_ms), (cut, None))
    ]
    assert versions[0].model.config.model_version == versions[1].model.config.model_version


def test_a_log_with_nothing_to_learn_says_what_is_needed(small: Settings, tmp_path: Path, tastes: EventLog) -> None:
    items = list(tastes.items())
    log = EventLog(tmp_path / "log")
    skip = Event(event_id="1", user_id="u", item_id="0-1", kind="skip", event_time=from_ms(T0_MS))
    log.write(EVENTS, to_table(EVENTS, [skip]), "events")
    with pytest.raises(ConfigError, match="import more events"):
        train_ranker(log, items, untrained_towers(items, small), small, tmp_path, device="cpu", progress=False)


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


Measure = Callable[..., float]


@pytest.mark.parametrize(
    ("scores", "gains", "missed", "expected"),
    [
        ([3, 2, 1], [1, 0, 0], 0, 1.0),
        ([3, 2, 1], [0, 1, 0], 0, 1 / np.log2(3)),
        ([3, 2, 1], [0, 0, 0], 1, 0.0),
        ([3, 2, 1], [1, 0, 0], 1, 1 / (1 + 1 / np.log2(3))),
        ([], [], 0, 0.0),
    ],
)
def test_ndcg(scores: list[float], gains: list[float], missed: int, expected: float) -> None:
    assert ndcg(np.array(scores, np.float32), np.array(gains, np.float32), missed) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [([1, 2, 3, 4], [0, 0, 1, 1], 1.0), ([4, 3, 2, 1], [0, 0, 1, 1], 0.0), ([1, 1], [0, 1], 0.5), ([1], [1], 0.5)],
)
def test_auc(scores: list[float], labels: list[float], expected: float) -> None:
    assert auc(np.array(scores, np.float32), np.array(labels, np.float32)) == pytest.approx(expected)
