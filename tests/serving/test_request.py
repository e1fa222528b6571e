"""What a request may ask for, and what it gets: freshness, filters, explanations, batches; over real sockets."""

import asyncio
import math

import grpc
import pytest

from core.codec import from_ms
from headrace.v1 import recommender_service_pb2 as pb
from headrace.v1 import types_pb2 as types
from headrace.v1.events_pb2 import Event, Preference
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.types_pb2 import Context, IngestToken, ItemFilter, LabelMatch, NumberRange
from serving.query import SOURCE_BIT

from .conftest import FAR_AHEAD_MS, angler, click, now_ms, write_bundle
from .test_tiers import ask, assert_good, ids, reasons, tier

SOURCE = 77


async def test_a_session_event_changes_the_answer_at_once(house) -> None:
    house.put_user(clicked=(4,))
    recommender, _ = await house.open(blend_weights={"ranker": 0.1, "affinity": 1.0})
    before = await recommender.Recommend(ask())
    after = await recommender.Recommend(ask(session_events=[click(101, "a"), click(105, "b")]))
    assert after.state_revision == before.state_revision + 2
    assert not {"item-101", "item-105"} & set(ids(after))
    others = [name for name in ids(before) if name in ids(after)]
    assert others != [name for name in ids(after) if name in ids(before)] or set(ids(before)) != set(ids(after))
    # Items of soap, 101 mod 4, have come up.
    assert sum(int(name[-3:]) % 4 == 1 for name in ids(after)[:5]) > sum(
        int(name[-3:]) % 4 == 1 for name in ids(before)[:5]
    )


async def test_a_session_event_that_has_come_through_kafka_counts_once(house) -> None:
    house.put_user(clicked=(4,))
    recommender, _ = await house.open()
    twice = [click(101, "a"), click(101, "a")]
    answer = await recommender.Recommend(ask(session_events=twice))
    assert answer.state_revision == 2


async def test_a_token_that_the_state_includes_is_served_at_once(house) -> None:
    house.put_user(offsets={(SOURCE, 2): 10})
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask(tokens=[IngestToken(source=SOURCE, partition=2, offset=10)]))
    assert tier(answer) == "RANKED"
    assert reasons(answer) == set()


async def test_a_token_is_waited_for(house) -> None:
    house.put_user(clicked=(4,), offsets={(SOURCE, 2): 9})
    recommender, _ = await house.open()
    asked = asyncio.ensure_future(
        recommender.Recommend(ask(tokens=[IngestToken(source=SOURCE, partition=2, offset=10)]), timeout=2)
    )
    await asyncio.sleep(0.05)
    house.put_user(clicked=(4, 8, 12), offsets={(SOURCE, 2): 10})
    answer = await asked
    assert answer.state_revision == 3
    assert reasons(answer) == set()


async def test_a_token_that_does_not_come_is_named_and_the_answer_is_in_time(house) -> None:
    house.put_user(offsets={(SOURCE, 2): 9})
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask(tokens=[IngestToken(source=SOURCE, partition=2, offset=10)]), timeout=0.25)
    assert tier(answer) == "RANKED"
    assert reasons(answer) == {"TOKEN_NOT_REACHED"}


@pytest.mark.parametrize(
    ("item_filter", "allowed"),
    [
        (ItemFilter(categories_any=["tea", "ink"]), lambda n: n % 4 in (0, 3)),
        (ItemFilter(categories_none=["tea"]), lambda n: n % 4),
        (ItemFilter(exclude_item_ids=[f"item-{n:03}" for n in range(150, 160)]), lambda n: not 150 <= n < 160),
        (ItemFilter(ranges=[NumberRange(name="price", min=20, max=60)]), lambda n: 20 <= n <= 60),
        (ItemFilter(ranges=[NumberRange(name="year", min=2019)]), lambda n: n % 20 == 19),
        (ItemFilter(labels=[LabelMatch(name="colour", values=["red"])]), lambda n: n < 10),
    ],
    ids=["categories_any", "categories_none", "exclusions", "price", "year", "labels"],
)
async def test_a_filter_is_kept_on_every_rung(house, item_filter, allowed) -> None:
    house.put_user(clicked=(190,))
    recommender, _ = await house.open()
    for user_id in ("ada", "nobody"):
        answer = await recommender.Recommend(ask(user_id, filter=item_filter))
        assert answer.items
        assert all(allowed(int(item.item_id[-3:])) for item in answer.items)
    assert house.candidate.requests[-1].filter == item_filter


async def test_what_the_user_never_wants_is_left_out(house) -> None:
    house.put_user(profile=angler(preferences=[Preference(category="tea", weight=-1)]))
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert all(int(name[-3:]) % 4 for name in ids(answer))


