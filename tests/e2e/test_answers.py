"""What a product backend gets, through the front door."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import grpc
import pytest

from core.codec import from_ms
from devstack.backend import reason_names, tier_name
from devstack.demo import hints
from headrace.v1 import ingest_service_pb2, ingest_service_pb2_grpc
from headrace.v1.events_pb2 import Event
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub
from headrace.v1.types_pb2 import Context, ItemFilter

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def connection(running):
    with grpc.insecure_channel(running.stack.address("serving")) as connection:
        yield connection


@pytest.fixture(scope="module")
def recommender(connection):
    return RecommenderServiceStub(connection)


def click(user_id: str, item_id: str, **changes) -> Event:
    fields = {
        "event_id": uuid4().hex,
        "user_id": user_id,
        "item_id": item_id,
        "kind": "click",
        "event_time": from_ms(time.time_ns() // 1_000_000),
    }
    return Event(**{**fields, **changes})


def test_a_known_user_gets_a_ranked_list_that_says_how_fresh_it_is(running, recommender) -> None:
    answer = recommender.Recommend(RecommendRequest(user_id=running.users[0], num_items=10), timeout=5)
    assert tier_name(answer) == "RANKED", reason_names(answer)
    assert len({item.item_id for item in answer.items}) == 10
    assert [item.position for item in answer.items] == list(range(10))
    assert answer.recommendation_id
    assert answer.state_revision > 0
    assert answer.features_as_of_time.seconds > 0
    assert answer.versions.bundle_version == answer.versions.bundle_version != ""
    assert all(item.sources and item.title for item in answer.items)


def test_an_unknown_user_gets_a_popular_list(recommender) -> None:
    answer = recommender.Recommend(RecommendRequest(user_id="nobody-knows-me", num_items=10), timeout=5)
    assert tier_name(answer) in ("POPULAR", "POPULAR_SEGMENT")
    assert "unknown_user" in reason_names(answer)
    assert len(answer.items) == 10


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (RecommendRequest(), "user_id"),
        (RecommendRequest(user_id="x" * 129), "user_id"),
        (RecommendRequest(user_id="u", num_items=501), "num_items"),
        (RecommendRequest(user_id="u", num_items=-1), "num_items"),
        (RecommendRequest(user_id="u", context=Context(surface="x" * 1000)), "context.surface"),
        (
            RecommendRequest(user_id="u", filter=ItemFilter(exclude_item_ids=[str(n) for n in range(10_001)])),
            "filter.exclude_item_ids",
        ),
    ],
    ids=["no-user", "long-user", "too-many", "negative", "long-surface", "many-exclusions"],
)
def test_a_bad_request_names_its_field(recommender, request_, field) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        recommender.Recommend(request_, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in caught.value.details()


def test_excluded_items_stay_out(running, recommender) -> None:
    first = recommender.Recommend(RecommendRequest(user_id=running.users[1], num_items=5), timeout=5)
    out = [item.item_id for item in first.items]
    again = recommender.Recommend(
        RecommendRequest(user_id=running.users[1], num_items=5, filter=ItemFilter(exclude_item_ids=out)), timeout=5
    )
    assert len(again.items) == 5
    assert not {item.item_id for item in again.items} & set(out)


def test_an_acknowledged_event_is_in_the_next_answer(running, connection, recommender) -> None:
    user_id = running.users[2]
    ingest = ingest_service_pb2_grpc.IngestServiceStub(connection)
    before = recommender.Recommend(RecommendRequest(user_id=user_id, num_items=5), timeout=5)
    sent = ingest.SendEvents(
        ingest_service_pb2.SendEventsRequest(
            events=[click(user_id, before.items[0].item_id), click(user_id, before.items[1].item_id, kind="")]
        ),
        timeout=5,
    )
    assert sent.results[0].WhichOneof("result") == "token"
    assert sent.results[1].error.field.endswith("kind")
    after = recommender.Recommend(
        RecommendRequest(user_id=user_id, num_items=5, tokens=[sent.results[0].token]), timeout=5
    )
    assert after.state_revision > before.state_revision
    assert "token_not_reached" not in reason_names(after)


def test_session_events_are_reflected_at_once(running, recommender) -> None:
    user_id = running.users[3]
    before = recommender.Recommend(RecommendRequest(user_id=user_id, num_items=20, dry_run=True), timeout=5)
    event = click(user_id, before.items[3].item_id)
    after = recommender.Recommend(
        RecommendRequest(user_id=user_id, num_items=20, session_events=[event], dry_run=True), timeout=5
    )
    assert [item.item_id for item in before.items] != [item.item_id for item in after.items]


@pytest.mark.skipif(shutil.which("grpcurl") is None, reason="grpcurl is not on PATH")
def test_the_readmes_grpcurl_lines_work(running) -> None:
    address = running.stack.address("serving")
    listed = subprocess.run(
        ["grpcurl", "-plaintext", address, "list"], capture_output=True, text=True, check=True, timeout=30
    )
    assert "headrace.v1.RecommenderService" in listed.stdout
    asked = subprocess.run(
        [
            "grpcurl", "-plaintext", "-d", f'{{"user_id": "{running.users[0]}", "num_items": 5}}', address,
            "headrace.v1.RecommenderService/Recommend",
        ],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert '"served_tier": "SERVING_TIER_RANKED"' in asked.stdout


def test_the_python_lines_that_the_demo_prints_work(running) -> None:
    """A client and a producer, copied as they stand."""
    user_id = running.users[4]
    before = running.backend.recommend(user_id)
    lines = hints(running.stack, user_id, before.items[0].item_id)
    shell = lines[lines.index("python - <<") :]
    assert shell.count("python - <<") == 2
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e"], input=shell, capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warning of a here-document without its end"
    assert done.stdout.count("\n") == 5
    running.await_until(lambda: running.backend.recommend(user_id).state_revision > before.state_revision)
