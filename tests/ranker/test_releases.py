"""Several releases at once: named by requests, tried in shadow, kept, dropped, refused."""

import asyncio
import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from prometheus_client import REGISTRY

from core import registry
from core.bundle import RANKER, ReleaseBundle, promote_version, put_file
from core.clock import ManualClock
from core.errors import ArtifactError, NotFoundError
from core.registry import Roles
from core.settings import Settings
from features.windows import UserState
from ranker.release import Release, UserJob, score_jobs
from ranker.releases import Releases
from ranker.shadow import Shadow, for_release, is_chosen, top_overlap

T0_MS = 1_700_000_000_000
MakeBundle = Callable[..., ReleaseBundle]
State = Callable[..., UserState]


@pytest.fixture
def releases(make_bundle: MakeBundle, registry_settings: Settings) -> Releases:
    make_bundle("v1", seed=1)
    return Releases(registry_settings, ManualClock(T0_MS))


def a_job(release: Release, state: UserState, count: int = 20) -> UserJob:
    item_ids = [f"item-{number}" for number in range(count)]
    vector = np.full(release.dimension, 0.25, np.float32)
    return UserJob(release, state, vector, item_ids, np.ones(count, np.float32), np.ones(count, np.int32), T0_MS + 1000)


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_the_bundle_before_the_current_one_may_be_named(releases: Releases, make_bundle: MakeBundle) -> None:
    first = releases.current
    make_bundle("v2", seed=2)
    assert await releases.look()
    assert releases.versions() == ["v2", "v1"]
    assert releases.named("v1", "") is first
    assert releases.named("", first.model_version) is first
    assert releases.named("", "") is releases.current
    make_bundle("v3", seed=3)
    assert await releases.look()
    assert releases.versions() == ["v3", "v2"]
    with pytest.raises(NotFoundError, match="is not loaded, but v"):
        releases.named("v1", "")
    releases.close()


async def test_a_model_of_another_bundle_than_the_named_one_is_not_found(
    releases: Releases, make_bundle: MakeBundle
) -> None:
    model = releases.current.model_version
    make_bundle("v2", seed=2)
    await releases.look()
    with pytest.raises(NotFoundError, match="headrace release experiment"):
        releases.named("v2", model)
    releases.close()


async def test_experiments_are_loaded_and_dropped(
    releases: Releases, make_bundle: MakeBundle, registry_settings: Settings
) -> None:
    folder = registry_settings.registry.path
    make_bundle("v2", seed=2, promote=False)
    registry.write_roles(folder, Roles(("v2",)))
    assert not await releases.look()
    assert releases.versions() == ["v1", "v2"]
    registry.write_roles(folder, Roles())
    await releases.look()
    assert releases.versions() == ["v1"]
    releases.close()


async def test_what_is_dropped_leaves_the_memory(releases: Releases, make_bundle: MakeBundle) -> None:
    dropped = asyncio.Event()
    weakref.finalize(releases.current, asyncio.get_running_loop().call_soon_threadsafe, dropped.set)
    # By reference counts alone: what is frozen is never looked at by the cyclic collector.
    gc.disable()
    try:
        for seed in (2, 3):
            make_bundle(f"v{seed}", seed=seed)
            assert await releases.look()
        async with asyncio.timeout(30):
            await dropped.wait()
    finally:
        gc.enable()
        releases.close()


async def test_a_refused_bundle_is_tried_again_once_it_was_mended(
    releases: Releases, make_bundle: MakeBundle, registry_settings: Settings
) -> None:
    bad = make_bundle("v2", seed=2)
    whole = (bad.path / RANKER).read_bytes()
    (bad.path / RANKER).write_bytes(b"broken")
    refused = sample("headrace_ranker_bundle_loads_total", outcome="refused")
    for _ in range(3):
        assert not await releases.look()
    assert sample("headrace_ranker_bundle_loads_total", outcome="refused") == refused + 1
    made = bad.path.parent / "made"
    made.write_bytes(whole)
    put_file(bad.path, RANKER, made)
    assert await releases.look()
    releases.close()


async def test_broken_roles_leave_what_serves(releases: Releases, registry_settings: Settings) -> None:
    (registry_settings.registry.path / registry.ROLES).write_text("[]")
    assert not await releases.look()
    assert releases.current.version == "v1"