async def test_a_filter_that_allows_nothing_answers_empty_and_says_so(house) -> None:
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask(filter=ItemFilter(categories_any=["nowhere"])))
    assert not answer.items
    assert "FEW_CANDIDATES" in reasons(answer)


async def test_min_score_leaves_out_what_the_ranker_does_not_know(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask(min_score=0.15))
    assert {int(name[-3:]) for name in ids(answer)} <= {*range(150, 160), *range(180, 185)}


async def test_the_ranker_hears_of_no_source_that_it_was_not_trained_on(house) -> None:
    # 100 comes by ann and from the batch scores, 60 from the batch scores alone.
    house.put_user(batch=(60, 100))
    recommender, _ = await house.open()
    await recommender.Recommend(ask())
    (asked,) = house.ranker.requests[-1].users
    bits = dict(zip(asked.item_ids, asked.source_bits, strict=True))
    assert not any(value & SOURCE_BIT["batch"] for value in bits.values())
    assert bits["item-060"] == bits["item-100"] == SOURCE_BIT["ann"]


async def test_contributions_add_up_to_the_score(house) -> None:
    house.put_user(batch=range(100, 120))
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask(explain=True))
    for item in answer.items:
        assert math.isclose(sum(part.value for part in item.contributions), item.score, abs_tol=1e-9)
    assert {part.name for part in answer.items[0].contributions} >= {"ranker", "batch", "affinity", "diversity"}
    scores = [item.score for item in answer.items]
    assert scores == sorted(scores, reverse=True)


async def test_the_same_request_gives_the_same_answer(house) -> None:
    house.put_user()
    recommender, _ = await house.open(exploration_rate=1.0)
    context = Context(as_of_time=from_ms(now_ms()))
    answers = [await recommender.Recommend(ask(context=context, disable_exploration=True)) for _ in range(3)]
    assert ids(answers[0]) == ids(answers[1]) == ids(answers[2])


async def test_exploration_shows_a_new_item_and_its_propensity(house) -> None:
    house.put_user()
    recommender, _ = await house.open(exploration_rate=1.0, blend_weights={"retrieval": 1.0})
    answer = await recommender.Recommend(ask(num_items=10))
    tried = answer.items[5]
    assert int(tried.item_id[-3:]) in range(180, 185)
    assert tried.propensity == pytest.approx(1 / 5)
    assert [item.propensity for item in answer.items if item.position != 5] == [1.0] * 9


async def test_a_registry_that_loses_its_pointer_leaves_the_release_in_place(house, registry) -> None:
    recommender, _ = await house.open()
    (registry / "CURRENT").unlink()
    await asyncio.sleep(0.3)  # several looks of the watcher, which leave no other trace
    assert not house.process.stopping.is_set()
    assert_good(await recommender.Recommend(ask()))


async def test_rules_of_the_bundle_pin_and_bury(house, registry) -> None:
    rules = {
        "pin": [{"item_id": "item-030", "position": 0}, {"item_id": "item-199", "position": 1}],
        "bury": [{"category": "rope", "amount": 1.0}],
        "lists": [{"surface": "home", "item_ids": ["item-070", "item-071"]}],
    }
    write_bundle(registry, house.settings_of({}).features, "v2", rules=rules)
    house.put_user()
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask())
    assert ids(answer)[0] == "item-030"
    assert "item-199" not in ids(answer), "a pin does not bring back what is not available"
    assert "picked by the editors" in answer.items[0].reasons
    assert all(int(name[-3:]) % 4 != 2 for name in ids(answer)[1:])
    request = ask("nobody", num_items=3, context=Context(surface="home"))
    answer = await recommender.Recommend(request)
    assert tier(answer) == "RULES"
    assert ids(answer) == ["item-070", "item-071", "item-000"]


@pytest.mark.parametrize(
    ("asked", "stage", "reason"),
    [
        ("item-004", "filter", "seen by the user"),
        ("item-101", "filter", "excluded by the request"),
        ("item-199", "filter", "not available"),
        ("item-150", "select", "ranked below"),
        ("item-090", "retrieve", "quota of ann"),
        ("item-x", "retrieve", "does not know"),
    ],
)
async def test_explain_says_why_not(house, asked, stage, reason) -> None:
    house.put_user(batch=(4,))
    recommender, _ = await house.open()
    request = ask(num_items=3, filter=ItemFilter(exclude_item_ids=["item-101"]))
    explained = await recommender.Explain(pb.ExplainRequest(request=request, item_id=asked))
    assert not explained.in_answer
    assert (explained.dropped_by_stage, reason in explained.dropped_reason) == (stage, True), explained
    if stage == "select":
        assert explained.rank_at_drop >= 3
        assert explained.HasField("score_at_drop")
    if asked == "item-090":
        assert explained.rank_at_drop == 777


