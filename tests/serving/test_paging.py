"""Pages of one list: nothing twice, nothing left out, and what was not shown yet is ranked anew; over real sockets."""

import base64

import grpc
import pytest

from headrace.v1 import types_pb2 as types

from .conftest import NOWHERE, click
from .test_tiers import ask, ids, reasons, tier


async def pages(recommender, limit=50, cursor="", **more) -> list:
    """All pages of one list, from a cursor on."""
    answers = [await recommender.Recommend(ask(with_cursor=True, cursor=cursor, num_items=12, **more))]
    while answers[-1].next_cursor:
        assert len(answers) < limit, "the list does not end"
        answers.append(await recommender.Recommend(ask(cursor=answers[-1].next_cursor, num_items=12, **more)))
    return answers


def all_ids(answers) -> list[str]:
    return [name for answer in answers for name in ids(answer)]


async def test_without_being_asked_for_there_is_no_cursor(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    assert (await recommender.Recommend(ask())).next_cursor == ""


async def test_pages_show_every_candidate_once_and_then_end(house) -> None:
    house.put_user(batch=(60, 61))
    recommender, _ = await house.open()
    whole = ids(await recommender.Recommend(ask(num_items=100)))
    answers = await pages(recommender)
    shown = all_ids(answers)
    assert len(shown) == len(set(shown))
    assert set(shown) == set(whole)
    assert [item.position for answer in answers for item in answer.items] == list(range(len(shown)))
    assert {tier(answer) for answer in answers} == {"RANKED"}
    assert {reason for answer in answers for reason in reasons(answer)} == set()
    # The later pages do not retrieve again.
    assert len(house.candidate.requests) == 3 + 2, "three to warm up, one for each list"


async def test_what_was_not_shown_yet_is_ranked_anew(house) -> None:
    house.put_user(clicked=(4,))
    recommender, _ = await house.open(blend_weights={"ranker": 0.1, "affinity": 1.0}, diversity=0.0)
    first = await recommender.Recommend(ask(with_cursor=True))
    same = await recommender.Recommend(ask(cursor=first.next_cursor))
    other = await recommender.Recommend(
        ask(cursor=first.next_cursor, session_events=[click(101, "a"), click(105, "b"), click(109, "c")])
    )
    assert other.state_revision == same.state_revision + 3
    soap = [sum(int(name[-3:]) % 4 == 1 for name in ids(answer)) for answer in (same, other)]
    assert soap[1] > soap[0]
    assert not set(ids(first)) & set(ids(other))


async def test_an_item_taken_from_the_list_by_the_user_does_not_come_and_costs_no_other(house) -> None:
    house.put_user(clicked=(4,))
    recommender, _ = await house.open()
    first = await recommender.Recommend(ask(with_cursor=True))
    expected = all_ids(await pages(recommender, cursor=first.next_cursor))
    gone = expected[0]
    house.put_user(clicked=(4, int(gone[-3:])))
    assert sorted(all_ids(await pages(recommender, cursor=first.next_cursor))) == sorted(set(expected) - {gone})


async def test_pages_from_the_ladder_do_not_repeat_either(house) -> None:
    house.overrides.update(redis="redis://" + NOWHERE, kafka=NOWHERE)
    recommender, _ = await house.open(candidate_target=NOWHERE, ranker_target=NOWHERE)
    answers = await pages(recommender)
    shown = all_ids(answers)
    assert len(shown) == len(set(shown)) == 197, "every item that may be shown"


async def test_a_list_goes_on_when_the_ranker_goes_away_and_when_redis_does(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    first = await recommender.Recommend(ask(with_cursor=True))
    house.ranker.mode = "fail"
    second = await recommender.Recommend(ask(cursor=first.next_cursor))
    assert tier(second) == "RERANKED_BATCH"
    house.stop_redis()
    third = await recommender.Recommend(ask(cursor=second.next_cursor))
    assert tier(third) in ("LAST_GOOD", "POPULAR")
    shown = all_ids([first, second, third])
    assert len(shown) == len(set(shown)) == 60


async def test_a_cursor_that_is_not_ours_is_refused(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    cursor = (await recommender.Recommend(ask(with_cursor=True))).next_cursor
    changed = cursor[:40] + ("A" if cursor[40] != "A" else "B") + cursor[41:]
    bomb = base64.urlsafe_b64encode(b"x" * 1000).decode()
    for bad in (changed, cursor[:-4], "no cursor", "é", bomb, "A" * 2_000_000):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await recommender.Recommend(ask(cursor=bad))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "cursor" in caught.value.details()
    with pytest.raises(grpc.aio.AioRpcError, match="another user"):
        await recommender.Recommend(ask("bob", cursor=cursor))
    assert (await recommender.Recommend(ask(cursor=cursor))).served_tier == types.SERVING_TIER_RANKED
