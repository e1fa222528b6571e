"""Merging: each item once, nobody beyond the limit, each source its share."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from candidate.bootstrap import make_sources
from candidate.merging import merge, scaled_quotas
from candidate.sources import Hits
from core.errors import ConfigError
from core.settings import SourceName, load_settings
from features.vectors import SOURCES

NAMES = ("ann", "item_to_item", "co_visitation", "trending", "new")


def hits(*rows: int, start: float = 1.0) -> Hits:
    return Hits(np.array(rows, np.int64), np.array([start - 0.01 * rank for rank in range(len(rows))], np.float32))


sources = st.dictionaries(
    st.sampled_from(NAMES), st.lists(st.integers(0, 60), unique=True, max_size=40).map(lambda rows: hits(*rows))
)


@given(sources, st.integers(1, 100))
def test_every_candidate_comes_once_with_all_who_proposed_it(found: dict[str, Hits], limit: int) -> None:
    merged = merge(found, dict.fromkeys(NAMES, 10), limit)
    everything = {row for hit in found.values() for row in hit.rows.tolist()}
    rows = merged.rows.tolist()
    assert len(rows) == len(set(rows)) == min(limit, len(everything))
    assert set(rows) <= everything
    proposed = {
        (name, rows[at], rank): score
        for name, part in merged.proposals.items()
        for at, score, rank in zip(part.at.tolist(), part.scores.tolist(), part.ranks.tolist(), strict=True)
    }
    assert proposed == {
        (name, row, rank): score
        for name, hit in found.items()
        for rank, (row, score) in enumerate(zip(hit.rows.tolist(), hit.scores.tolist(), strict=True))
        if row in rows
    }
    for row, score in zip(rows, merged.scores.tolist(), strict=True):
        assert score == max(score_of for (_, of, _), score_of in proposed.items() if of == row)


@given(sources, st.integers(1, 100))
def test_candidates_come_in_the_order_of_their_turns(found: dict[str, Hits], limit: int) -> None:
    quotas = {name: 5 + 10 * place for place, name in enumerate(NAMES)}
    turn = {
        row: min(hit.rows.tolist().index(row) / quotas[name] for name, hit in found.items() if row in hit.rows)
        for row in {row for hit in found.values() for row in hit.rows.tolist()}
    }
    turns = [turn[row] for row in merge(found, quotas, limit).rows.tolist()]
    assert turns == sorted(turn.values())[:limit]


def test_under_a_low_limit_each_source_keeps_its_share() -> None:
    found = {"ann": hits(*range(400)), "trending": hits(*range(1000, 1100), start=99.0)}
    merged = merge(found, {"ann": 400, "trending": 100}, 100)
    from_ann = int((merged.rows < 1000).sum())
    assert from_ann == pytest.approx(80, abs=1)


def test_the_first_of_each_source_is_always_in() -> None:
    found = {"ann": hits(*range(400)), "new": hits(7000, 7001)}
    assert set(merge(found, {"ann": 400, "new": 30}, 2).rows.tolist()) == {0, 7000}


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 500), min_size=1),
    st.lists(st.sampled_from(NAMES), unique=True),
    st.integers(1, 2000),
)
def test_scaled_quotas_can_fill_what_is_wanted(quotas: dict[str, int], running: list[str], wanted: int) -> None:
    scaled = scaled_quotas(quotas, running, wanted)
    assert set(scaled) == set(running)
    if any(quotas.get(name, 0) for name in running):
        assert sum(scaled.values()) >= wanted or max(scaled.values()) == wanted
    assert all(scaled[name] == 0 for name in running if not quotas.get(name, 0))
    assert all(quota <= wanted for quota in scaled.values())


def test_settings_know_the_very_sources_that_there_are() -> None:
    """Batch scores are serving's."""
    assert [source.name for source in make_sources()] == list(get_args(SourceName))
    assert {*get_args(SourceName), "batch"} == set(SOURCES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quotas": {"magic": 3}}, "quotas.magic"),
        ({"quotas": {"ann": -1}}, "quotas.ann"),
        ({"quotas": {"ann": 2001}}, "quotas.ann"),
        ({"quotas": dict.fromkeys(get_args(SourceName), 0)}, "at least one source"),
        ({"source_budget_ms": {"ann": 0}}, "source_budget_ms.ann"),
        ({"co_visitation": {"window_seconds": 0}}, "co_visitation.window_seconds"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_quotas_and_budgets_that_cannot_be_are_refused_by_name(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(None, {"candidate": change})
