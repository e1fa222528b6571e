"""Features logged with the impressions: of the share that is set, of what was shown and some others, within a size."""

import asyncio

import numpy as np
import pytest

from features import feature_log
from features.vectors import CANDIDATE_FEATURES, SIGNATURE, USER_FEATURES
from headrace.v1.events_pb2 import ImpressionList
from headrace.v1.feature_log_pb2 import LoggedFeatures
from headrace.v1.recommender_service_pb2 import RecommendRequest
from serving.feature_log import cut, is_logged

from .conftest import click
from .test_ingest import read, topics_of
from .test_tiers import ask, ids, reasons


def told(count: int, stats: bytes = b"") -> LoggedFeatures:
    """As the ranker tells of items "0".."count-1"."""
    numbers = np.arange(count * len(CANDIDATE_FEATURES), dtype=np.float32)
    return LoggedFeatures(
        feature_signature=SIGNATURE,
        user=np.zeros(len(USER_FEATURES), np.float32).tobytes(),
        candidate_count=count,
        item_ids=[str(number) for number in range(count)],
        candidates=numbers.tobytes(),
        item_digests=range(1, count + 1),
        stats_revisions=[stats] * count,
    )


def logged_of(message) -> LoggedFeatures:
    return LoggedFeatures.FromString(ImpressionList.FromString(message.value()).features)


def test_the_shown_come_first_and_the_others_are_drawn_from_the_rest() -> None:
    first, again, other = (
        LoggedFeatures.FromString(cut(told(50), name, ["7", "nobody ranked it", "3"], 5)) for name in ("a", "a", "b")
    )
    assert first == again
    assert list(first.item_ids[:2]) == ["7", "3"]
    assert (first.shown_count, len(set(first.item_ids))) == (2, 7)
    assert first.item_ids[2:] != other.item_ids[2:]
    assert list(first.item_digests) == [int(item_id) + 1 for item_id in first.item_ids]
    numbers = feature_log.read_numbers(first)
    assert numbers.candidates[0, 0] == 7 * len(CANDIDATE_FEATURES)


@pytest.mark.parametrize(("count", "shown", "others", "kept"), [(3, 3, 10, 3), (0, 0, 10, 0), (9, 2, 0, 2)])
def test_there_may_be_few_items(count: int, shown: int, others: int, kept: int) -> None:
    made = LoggedFeatures.FromString(cut(told(count), "a", [str(number) for number in range(shown)], others))
    assert (len(made.item_ids), made.shown_count) == (kept, shown)


def test_an_answer_logs_no_more_than_its_bytes() -> None:
    """As with hundreds of shown items whose statistics come from hundreds of partitions."""
    shown = [str(number) for number in range(300)]
    encoded = cut(told(512, b"s" * 4000), "a", shown, 100)
    made = LoggedFeatures.FromString(encoded)
    assert 0.9 * feature_log.MAX_BYTES < len(encoded) <= feature_log.MAX_BYTES
    assert list(made.item_ids) == shown[: made.shown_count]
    assert 50 < made.shown_count < 70
    vast = told(2)
    vast.user = bytes(feature_log.MAX_BYTES)
    assert cut(vast, "a", ["0"], 1) == b""


class AnyQuery:
    def __init__(self, number: int, dry_run: bool) -> None:
        self.recommendation_id, self.request = f"r{number}", RecommendRequest(user_id="ada", dry_run=dry_run)


def test_the_share_is_of_the_answers() -> None:
    queries = [AnyQuery(number, dry_run=False) for number in range(4000)]
    assert not any(is_logged(query, 0.0) for query in queries)
    assert all(is_logged(query, 1.0) for query in queries)
    assert 300 < sum(is_logged(query, 0.1) for query in queries) < 500
    assert not any(is_logged(AnyQuery(number, dry_run=True), 1.0) for number in range(10))


async def test_they_go_with_the_impressions(house) -> None:
    house.put_user()
    recommender, _ = await house.open(feature_log_share=1.0, feature_log_others=4)
    event = click(30, "mine")
    answer = await recommender.Recommend(RecommendRequest(user_id="ada", num_items=3, session_events=[event]))
    (message,) = await asyncio.to_thread(read, house, topics_of(house).impressions)
    features = logged_of(message)
    assert list(features.item_ids[: features.shown_count]) == ids(answer)
    assert len(features.item_ids) == 3 + 4
    (logged_event,) = features.session_events
    assert (logged_event.event_id, len(logged_event.categories)) == ("mine", 1), "as the state includes it"
    await recommender.Recommend(ask(num_items=3))
    assert [request.users[0].log_features_of for request in house.ranker.requests[-2:]] == [512, 0], "no dry run"


async def test_without_a_share_nothing_is_asked_for_and_nothing_logged(house) -> None:
    house.put_user()
    recommender, _ = await house.open(feature_log_share=0.0)
    await recommender.Recommend(RecommendRequest(user_id="ada"))
    (message,) = await asyncio.to_thread(read, house, topics_of(house).impressions)
    assert ImpressionList.FromString(message.value()).features == b""
    assert not house.ranker.requests[-1].users[0].log_features_of


async def test_the_ranker_is_asked_for_the_bundle_that_the_answer_is_made_with(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask())
    assert house.ranker.requests[-1].bundle_version == answer.versions.bundle_version == "v1"


async def test_a_ranker_that_has_another_bundle_still_ranks_and_the_answer_says_so(house) -> None:
    house.put_user()
    house.ranker.bundle_version = "v0"
    recommender, _ = await house.open()
    for _ in range(10):
        answer = await recommender.Recommend(ask())
        assert reasons(answer) == {"VERSION_MISMATCH"}, "and the breaker stays closed"
    assert [request.bundle_version for request in house.ranker.requests[-2:]] == ["v1", ""]
