"""No skew in what was served: the logged features of real answers are rebuilt from the event log, bit by bit.

A whole stack of real processes answers while events, feedback and its own impressions move the statistics; then the log
alone must give the same numbers.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import grpc
import numpy as np
import pytest

from core.codec import from_ms
from core.kafka import KafkaProducer
from core.settings import Settings, load_settings
from core.topics import Topics
from devstack.demo_data import active_users, prepare
from devstack.erase_files import rewrite_log
from devstack.kafka_local import kafka_home, local_kafka_problem
from devstack.stack import EMBEDDED, LOCAL, Stack
from features import feature_log
from features.stores.erasures import Erasures, UnerasedLog
from features.stores.event_log import EventLog
from features.vectors import CANDIDATE_FEATURES
from headrace.v1 import types_pb2 as types
from headrace.v1.events_pb2 import Event, Feedback
from headrace.v1.feature_log_pb2 import StatsRevisions
from headrace.v1.recommender_service_pb2 import RecommendRequest, RecommendResponse
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub
from offline.feature_log import LoggedAnswer, Rebuilder, compare, logged_answers
from offline.materialize import materialize
from offline.train import train

pytestmark = pytest.mark.e2e

TINY = {"offline": {"dimension": 8, "max_epochs": 1, "ranker_epochs": 1, "ranker_max_rows": 2000}}
ROUNDS, USERS, OTHERS = 12, 12, 7


@dataclass
class Served:
    """What a stack has left behind: its log, its answers."""

    root: Path
    registry: Path
    settings: Settings
    split_ms: int
    answers: list[RecommendResponse]
    erased: str

    def logged(self, log: EventLog) -> list[LoggedAnswer]:
        return list(logged_answers(log))

    def rebuilder(self, log: UnerasedLog, answers: list[LoggedAnswer]) -> Rebuilder:
        return Rebuilder(log, self.registry, self.settings, answers, self.split_ms)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    home = tmp_path_factory.mktemp("stack")
    data = prepare("simulated", None, home / "dataset", users=120, items=150, seed=11)
    trained = load_settings(overrides=TINY)
    bundle = train(data.root, home / "bundles", trained, before_ms=data.split_ms, device="cpu", progress=False)
    own = {
        # One log: what was imported, and what the stream adds.
        "HEADRACE_STREAMS__EVENT_LOG_PATH": str(data.root),
        # Many revisions in a short time: what was only shown is not held back.
        "HEADRACE_STREAMS__SHOWN_BROADCAST_INTERVAL_MS": "1",
        "HEADRACE_SERVING__FEATURE_LOG_SHARE": "1",
        "HEADRACE_SERVING__FEATURE_LOG_OTHERS": str(OTHERS),
    }
    kafka = LOCAL if local_kafka_problem(kafka_home()) is None else EMBEDDED
    with Stack(home, kafka=kafka, bundles=home / "bundles", extra_env=own) as stack:
        materialize(data.root, bundle, stack.settings, before_ms=data.split_ms, progress=False)
        users = active_users(data.log, data.split_ms, USERS, 3)
        with grpc.insecure_channel(stack.address("serving")) as channel:
            answers = ask(RecommenderServiceStub(channel), stack.settings, list(data.live_events()), users)
        wait_for_record(data.root, users[0])
        settings = stack.settings
    # Stopped: the stream has written all that it read.
    return Served(data.root, home / "bundles", settings, data.split_ms, answers, users[0])


def ask(stub, settings: Settings, live: list[Event], users: list[str]) -> list[RecommendResponse]:
    """Answers between events that nobody waits for; at the end one user is removed."""
    topics, rng = Topics(settings.kafka.topic_prefix), random.Random(5)
    producer = KafkaProducer(settings.kafka)
    answers: list[RecommendResponse] = []
    for number in range(ROUNDS):
        for event in live[number::ROUNDS]:
            producer.send(topics.events, event.user_id.encode(), event.SerializeToString())
        for user_id in users:
            request = RecommendRequest(user_id=user_id, num_items=15)
            if rng.random() < 0.3:
                request.session_events.append(click(user_id, rng.choice(live).item_id))
            answer = stub.Recommend(request, timeout=5)
            answers.append(answer)
            for item in rng.sample(list(answer.items), 2):
                outcome = feedback(user_id, item.item_id, answer.recommendation_id)
                producer.send(topics.feedback, user_id.encode(), outcome.SerializeToString())
                liked = click(user_id, item.item_id, categories=["taste"])
                producer.send(topics.events, user_id.encode(), liked.SerializeToString())
    producer.send(topics.users, users[0].encode(), None).result(10)
    producer.close()
    return answers


def click(user_id: str, item_id: str, **more) -> Event:
    return Event(event_id=uuid4().hex, user_id=user_id, item_id=item_id, kind="click", event_time=now(), **more)


def feedback(user_id: str, item_id: str, recommendation_id: str) -> Feedback:
    return Feedback(
        event_id=uuid4().hex,
        user_id=user_id,
        item_id=item_id,
        kind="cart",
        event_time=now(),
        recommendation_id=recommendation_id,
        categories=["a", "b"],
    )


def now():
    return from_ms(time.time_ns() // 1_000_000)


def wait_for_record(root: Path, user_id: str) -> None:
    end = time.monotonic() + 30
    while not Erasures(str(root)).of(user_id):
        assert time.monotonic() < end, "the stream has not heard of the removed user"
        time.sleep(0.05)


def test_each_ranked_answer_logs_the_features_of_what_it_showed_and_of_some_others(served: Served) -> None:
    ranked = {
        answer.recommendation_id: [item.item_id for item in answer.items]
        for answer in served.answers
        if answer.served_tier == types.SERVING_TIER_RANKED
    }
    assert len(ranked) > 0.8 * ROUNDS * USERS
    # Whoever was removed is still in the files.
    logged = {answer.recommendation_id: answer.features for answer in served.logged(EventLog(served.root))}
    assert ranked.keys() <= logged.keys()
    for recommendation_id, shown in ranked.items():
        features = logged[recommendation_id]
        assert list(features.item_ids[: features.shown_count]) == shown
        others = features.item_ids[features.shown_count :]
        assert len(set(others) - set(shown)) == OTHERS
        assert features.candidate_count >= features.shown_count + OTHERS
        assert features.ByteSize() < 20_000


def test_the_log_gives_every_logged_number_again(served: Served) -> None:
    log = UnerasedLog(served.root)
    # Of whom was removed nothing is left to compare, and items that they touched lack those events.
    answers = served.logged(log)
    assert answers
    assert served.erased not in {answer.user_id for answer in answers}
    found = compare(answers, served.rebuilder(log, answers))
    assert not found.differing
    assert set(found.not_rebuilt) == {"events of an item"}
    assert 0 < found.equal_items == found.items - found.not_rebuilt.total()


def test_before_anybody_was_removed_all_of_them(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnerasedLog, "read", EventLog.read)
    log = UnerasedLog(served.root)
    answers = served.logged(log)
    assert len({version for answer in answers for version in revisions(answer)}) > 1000, "statistics have moved"
    assert sum(bool(answer.features.session_events) for answer in answers) > 10
    found = compare(answers, served.rebuilder(log, answers))
    assert not found.not_rebuilt
    assert not found.differing
    assert found.equal_items == found.items > 2000


def test_the_comparison_sees_a_number_of_another_revision(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnerasedLog, "read", EventLog.read)
    log = UnerasedLog(served.root)
    answers = served.logged(log)
    answer, place, raw = next(
        (answer, place, raw)
        for answer in answers
        for place, raw in enumerate(answer.features.stats_revisions)
        if sum(len(one.offsets) for one in StatsRevisions.FromString(raw).revisions)
    )
    without = [one for one in StatsRevisions.FromString(raw).revisions if not one.offsets]
    answer.features.stats_revisions[place] = StatsRevisions(revisions=without).SerializeToString()
    found = compare([answer], served.rebuilder(log, answers))
    assert "log_impressions" in found.differing or "log_popularity_short" in found.differing
    assert not any(name.startswith("user.") for name in found.differing)


def test_a_vector_is_what_the_names_say(served: Served) -> None:
    answer = served.logged(EventLog(served.root))[0]
    numbers = feature_log.read_numbers(answer.features)
    assert numbers.candidates.shape == (len(answer.features.item_ids), len(CANDIDATE_FEATURES))
    assert np.isfinite(numbers.candidates).all()


def test_rewriting_the_files_removes_them(served: Served) -> None:
    """Last: it changes the log."""
    assert served.erased in {answer.user_id for answer in served.logged(EventLog(served.root))}
    rewrite_log(str(served.root), Erasures(str(served.root)).all())
    left = {answer.user_id for answer in served.logged(EventLog(served.root))}
    assert served.erased not in left
    assert len(left) >= USERS - 2


def revisions(answer: LoggedAnswer) -> set[tuple[str, int, int]]:
    return {
        (item_id, one.source_partition, one.revision)
        for item_id, raw in zip(answer.features.item_ids, answer.features.stats_revisions, strict=True)
        for one in StatsRevisions.FromString(raw).revisions
    }
