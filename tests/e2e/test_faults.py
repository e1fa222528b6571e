"""A dependency dies: the answers go on, say why they are poorer, and are whole again afterwards."""

import signal

import pytest

from devstack.backend import reason_names, tier_name

pytestmark = pytest.mark.e2e


def ranked(running) -> bool:
    answer = running.backend.recommend(running.users[0])
    return answer is not None and tier_name(answer) == "RANKED"


@pytest.fixture(autouse=True)
def whole_before_and_after(running):
    running.await_until(lambda: ranked(running), 60)
    yield
    running.await_until(lambda: ranked(running), 60)


def answers(running, count: int = 20):
    for number in range(count):
        answer = running.backend.recommend(running.users[number % len(running.users)])
        assert answer is not None
        assert answer.items
        yield answer


@pytest.mark.parametrize(
    ("name", "tiers", "reasons"),
    [
        ("ranker", {"RERANKED_BATCH"}, {"ranker_unavailable", "ranker_timeout", "breaker_open"}),
        ("candidate", {"RANKED", "RERANKED_BATCH"}, {"retrieval_unavailable", "retrieval_timeout", "breaker_open"}),
        ("redis", {"LAST_GOOD", "POPULAR", "POPULAR_SEGMENT"}, {"store_unavailable", "store_timeout", "breaker_open"}),
    ],
    ids=["ranker", "candidate", "redis"],
)
def test_a_killed_dependency_lowers_the_tier_and_says_why(running, name, tiers, reasons) -> None:
    running.stack.kill(name, signal.SIGKILL, restart=False)
    try:
        for answer in answers(running):
            assert tier_name(answer) in tiers
            assert set(reason_names(answer)) & reasons
    finally:
        running.stack.start(name)
        running.stack.wait_ready(name, 60)


def test_a_frozen_ranker_does_not_make_answers_late(running) -> None:
    running.stack.kill("ranker", signal.SIGSTOP)
    try:
        for _ in range(5):
            answer = running.backend.recommend(running.users[0], deadline_seconds=0.25)
            assert answer is not None
            assert tier_name(answer) == "RERANKED_BATCH"
    finally:
        running.stack.kill("ranker", signal.SIGCONT)


def test_without_the_stream_answers_go_on_and_are_caught_up_afterwards(running) -> None:
    user_id = running.users[40]
    before = running.backend.recommend(user_id)
    running.stack.kill("streams", signal.SIGKILL, restart=False)
    try:
        running.sender.click(user_id, before.items[0].item_id).result(10)
        assert {tier_name(answer) for answer in answers(running)} == {"RANKED"}
    finally:
        running.stack.start("streams")
        running.stack.wait_ready("streams", 60)
    running.await_until(lambda: running.backend.recommend(user_id).state_revision > before.state_revision)