async def test_a_rollback_swaps_to_what_is_still_loaded(
    releases: Releases, make_bundle: MakeBundle, registry_settings: Settings
) -> None:
    first = releases.current
    make_bundle("v2", seed=2)
    await releases.look()
    promote_version(registry_settings.registry.path, "v1")
    assert await releases.look()
    assert releases.current is first
    releases.close()


class TestShadow:
    async def test_it_scores_the_same_question_and_changes_nothing(
        self, releases: Releases, make_bundle: MakeBundle, registry_settings: Settings, state_of: State
    ) -> None:
        make_bundle("v2", seed=2, promote=False)
        registry.write_roles(registry_settings.registry.path, Roles((), "v2", 1.0))
        await releases.look()
        assert releases.shadow is not None
        other, share = releases.shadow
        assert (other.version, share) == ("v2", 1.0)
        jobs = [a_job(releases.current, state_of(1, 2)), a_job(releases.current, state_of())]
        served = score_jobs(jobs, registry_settings)
        before = [one.score.copy() for one in served]
        scored = sample("headrace_ranker_shadow_users_total", outcome="scored")
        total = sample("headrace_ranker_shadow_score_difference_sum")
        shadow = Shadow(lambda asked: score_jobs(asked, registry_settings), 4)
        shadow.offer(releases.shadow, jobs, served)
        await shadow.drain()
        assert sample("headrace_ranker_shadow_users_total", outcome="scored") == scored + 2
        expected = score_jobs([for_release(job, other) for job in jobs], registry_settings)
        difference = sum(float(np.abs(a.score - b.score).mean()) for a, b in zip(served, expected, strict=True))
        assert difference > 0
        assert sample("headrace_ranker_shadow_score_difference_sum") - total == pytest.approx(difference, rel=1e-5)
        for one, score in zip(served, before, strict=True):
            np.testing.assert_array_equal(one.score, score)
        shadow.close()
        releases.close()

    async def test_no_share_no_scores_and_a_full_queue_leaves_out(
        self, releases: Releases, registry_settings: Settings, state_of: State, make_bundle: MakeBundle
    ) -> None:
        make_bundle("v2", seed=2, promote=False)
        registry.write_roles(registry_settings.registry.path, Roles((), "v2", 1.0))
        await releases.look()
        assert releases.shadow is not None
        other, _ = releases.shadow
        jobs = [a_job(releases.current, state_of(1))]
        served = score_jobs(jobs, registry_settings)
        calls: list[int] = []
        shadow = Shadow(lambda asked: calls.append(len(asked)) or score_jobs(asked, registry_settings), 1)
        shadow.offer((other, 0.0), jobs, served)
        shadow.offer(None, jobs, served)
        await shadow.drain()
        assert calls == []
        left_out = sample("headrace_ranker_shadow_users_total", outcome="left_out")
        # Nothing of the loop runs in between, so the first is still waiting.
        shadow.offer((other, 1.0), jobs, served)
        shadow.offer((other, 1.0), jobs, served)
        await shadow.drain()
        assert calls == [1]
        assert sample("headrace_ranker_shadow_users_total", outcome="left_out") == left_out + 1
        shadow.close()
        releases.close()

    async def test_a_shadow_that_fails_is_counted(
        self, releases: Releases, registry_settings: Settings, state_of: State
    ) -> None:
        def broken(_: object) -> list[object]:
            raise ArtifactError("no")

        job = a_job(releases.current, state_of(1))
        other = a_job(Releases(registry_settings, ManualClock(T0_MS)).current, state_of(1)).release
        failed = sample("headrace_ranker_shadow_users_total", outcome="failed")
        shadow = Shadow(broken, 4)  # type: ignore[arg-type]
        shadow.offer((other, 1.0), [job], score_jobs([job], registry_settings))
        await shadow.drain()
        assert sample("headrace_ranker_shadow_users_total", outcome="failed") == failed + 1
        shadow.close()

    def test_the_share_is_the_share_of_users(self, releases: Releases) -> None:
        release = releases.current
        states = [UserState(revision=number, watermark_ms=T0_MS + 7 * number) for number in range(4000)]
        chosen = [is_chosen(a_job(release, state, 1), 0.2) for state in states]
        assert 0.17 < np.mean(chosen) < 0.23

    def test_overlap_of_the_best(self) -> None:
        scores = np.arange(20, dtype=np.float32)
        assert top_overlap(scores, scores) == 1.0
        assert top_overlap(scores, -scores) == 0.0
        assert top_overlap(scores[:3], -scores[:3]) == 1.0
