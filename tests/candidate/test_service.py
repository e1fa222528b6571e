"""CandidateService over a real socket, on a bundle of the real trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from candidate.encoder import encode_items
from core.codec import from_ms
from core.kafka import Record
from core.topics import Topics
from features import windows
from features.windows import UserState
from headrace.v1.candidate_service_pb2 import (
    EncodeUsersRequest,
    GetIndexInfoRequest,
    RetrieveCandidatesResponse,
    UserToEncode,
)
from headrace.v1.events_pb2 import Event, Item
from headrace.v1.types_pb2 import ItemFilter, LabelMatch, NumberRange

if TYPE_CHECKING:
    from conftest import Running, World

StateOf = Callable[..., UserState]


def ids(response: RetrieveCandidatesResponse) -> list[str]:
    return [candidate.item_id for candidate in response.candidates]


def genres(response: RetrieveCandidatesResponse, source: str) -> list[str]:
    """Genres of what a source brought, in its order."""
    ranked = [(p.rank, c.item_id) for c in response.candidates for p in c.provenance if p.source == source]
    return [item_id.split("-")[0] for _, item_id in sorted(ranked)]


async def test_candidates_follow_the_taste_and_say_where_they_come_from(running: Running, state_of: StateOf) -> None:
    response = await running.retrieve(state_of("folk-1", "folk-2", "folk-3"))
    assert len(response.candidates) == 30
    assert len(set(ids(response))) == 30
    assert genres(response, "ann")[:8].count("folk") >= 7
    assert genres(response, "item_to_item")[:3] == ["folk"] * 3
    assert response.encoded_on_the_spot
    assert response.bundle_version == "v1"
    assert response.index_version == "i-v1"
    assert not response.missing_sources
    sources = {p.source for candidate in response.candidates for p in candidate.provenance}
    assert sources == {"ann", "item_to_item", "co_visitation", "trending", "new"}


async def test_a_user_without_history_gets_what_trends_and_what_is_new(running: Running) -> None:
    response = await running.retrieve()
    assert len(response.candidates) == 30
    assert {p.source for candidate in response.candidates for p in candidate.provenance} == {"trending", "new"}
    assert not response.encoded_on_the_spot


async def test_a_stored_vector_counts_only_while_it_is_current(
    running: Running, state_of: StateOf, music: World
) -> None:
    state = state_of("jazz-1", "jazz-2")
    version = running.snapshots.current.embedding_version
    metal = music.trained.item_vectors[[item.item_id for item in music.items].index("metal-3")].tolist()
    stored = {"embedding": metal, "embedding_version": version, "embedding_revision": state.revision}
    used = await running.retrieve(state, **stored)
    assert not used.encoded_on_the_spot
    assert genres(used, "ann")[0] == "metal"
    for change in ({"embedding_version": "e0"}, {"embedding_revision": state.revision - 1}):
        encoded = await running.retrieve(state, **{**stored, **change})
        assert encoded.encoded_on_the_spot
        assert genres(encoded, "ann")[0] == "jazz"


async def test_filters_act_inside_the_search(running: Running, state_of: StateOf) -> None:
    state = state_of("folk-1", "folk-2")
    jazz = await running.retrieve(state, filter=ItemFilter(categories_any=["jazz"]), num_candidates=20)
    assert sorted(ids(jazz)) == sorted(f"jazz-{n}" for n in range(20))
    narrow = ItemFilter(
        categories_none=["jazz", "metal"],
        ranges=[NumberRange(name="year", min=1985, max=1988), NumberRange(name="price", max=12.5)],
        labels=[LabelMatch(name="label", values=["label-1"])],
        exclude_item_ids=["folk-7"],
    )
    some = await running.retrieve(state, filter=narrow)
    assert sorted(ids(some)) == ["folk-5", "techno-5", "techno-7"]
    assert not (await running.retrieve(state, filter=ItemFilter(categories_any=["opera"]))).candidates


async def test_what_the_user_has_seen_can_be_left_out(running: Running, state_of: StateOf) -> None:
    state = state_of("folk-1", "folk-2")
    assert "folk-1" in ids(await running.retrieve(state, num_candidates=80))
    assert not {"folk-1", "folk-2"} & set(ids(await running.retrieve(state, num_candidates=80, exclude_seen=True)))


async def test_quotas_of_the_request_are_taken_literally(running: Running, state_of: StateOf) -> None:
    response = await running.retrieve(state_of("folk-1"), source_quotas={"ann": 5, "new": 2})
    counts = [p.source for candidate in response.candidates for p in candidate.provenance]
    assert (counts.count("ann"), counts.count("new"), len(counts)) == (5, 2, 7)


async def test_a_new_item_is_found_by_its_content_and_a_removed_one_is_gone(
    running: Running, state_of: StateOf
) -> None:
    state = state_of("techno-1", "techno-2")
    published = from_ms(1_710_000_000_000)
    running.put(Item(item_id="fresh", title="techno record", categories=["techno"], publish_time=published))
    response = await running.retrieve(state, filter=ItemFilter(categories_any=["techno"]))
    fresh = next(candidate for candidate in response.candidates if candidate.item_id == "fresh")
    assert {p.source for p in fresh.provenance} >= {"ann", "item_to_item", "new"}
    assert next(p.rank for p in fresh.provenance if p.source == "new") == 0
    info = await running.stub.GetIndexInfo(GetIndexInfoRequest())
    assert (info.main_item_count, info.delta_item_count, info.tombstone_count, info.dimension) == (81, 0, 0, 32)
    # Its history may hold it at once.
    known = await running.retrieve(state_of("fresh"))
    assert genres(known, "ann")[:5].count("techno") >= 4
    for item_id in ("fresh", "techno-5"):
        running.remove(item_id)
        assert item_id not in ids(await running.retrieve(state, filter=ItemFilter(categories_any=["techno"])))
    running.put(Item(item_id="techno-5", title="techno record", categories=["jazz"]))
    assert "techno-5" in ids(await running.retrieve(state, filter=ItemFilter(categories_any=["jazz"])))
    assert "techno-5" not in ids(await running.retrieve(state, filter=ItemFilter(categories_any=["techno"])))


async def test_of_several_news_of_an_item_in_one_batch_the_last_counts(running: Running, state_of: StateOf) -> None:
    """More than are encoded at once; every third goes again, every third of the others comes back as something else."""
    many = [Item(item_id=f"new-{n}", title="techno record", categories=["techno"]) for n in range(90)]
    gone = [item.item_id for item in many[::3]]
    back = [Item(item_id=item.item_id, title="folk record", categories=["folk"]) for item in many[::9]]
    running.news(*many, *gone, *back)
    snapshot, asked = running.snapshots.current, state_of("techno-1")
    for genre, expected in (
        ("techno", {item.item_id for item in many} - set(gone)),
        ("folk", {item.item_id for item in back}),
    ):
        found = await running.retrieve(asked, num_candidates=200, filter=ItemFilter(categories_any=[genre]))
        assert {item_id for item_id in ids(found) if item_id.startswith("new-")} == expected
    rows = [snapshot.catalog.row(item.item_id) for item in (many[1], back[0])]
    alone = encode_items(snapshot._towers, [many[1], back[0]])
    assert np.allclose(snapshot.vectors[rows], alone, atol=1e-5)


async def test_items_that_go_together_are_learnt_from_events(running: Running, state_of: StateOf) -> None:
    """Items of two genres, so that no vector could know."""
    running.put(Item(item_id="encore", title="opera record", categories=["opera"]))
    now_ms = time.time_ns() // 1_000_000
    for n in range(40):
        for step, item_id in enumerate(("jazz-1", "encore")):
            at = from_ms(now_ms + step)
            running.tell(
                2 * n + step,
                Event(event_id=f"{n}/{step}", user_id=f"v{n}", item_id=item_id, kind="click", event_time=at),
            )
    response = await running.retrieve(state_of("jazz-1"), source_quotas={"co_visitation": 10})
    assert ids(response)[0] == "encore"
    (first,) = response.candidates[0].provenance
    assert (first.source, first.rank) == ("co_visitation", 0)
    assert 0 < first.score < 1
    assert "encore" not in ids(
        await running.retrieve(
            state_of("jazz-1"),
            source_quotas={"co_visitation": 10},
            filter=ItemFilter(exclude_item_ids=["encore"]),
        )
    )


async def test_items_outside_their_time_are_not_retrieved(running: Running, state_of: StateOf) -> None:
    state, now_ms = state_of("techno-1"), time.time_ns() // 1_000_000
    techno = ItemFilter(categories_any=["techno"])
    running.put(Item(item_id="early", categories=["techno"], publish_time=from_ms(now_ms + 60_000)))
    running.put(Item(item_id="late", categories=["techno"], expire_time=from_ms(now_ms - 60_000)))
    running.put(Item(item_id="off", categories=["techno"], available=False))
    assert not {"early", "late", "off"} & set(ids(await running.retrieve(state, filter=techno)))
    then = await running.retrieve(state, filter=techno, context={"as_of_time": from_ms(now_ms + 120_000)})
    assert "early" in ids(then)


async def test_broken_messages_are_left_out_and_the_rest_applied(running: Running) -> None:
    topic = Topics(running.settings.kafka.topic_prefix).items
    broken = Record(topic, b"x", b"\xff\xff\xff", None, 0, 0)
    good = Record(topic, b"good", Item(item_id="good", categories=["jazz"]).SerializeToString(), None, 0, 1)
    running.snapshots.feeds.catalog.apply([broken, good])
    assert running.snapshots.current.catalog.row("good") >= 0


async def test_users_are_encoded_in_batches_and_in_order(running: Running, state_of: StateOf) -> None:
    states = [state_of(f"jazz-{n % 20}", f"metal-{n % 7}") for n in range(150)] + [state_of("unheard-of"), UserState()]
    users = [UserToEncode(user_id=f"u{n}", state=windows.encode(state)) for n, state in enumerate(states)]
    response = await running.stub.EncodeUsers(EncodeUsersRequest(users=users), timeout=10)
    assert [user.user_id for user in response.users] == [f"u{n}" for n in range(152)]
    assert [user.revision for user in response.users] == [state.revision for state in states]
    assert [len(user.embedding) for user in response.users] == [32] * 150 + [0, 0]
    assert response.embedding_version == running.snapshots.current.embedding_version
    snapshot = running.snapshots.current
    alone, _ = snapshot.encoder.encode(states[77:78], snapshot.catalog, snapshot.vectors)
    assert np.allclose(response.users[77].embedding, alone[0], atol=1e-5)


async def test_a_source_that_fails_is_named_and_the_others_answer(
    running: Running, state_of: StateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no index today")

    monkeypatch.setattr("candidate.sources.AnnSource.retrieve", fail)
    response = await running.retrieve(state_of("folk-1"))
    assert list(response.missing_sources) == ["ann"]
    assert response.candidates


async def test_columns_say_what_messages_say(running: Running, state_of: StateOf) -> None:
    state = state_of("folk-1", "metal-2")
    now = from_ms(time.time_ns() // 1_000_000)
    messages, columns = [
        await running.retrieve(state, num_candidates=60, columns=columns, context={"as_of_time": now})
        for columns in (False, True)
    ]
    assert not columns.candidates
    assert not messages.item_ids
    assert list(columns.item_ids) == ids(messages)
    assert list(columns.scores) == [candidate.score for candidate in messages.candidates]
    proposed = {
        (columns.item_ids[at], part.source, score, rank)
        for part in columns.proposals
        for at, score, rank in zip(part.candidates, part.scores, part.ranks, strict=True)
    }
    assert proposed == {(c.item_id, p.source, p.score, p.rank) for c in messages.candidates for p in c.provenance}


async def test_what_the_user_did_a_moment_ago_counts(running: Running, state_of: StateOf, music: World) -> None:
    """Read your writes: the stored vector is of before, the history that comes along is of now."""
    before, now = state_of("jazz-1", "jazz-2"), state_of("jazz-1", "jazz-2", "metal-1", "metal-2", "metal-3")
    vectors, _ = running.snapshots.current.encoder.encode(
        [before], running.snapshots.current.catalog, running.snapshots.current.vectors
    )
    stored = {
        "embedding": vectors[0].tolist(),
        "embedding_version": music.trained.towers.embedding_version,
        "embedding_revision": before.revision,
    }
    assert genres(await running.retrieve(before, **stored), "ann")[:5].count("jazz") >= 4
    after = await running.retrieve(now, **stored)
    assert after.encoded_on_the_spot
    assert genres(after, "ann")[:5].count("metal") >= 4
    # Nearest to the last five items are these themselves.
    assert genres(after, "item_to_item")[:5].count("metal") == 3


async def test_a_vector_alone_is_enough(running: Running, music: World) -> None:
    version = music.trained.towers.embedding_version
    techno = music.trained.item_vectors[[item.item_id for item in music.items].index("techno-3")]
    # Its length says nothing.
    for length in (1e-30, 1.0, 1e30):
        response = await running.retrieve(embedding=(techno * length).tolist(), embedding_version=version)
        assert not response.encoded_on_the_spot
        assert genres(response, "ann")[:5].count("techno") >= 4


async def test_history_of_unknown_items_is_a_defined_answer(running: Running, state_of: StateOf) -> None:
    response = await running.retrieve(state_of("never", "heard", "of"))
    assert {p.source for candidate in response.candidates for p in candidate.provenance} == {"trending", "new"}
    assert not response.missing_sources
    assert len(response.candidates) == 30