async def test_what_the_ranker_had_no_time_for_stays_behind_and_says_so(house) -> None:
    house.put_user()
    house.ranker.cut_below = 150
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask(num_items=3))
    assert types.DEGRADED_REASON_DEADLINE_SHORT in answer.degraded_reasons
    assert answer.served_tier == types.SERVING_TIER_RANKED
    for asked, is_cut in (("item-140", True), ("item-152", False)):
        explained = await recommender.Explain(pb.ExplainRequest(request=ask(num_items=3), item_id=asked))
        assert (explained.dropped_by_stage, "only the light scorer" in explained.dropped_reason) == ("select", is_cut)
    house.ranker.cut_below = 0
    answer = await recommender.Recommend(ask(num_items=3))
    assert not answer.degraded_reasons


async def test_explain_says_why(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask(num_items=3))
    explained = await recommender.Explain(pb.ExplainRequest(request=ask(num_items=3), item_id=ids(answer)[1]))
    assert explained.in_answer
    assert explained.recommendation.contributions
    assert explained.recommendation.reasons
    assert explained.served_tier == types.SERVING_TIER_RANKED
    assert house.candidate.requests[-1].probe_item_ids == [ids(answer)[1]]


async def test_a_batch_answers_each_user_alone(house) -> None:
    house.put_user("ada")
    recommender, _ = await house.open()
    requests = [ask("ada"), ask("nobody", num_items=3), ask("eve", num_items=501)]
    response = await recommender.RecommendBatch(pb.RecommendBatchRequest(requests=requests))
    first, second, third = response.results
    assert tier(first.response) == "RANKED"
    assert (second.user_id, tier(second.response), len(second.response.items)) == ("nobody", "POPULAR", 3)
    assert (third.error.code, third.error.field) == ("INVALID_ARGUMENT", "requests[2].num_items")


async def test_a_large_batch_is_answered_within_its_deadline(house) -> None:
    recommender, _ = await house.open()
    house.candidate.mode = house.ranker.mode = "hang"
    requests = [ask(f"user-{n}", session_events=[click(n % 100)]) for n in range(1000)]
    response = await recommender.RecommendBatch(pb.RecommendBatchRequest(requests=requests), timeout=4)
    assert [result.user_id for result in response.results] == [request.user_id for request in requests]
    for result in response.results:
        assert_good(result.response)


INVALID = {
    "no user": (RecommendRequest(), "user_id"),
    "long user": (ask("u" * 129), "user_id"),
    "user with NUL": (ask("a\0b"), "user_id"),
    "negative num_items": (ask(num_items=-1), "num_items"),
    "too many items": (ask(num_items=501), "num_items"),
    "cursor": (ask(cursor="next"), "cursor"),
    "min_score NaN": (ask(min_score=math.nan), "min_score"),
    "min_score above 1": (ask(min_score=1.5), "min_score"),
    "long bundle version": (ask(bundle_version="v" * 129), "bundle_version"),
    "long arm": (ask(experiment_arm="a" * 129), "experiment_arm"),
    "long surface": (ask(context=Context(surface="s" * 129)), "context.surface"),
    "long tag": (ask(context=Context(tags={"t": "x" * 257})), "context.tags"),
    "as of 1970": (ask(context=Context(as_of_time=from_ms(5))), "context.as_of_time"),
    "exclusions": (ask(filter=ItemFilter(exclude_item_ids=["x"] * 10_001)), "filter.exclude_item_ids"),
    "long exclusion": (ask(filter=ItemFilter(exclude_item_ids=["x" * 129])), "filter.exclude_item_ids"),
    "empty category": (ask(filter=ItemFilter(categories_any=[""])), "filter.categories_any[0]"),
    "range NaN": (ask(filter=ItemFilter(ranges=[NumberRange(name="price", min=math.nan)])), "filter.ranges[0]"),
    "range upside down": (ask(filter=ItemFilter(ranges=[NumberRange(name="p", min=2, max=1)])), "filter.ranges[0]"),
    "range of nothing": (ask(filter=ItemFilter(ranges=[NumberRange()])), "filter.ranges[0].name"),
    "label of nothing": (ask(filter=ItemFilter(labels=[LabelMatch(name="a")])), "filter.labels[0].values"),
    "token without source": (ask(tokens=[IngestToken(offset=1)]), "tokens[0].source"),
    "negative offset": (ask(tokens=[IngestToken(source=1, offset=-1)]), "tokens[0]"),
    "session event without id": (ask(session_events=[click(1, "")]), "session_events[0].event_id"),
    "session event without time": (
        ask(session_events=[Event(event_id="a", item_id="b", kind="click")]),
        "session_events[0].event_time",
    ),
    "session event of the future": (
        ask(session_events=[Event(event_id="a", item_id="b", kind="click", event_time=from_ms(FAR_AHEAD_MS))]),
        "session_events[0].event_time",
    ),
    "session event of another": (ask(session_events=[click(1, user_id="eve")]), "session_events[0].user_id"),
    "too many session events": (ask(session_events=[click(1)] * 101), "session_events"),
}


