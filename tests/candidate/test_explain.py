"""Probes: the exact place of any item, and what let it in or kept it out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from core.codec import from_ms
from features.windows import UserState
from headrace.v1.candidate_service_pb2 import CandidateProbe
from headrace.v1.events_pb2 import Item
from headrace.v1.types_pb2 import ItemFilter

if TYPE_CHECKING:
    from conftest import Running, World

StateOf = Callable[..., UserState]


def ids(response: object) -> list[str]:
    return [candidate.item_id for candidate in response.candidates]  # type: ignore[attr-defined]


async def test_probes_say_what_let_an_item_in_or_kept_it_out(running: Running, state_of: StateOf) -> None:
    response = await running.retrieve(
        state_of("folk-1", "folk-2"),
        filter=ItemFilter(categories_none=["metal"]),
        num_candidates=5,
        exclude_seen=True,
        probe_item_ids=["nowhere", "metal-1", "folk-1", "jazz-1", "folk-9"],
    )
    probes = {probe.item_id: probe for probe in response.probes}
    assert not probes["nowhere"].known
    assert probes["metal-1"].decided_by == "filter.categories_none"
    assert probes["folk-1"].decided_by == "exclude_seen"
    for item_id in ("jazz-1", "folk-9"):
        is_in = item_id in ids(response)
        assert probes[item_id].decided_by.startswith("source" if is_in else ("quota", "num_candidates"))
    assert probes["folk-9"].exact_rank < probes["jazz-1"].exact_rank


async def test_ranks_and_scores_are_exact_for_every_item(running: Running, state_of: StateOf, music: World) -> None:
    state = state_of("folk-1", "jazz-2")
    names = [item.item_id for item in music.items]
    snapshot = running.snapshots.current
    (vector,), _ = snapshot.encoder.encode([state], snapshot.catalog, snapshot.vectors)
    scores = music.trained.item_vectors @ vector
    item_filter = ItemFilter(categories_none=["metal"])
    response = await running.retrieve(state, filter=item_filter, probe_item_ids=names, num_candidates=5)
    passing = np.array([not name.startswith("metal") for name in names])
    for name, probe, score in zip(names, response.probes, scores.tolist(), strict=True):
        assert probe.exact_score == pytest.approx(score, abs=1e-5)
        assert abs(probe.exact_rank - int((scores > score).sum())) <= 1
        places = {place.source: place for place in probe.places}
        if name.startswith("metal"):
            assert (list(probe.blocked_by), dict(places)) == (["filter.categories_none"], {})
        else:
            assert abs(places["ann"].rank - int((scores[passing] > score).sum())) <= 1
            assert places["ann"].score == pytest.approx(score, abs=1e-5)


async def test_places_are_the_ranks_that_the_sources_give(running: Running, state_of: StateOf, music: World) -> None:
    """With quotas that leave nothing out, each place must be where the source put the item."""
    names = [item.item_id for item in music.items]
    everything = dict.fromkeys(("ann", "item_to_item", "co_visitation", "trending", "new"), 80)
    context = {"as_of_time": from_ms(time.time_ns() // 1_000_000)}
    response = await running.retrieve(
        state_of("folk-1", "jazz-2"),
        source_quotas=everything,
        probe_item_ids=names,
        num_candidates=80,
        context=context,
    )
    places = {(p.item_id, place.source): place for p in response.probes for place in p.places}
    proposed = {(c.item_id, part.source): part for c in response.candidates for part in c.provenance}
    assert places.keys() == proposed.keys()
    for key, part in proposed.items():
        assert places[key].score == pytest.approx(part.score, abs=1e-5)
        if key[1] != "new":
            # Equal scores may stand either way.
            assert abs(places[key].rank - part.rank) <= 2


async def test_every_reason_is_told(running: Running, state_of: StateOf) -> None:
    state = state_of("folk-1", "folk-2")
    running.put(Item(item_id="gone", title="folk record", categories=["folk"], available=False))

    async def decided(item_id: str, **request: object) -> CandidateProbe:
        response = await running.retrieve(state, probe_item_ids=[item_id], **request)
        assert (item_id in ids(response)) == response.probes[0].decided_by.startswith("source ")
        return response.probes[0]

    assert (await decided("nowhere")).decided_by == "unknown item"
    assert (await decided("gone")).decided_by == "not available at this time"
    both = await decided("folk-1", exclude_seen=True, filter=ItemFilter(exclude_item_ids=["folk-1"]))
    assert list(both.blocked_by) == ["filter.exclude_item_ids", "exclude_seen"]
    assert (await decided("metal-9", source_quotas={"ann": 3})).decided_by.startswith("quota: ann has it at rank ")
    late = await decided("jazz-3", source_quotas={"ann": 80}, num_candidates=1)
    assert late.decided_by.startswith("num_candidates")
    first = await decided("folk-1", source_quotas={"ann": 80}, num_candidates=80)
    assert first.decided_by.startswith("source ann (rank ")


async def test_for_a_user_of_whom_nothing_is_known_no_rank_is_made_up(running: Running) -> None:
    response = await running.retrieve(probe_item_ids=["jazz-3"], num_candidates=1, source_quotas={"new": 1})
    (probe,) = response.probes
    assert not probe.HasField("exact_rank")
    assert {place.source for place in probe.places} == {"trending"}
    assert probe.decided_by.startswith("quota: trending has it at rank")
