"""How a request's time is split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock
from core.deadline import Deadline
from core.settings import StageBudgets
from serving.budget import Budget

NOMINAL = StageBudgets(hydrate=10, retrieve=20, rank=150, rerank=40, margin=30)


def budget_of(given_ms, clock):
    return Budget(Deadline.after_ms(given_ms, clock), NOMINAL)


def test_an_undisturbed_request_has_the_nominal_times() -> None:
    clock = ManualClock()
    budget = budget_of(250, clock)
    # Its own 10 and, if need be, those of retrieve and half of the rank's.
    assert budget.stage("hydrate").remaining_ms() == pytest.approx(105)
    clock.advance(10)
    assert budget.stage("retrieve").remaining_ms() == pytest.approx(95)
    clock.advance(20)
    assert budget.stage("rank").remaining_ms() == pytest.approx(150)


def test_a_shorter_deadline_scales_them_all() -> None:
    budget = budget_of(100, ManualClock())
    assert budget.stage("hydrate").remaining_ms() == pytest.approx(42)
    assert budget.is_short
    assert budget.is_fair
    assert not budget_of(50, ManualClock()).is_fair


@given(st.floats(1, 10_000))
def test_no_stage_ends_after_the_last_call(given_ms) -> None:
    budget = budget_of(given_ms, ManualClock())
    assert budget.stage("rank").at <= budget.last_call.at < budget.deadline.at


@pytest.mark.parametrize(("given_ms", "kept_ms"), [(250, 15), (100, 10), (20, 5)])
def test_the_way_back_is_no_shorter_for_a_caller_in_a_hurry(given_ms, kept_ms) -> None:
    budget = budget_of(given_ms, ManualClock())
    assert budget.last_call.remaining_ms() == pytest.approx(given_ms - kept_ms)


def test_time_left_over_goes_to_the_next_stage() -> None:
    clock = ManualClock()
    budget = budget_of(250, clock)
    clock.advance(1)
    assert budget.stage("rank").remaining_ms() == pytest.approx(179)


def test_a_late_stage_leaves_a_share_to_those_after_it() -> None:
    clock = ManualClock()
    budget = budget_of(250, clock)
    clock.advance(170)
    assert budget.stage("retrieve").remaining_ms() == pytest.approx(80 * 20 / 240)
    assert budget.stage("rank").remaining_ms() == pytest.approx(80 * 150 / 220)


@given(st.integers(1, 2000), st.integers(0, 3000), st.sampled_from(["hydrate", "retrieve", "rank", "rerank"]))
def test_no_stage_eats_the_margin_or_passes_the_deadline(given_ms, passed_ms, stage) -> None:
    clock = ManualClock()
    budget = budget_of(given_ms, clock)
    clock.advance(passed_ms)
    left_ms = max(0, given_ms - passed_ms)
    assert budget.stage(stage).remaining_ms() <= left_ms * (1 - 30 / 250) + 1e-6
    assert budget.waiting().remaining_ms() <= left_ms / 2 + 1e-6