async def test_a_bad_request_names_the_field(house) -> None:
    recommender, _ = await house.open()
    for name, (request, expected) in INVALID.items():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await recommender.Recommend(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
        assert caught.value.details().startswith(f"{expected}: "), (name, caught.value.details())


async def test_a_bad_batch_or_question_names_the_field(house) -> None:
    recommender, _ = await house.open()
    bad = [
        (recommender.RecommendBatch, pb.RecommendBatchRequest(), "requests: "),
        (recommender.RecommendBatch, pb.RecommendBatchRequest(requests=[ask()] * 1001), "requests: "),
        (recommender.RecommendBatch, pb.RecommendBatchRequest(requests=[ask(), ask()]), "requests[1].user_id: "),
        (recommender.Explain, pb.ExplainRequest(request=ask()), "item_id: "),
        (recommender.Explain, pb.ExplainRequest(request=ask(""), item_id="a"), "request.user_id: "),
    ]
    for method, request, said in bad:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith(said)


async def test_model_info_and_watch_tell_what_serves(house) -> None:
    recommender, _ = await house.open()
    await recommender.Recommend(ask("nobody"))
    info = await recommender.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.versions.bundle_version, info.item_count, info.feature_signature) == ("v1", 200, "sig")
    watching = recommender.WatchServing(pb.WatchServingRequest())
    async for told in watching:
        assert told.answers_by_tier == {"popular": 1}
        assert told.breakers == {"redis": "closed", "candidate": "closed", "ranker": "closed", "kafka": "closed"}
        break
    watching.cancel()


async def test_a_stored_state_of_another_encoding_is_a_missing_one(house) -> None:
    from features.definitions import USER_STATE
    from features.stores.online import Write

    house.store().write([Write(USER_STATE, ("ada",), {"state": b"\xff\xffnot a state", "revision": 1})])
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert tier(answer) == "POPULAR"


async def test_a_surface_has_settings_of_its_own(house) -> None:
    house.put_user()
    surfaces = {"mail": {"num_items": 6, "exclude_seen_kinds": []}}
    recommender, _ = await house.open(surfaces=surfaces, num_candidates=500)
    assert len((await recommender.Recommend(ask())).items) == 20
    mail = await recommender.Recommend(ask(context=Context(surface="mail")))
    assert len(mail.items) == 6
    wide = await recommender.Recommend(ask(num_items=100, context=Context(surface="mail")))
    assert {"item-004", "item-008"} & set(ids(wide)), "on this surface what was clicked may come again"


async def test_what_was_shown_and_let_pass_falls(house) -> None:
    house.put_user()
    recommender, _ = await house.open(fatigue_weight=1.0, diversity=0.0)
    first = await recommender.Recommend(RecommendRequest(user_id="ada"))
    second = await recommender.Recommend(ask(explain=True))
    assert not set(ids(first)) & set(ids(second))
    again = await recommender.Recommend(ask("bob", session_events=[click(4, user_id="bob")]))
    assert set(ids(again)) & set(ids(first)), "another user is not tired of them"


async def test_the_same_question_is_retrieved_once_until_anything_changes(house) -> None:
    house.put_user()
    recommender, _ = await house.open(retrieval_cache_seconds=30)
    warm_ups = len(house.candidate.requests)
    first = await recommender.Recommend(ask())
    second = await recommender.Recommend(ask())
    assert ids(first) == ids(second)
    assert second.versions == first.versions
    assert len(house.candidate.requests) == warm_ups + 1
    for changed in (
        ask(session_events=[click(101, "a")]),
        ask(session_events=[click(105, "a")]),
        ask(filter=ItemFilter(categories_any=["tea"])),
        ask(context=Context(surface="mail")),
    ):
        before = len(house.candidate.requests)
        await recommender.Recommend(changed)
        assert len(house.candidate.requests) == before + 1
    house.put_user(clicked=(4, 8, 12))
    assert (await recommender.Recommend(ask())).state_revision == 3
    assert len(house.candidate.requests) == warm_ups + 6


async def test_an_incomplete_retrieval_is_not_kept(house) -> None:
    house.put_user(batch=(60, 61))
    recommender, _ = await house.open(retrieval_cache_seconds=30)
    house.candidate.mode = "fail"
    assert "RETRIEVAL_UNAVAILABLE" in reasons(await recommender.Recommend(ask()))
    house.candidate.mode = "answer"
    assert not reasons(await recommender.Recommend(ask()))
