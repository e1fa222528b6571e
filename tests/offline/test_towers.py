"""Tower training: what counts as a step, the split by time, resuming, limits, learning from a teacher."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from candidate import history
from candidate.encoder import UserEncoder
from candidate.towers import Towers, load_towers
from core.codec import from_ms
from core.errors import ConfigError
from core.settings import Settings, load_settings
from features import windows
from features.catalog import Catalog
from features.stores.event_log import EventLog, user_events
from features.stores.event_rows import EVENTS, ITEMS, to_table
from features.windows import UserState
from headrace.v1.events_pb2 import Event, Item
from offline.training import trainer as towers_module
from offline.training.checkpoint import Checkpoint
from offline.training.distil import Ensemble, TeacherVectors
from offline.training.interactions import hold_out, load_steps
from offline.training.towers import CURVE, TrainedTowers, train_towers
from offline.training.validation import Quality, target_ranks

T0_MS = 1_700_000_000_000
MINUTE_MS = 60_000


def event(user: str, item: str, minute: float, kind: str = "click", value: float | None = None) -> Event:
    name = f"{user}/{item}/{minute}/{kind}"
    time = from_ms(T0_MS + int(minute * MINUTE_MS))
    return Event(event_id=name, user_id=user, item_id=item, kind=kind, event_time=time, value=value)


def log_of(folder: Path, events: list[Event], items: list[Item]) -> EventLog:
    log = EventLog(folder)
    log.write(ITEMS, to_table(ITEMS, items), "items")
    if events:
        log.write(EVENTS, to_table(EVENTS, events), "events")
    return log


def items_of(count: int) -> list[Item]:
    return [Item(item_id=f"i{n:02}", categories=[f"c{n % 3}"]) for n in range(count)]


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(None, {"offline": {"dimension": 16, "max_epochs": 4, "batch_size": 16}})


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventLog, list[Item]]:
    """Users who go from item n to item n + 1, with some noise: only the order tells what is next."""
    rng = np.random.default_rng(3)
    events = []
    for user in range(150):
        at = int(rng.integers(30))
        for step in range(12):
            at = (at + 1) % 30 if rng.random() < 0.9 else int(rng.integers(30))
            events.append(event(f"u{user:03}", f"i{at:02}", step + user / 1000))
    items = items_of(30)
    log = log_of(tmp_path_factory.mktemp("chains"), events, items)
    return log, items


Train = Callable[..., TrainedTowers]


@pytest.fixture
def train(chains: tuple[EventLog, list[Item]], settings: Settings, tmp_path: Path) -> Train:
    def run(work: str = "work", before_ms: int | None = None, **offline: object) -> TrainedTowers:
        changed = settings.model_copy(update={"offline": settings.offline.model_copy(update=offline)})
        return train_towers(
            chains[0], chains[1], changed, tmp_path / work, device="cpu", before_ms=before_ms, progress=False
        )

    return run


@pytest.mark.parametrize("full_softmax_items", [1000, 0], ids=["full softmax", "sampled softmax"])
def test_training_learns_the_order(train: Train, monkeypatch: pytest.MonkeyPatch, full_softmax_items: int) -> None:
    monkeypatch.setitem(towers_module.FULL_SOFTMAX_ITEMS, "cpu", full_softmax_items)
    monkeypatch.setattr(towers_module, "SAMPLED_NEGATIVES", 20)
    trained = train(max_epochs=12)
    # By chance 10 of 30 items would give an NDCG@10 of .15.
    assert trained.metrics["towers_ndcg_at_10"] > 0.5
    assert trained.item_vectors.shape == (30, 16)


def test_the_files_are_those_of_the_result(train: Train, tmp_path: Path) -> None:
    trained = train()
    again = load_towers(tmp_path / "work")
    assert again.embedding_version == trained.towers.embedding_version
    assert (tmp_path / "work" / CURVE).stat().st_size > 0


def test_one_seed_one_result(train: Train) -> None:
    versions = [train(f"work-{n}", seed=seed).towers.embedding_version for n, seed in enumerate((7, 7, 8))]
    assert versions[0] == versions[1] != versions[2]


def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole")
    save = Checkpoint.save

    def save_and_die(self: Checkpoint, *arguments: object) -> None:
        save(self, *arguments)  # type: ignore[arg-type]
        if self.progress.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    monkeypatch.setattr(Checkpoint, "save", save)
    resumed = train("killed")
    assert resumed.towers.embedding_version == whole.towers.embedding_version
    assert resumed.metrics["towers_epochs"] == 4


def test_a_broken_or_foreign_checkpoint_is_not_gone_on_from(train: Train, tmp_path: Path) -> None:
    first = train()
    checkpoint = tmp_path / "work" / "checkpoints" / "towers.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert train().towers.embedding_version == first.towers.embedding_version
    assert train(dimension=8).item_vectors.shape == (30, 8)


def test_events_from_the_given_time_on_are_not_looked_at(
    train: Train, chains: tuple[EventLog, list[Item]], settings: Settings, tmp_path: Path
) -> None:
    before_ms = T0_MS + 8 * MINUTE_MS
    kept = log_of(tmp_path / "log", [e for e in _events(chains[0]) if e.event_time.ToMilliseconds() < before_ms], [])
    alone = train_towers(kept, chains[1], settings, tmp_path / "alone", device="cpu", progress=False)
    assert train(before_ms=before_ms).towers.embedding_version == alone.towers.embedding_version


def _events(log: EventLog) -> list[Event]:
    return [
        Event(event_id=str(n), user_id=e.user_id, item_id=e.item_id, kind=e.kind, event_time=from_ms(e.time_ms))
        for n, e in enumerate(user_events(log.events()))
    ]


def test_the_time_limit_is_kept(train: Train) -> None:
    trained = train(max_train_seconds=1, max_epochs=10_000, patience_epochs=10_000)
    assert trained.metrics["towers_seconds"] < 3


def test_a_log_without_positive_events_says_what_to_do(settings: Settings, tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", [event("u", "i00", 0, "skip"), event("u", "unknown", 1)], items_of(3))
    with pytest.raises(ConfigError, match="import events"):
        train_towers(log, items_of(3), settings, tmp_path / "work", progress=False)


def test_steps_are_positive_known_and_runs_count_once(settings: Settings, tmp_path: Path) -> None:
    events = [
        event("a", "i01", 0, "view"),
        event("a", "i01", 1, "purchase"),
        event("a", "gone", 2),
        event("a", "i01", 3),
        event("a", "i02", 4, "rating", 2.0),
        event("a", "i02", 5, "rating", 4.5),
        event("b", "i01", 6, "skip"),
        event("b", "i00", 7),
    ]
    log = log_of(tmp_path / "log", events, items_of(3))
    steps = load_steps(log, items_of(3), settings.features, None)
    assert steps.rows.tolist() == [1, 2, 0]
    assert steps.starts.tolist() == [0, 2, 3]
    assert steps.times_ms.tolist() == [T0_MS + minute * MINUTE_MS for minute in (3, 5, 7)]
    weights = settings.features.kind_weights
    assert steps.weights[0] == weights["purchase"]


def test_the_log_gives_the_steps_that_the_states_give(settings: Settings, tmp_path: Path) -> None:
    """Training and the request read the same input."""
    rng = np.random.default_rng(11)
    kinds = ["view", "click", "skip", "purchase", "rating", "dwell", "other"]
    events = []
    for n in range(600):
        user, item, kind = f"u{rng.integers(20)}", f"i{rng.integers(12):02}", kinds[rng.integers(len(kinds))]
        value = float(rng.integers(1, 6)) if kind in ("rating", "dwell") else None
        # Many at the same time: ties are ordered alike, too.
        events.append(Event(**_fields(event(user, item, int(rng.integers(40)), kind, value)), event_id=str(n)))
    items = items_of(10)
    log = log_of(tmp_path / "log", events, items)
    states: dict[str, UserState] = {}
    for user_event in user_events(log.events()):
        windows.apply(states.setdefault(user_event.user_id, UserState()), [user_event], settings.features)
    catalog = Catalog(settings.features)
    for item in items:
        catalog.upsert(item)
    steps = load_steps(log, items, settings.features, None)
    by_user = {steps.rows[a:b].tobytes(): (a, b) for a, b in zip(steps.starts[:-1], steps.starts[1:], strict=True)}
    length = settings.features.history_length
    for state in states.values():
        arrays = history.of_states([state], catalog.rows, history.kind_names(settings.features), settings.features)
        own = history.sequences(arrays[0], 1, *arrays[1:])
        begin, end = by_user[own.rows.tobytes()]
        ours = history.pad(own, own.starts[:1], own.starts[1:], length)
        theirs = history.pad(steps, np.array([begin]), np.array([end]), length)
        for name in ("rows", "kinds", "gaps", "weights", "lengths"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def _fields(message: Event) -> dict[str, object]:
    return {field.name: value for field, value in message.ListFields() if field.name != "event_id"}


def test_held_out_targets_are_new_items_predicted_from_what_came_before(
    chains: tuple[EventLog, list[Item]], settings: Settings
) -> None:
    steps = load_steps(chains[0], chains[1], settings.features, None)
    held, training = hold_out(steps, 0.2, 1000, seed=1)
    boundary = steps.times_ms[held.target].min()
    assert steps.times_ms[training].max() < boundary
    assert len(held.target) >= 50
    for begin, end, target in zip(held.begin, held.end, held.target, strict=True):
        assert begin < end <= target
        assert steps.times_ms[end - 1] < steps.times_ms[target]
        assert steps.rows[target] not in steps.rows[begin:target]


def test_a_small_log_holds_out_the_last_step_of_each_user(settings: Settings, tmp_path: Path) -> None:
    events = [event(f"u{n}", f"i{(n + m) % 9:02}", m) for n in range(20) for m in range(3)]
    steps = load_steps(log_of(tmp_path / "log", events, items_of(9)), items_of(9), settings.features, None)
    held, training = hold_out(steps, 0.1, 1000, seed=1)
    assert held.target.tolist() == (steps.starts[1:] - 1).tolist()
    assert len(training) == 40


def test_a_teacher_helps_a_smaller_tower(train: Train) -> None:
    alone = train("alone", max_epochs=3)
    taught = train("taught", max_epochs=3, teacher_blocks=2, teacher_history_length=60, teacher_share=0.5)
    (teacher,) = taught.teachers
    assert not alone.teachers
    assert len(teacher.towers.user.blocks) == 2
    assert len(taught.towers.user.blocks) == 1
    # The student starts from the teacher's weights: three epochs take it further.
    assert taught.metrics["towers_ndcg_at_10"] > alone.metrics["towers_ndcg_at_10"]


def test_a_teacher_speaks_of_every_step_with_context(
    train: Train, chains: tuple[EventLog, list[Item]], settings: Settings
) -> None:
    (trained,) = train(teacher_blocks=1, teacher_history_length=50).teachers
    steps = load_steps(chains[0], chains[1], settings.features, None)
    ends = steps.starts[1:] - 1
    rows = np.unique(steps.rows)
    alone = Ensemble([trained.towers], [trained.item_vectors], settings.features)
    vectors = TeacherVectors.of(alone, steps, ends, rows, 0.5, "cpu", torch.float32)
    assert (np.abs(vectors.users).sum(axis=1) > 0).sum() == (ends - steps.starts[:-1]).sum()
    # As if the step were the user's last one.
    encoder = UserEncoder(trained.towers, settings.features)
    first = steps.starts[0]
    whole, _ = encoder.encode_steps(steps, np.array([first]), np.array([first + 6]), trained.item_vectors)
    assert np.allclose(vectors.users[first + 5].astype(np.float32), whole[0], atol=2e-3)


def test_teachers_together_say_the_mean_of_what_each_says(
    train: Train, chains: tuple[EventLog, list[Item]], settings: Settings
) -> None:
    both = train(teacher_blocks=1, teachers=2, max_epochs=2).teachers
    assert both[0].towers.embedding_version != both[1].towers.embedding_version
    steps = load_steps(chains[0], chains[1], settings.features, None)
    begin, end = steps.starts[:1], steps.starts[:1] + 6
    logits = []
    for one in both:
        users, _ = UserEncoder(one.towers, settings.features).encode_steps(steps, begin, end, one.item_vectors)
        logits.append(float(one.towers.scale()) * users @ one.item_vectors.T)
    together = Ensemble([one.towers for one in both], [one.item_vectors for one in both], settings.features)
    users, _ = together.encode_steps(steps, begin, end, together.item_vectors)
    assert np.allclose(users @ together.item_vectors.T, np.mean(logits, axis=0), atol=1e-4)


def test_a_teacher_of_other_items_is_refused(train: Train, settings: Settings) -> None:
    (one,) = train(teacher_blocks=1).teachers
    with pytest.raises(ConfigError, match="same items"):
        Ensemble([one.towers], [one.item_vectors], settings.features).start(
            Towers(replace(one.towers.config, dimension=8))
        )


def test_in_the_end_the_held_out_part_is_learnt_too(
    train: Train, chains: tuple[EventLog, list[Item]], settings: Settings
) -> None:
    refitted = train("refitted", refit_epochs=4)
    plain = train("plain", refit_epochs=0)
    assert plain.validated is None
    assert refitted.validated is not None
    steps = load_steps(chains[0], chains[1], settings.features, None)
    held, _ = hold_out(steps, settings.offline.validation_share, 2000, settings.offline.seed)
    before, after = (
        Quality.of(target_ranks(UserEncoder(one.towers, settings.features), one.item_vectors, steps, held))
        for one in (refitted.validated, refitted)
    )
    assert after.ndcg_at_10 > before.ndcg_at_10
    assert refitted.metrics["towers_ndcg_at_10"] == pytest.approx(before.ndcg_at_10, abs=1e-5)
