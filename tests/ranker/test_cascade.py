"""The cascade: when lists are cut, what becomes of the candidates, and that an answer says so."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from core import bundle as names
from core.bundle import ReleaseBundle
from core.clock import ManualClock
from core.deadline import Deadline
from core.errors import ArtifactError
from core.settings import Settings
from features import windows
from features.vectors import RankerInput
from features.windows import UserState
from headrace.v1.ranker_service_pb2 import RankCandidatesRequest, UserCandidates
from offline.export import write_form
from offline.training.ranker_distil import LIGHT_SHAPE
from ranker.cascade import Cascade
from ranker.forms import ONNX, TorchNetwork
from ranker.model import LIGHT, RankerModel, load_ranker, save_ranker
from ranker.probe import Probe, save_probe
from ranker.release import Release, load_release, score_jobs
from ranker.requests import jobs_of
from ranker.scorer import Scorer
from ranker.service import _ranked
from ranker.shadow import for_release

T0_MS = 1_700_000_000_000
DIMENSION, HEADS = 16, ("click", "conversion", "value")
MakeBundle = Callable[..., ReleaseBundle]
State = Callable[..., UserState]
Input = Callable[..., RankerInput]


def some_light(teacher_version: str = "", seed: int = 5) -> RankerModel:
    torch.manual_seed(seed)
    return RankerModel(LIGHT_SHAPE(DIMENSION, trained_heads=HEADS, teacher_version=teacher_version)).eval()


def put_light(staged: Path, teacher_version: str | None = None) -> None:
    version = load_ranker(staged).config.model_version if teacher_version is None else teacher_version
    save_ranker(some_light(version), staged, LIGHT)


def with_keep(settings: Settings, keep: int) -> Settings:
    return settings.model_copy(update={"ranker": settings.ranker.model_copy(update={"cascade_keep": keep})})


class TestWhen:
    def deadline(self, left_ms: float) -> Deadline:
        clock = ManualClock(1000)
        return Deadline(clock.monotonic() + left_ms / 1000, clock)

    @pytest.mark.parametrize(("left_ms", "keep"), [(2.5, 100), (7.4, 100), (7.7, None), (100, None)])
    def test_a_list_is_cut_where_less_is_left_than_it_needs(self, left_ms: float, keep: int | None) -> None:
        """500 candidates of 0.01 ms, by 1.5, and a millisecond for the way back: 8.5; of 440, 7.6."""
        cascade = Cascade(100, ManualClock(), 0.01)
        assert cascade.keep(440, [self.deadline(left_ms)]) == keep

    def test_the_nearest_deadline_of_a_batch_decides(self) -> None:
        cascade = Cascade(100, ManualClock(), 0.01)
        assert cascade.keep(1000, [self.deadline(100), None]) is None
        assert cascade.keep(1000, [self.deadline(100), None, self.deadline(10)]) == 100

    def test_without_a_deadline_or_by_the_settings_none_is(self) -> None:
        assert Cascade(100, ManualClock(), 1.0).keep(1000, [None]) is None
        assert Cascade(0, ManualClock(), 1.0).keep(1000, [self.deadline(0)]) is None

    def test_the_need_is_learnt_from_the_calls(self) -> None:
        clock = ManualClock()
        cascade = Cascade(100, clock)
        assert cascade.needs_ms(500) == 0
        took_ms = [5] * 10 + [500] + [5] * 3
        for one in took_ms:
            with cascade.measured(500):
                clock.advance(one)
        # One hiccup of a hundred times counts for twice.
        assert 5 <= cascade.needs_ms(500) < 5.6
        for _ in range(40):
            with cascade.measured(500):
                clock.advance(20)
        assert cascade.needs_ms(500) == pytest.approx(20, rel=0.1)
        with cascade.measured(0):
            clock.advance(1000)
        assert cascade.needs_ms(500) == pytest.approx(20, rel=0.1)


class TestCut:
    @pytest.fixture
    def cutting(self, scorer: Scorer) -> Scorer:
        scorer.light = TorchNetwork(some_light(), torch.device("cpu"))
        return scorer

    def test_the_best_by_the_light_scorer_are_scored_as_without_it(
        self, cutting: Scorer, state_of: State, input_of: Input
    ) -> None:
        one = input_of(state_of(1, 2, 3), *range(40))
        (whole,), (made,) = cutting.score([one], [None]), cutting.score([one], [None], 10)
        assert made.cut is not None
        assert made.cut.sum() == 30
        (alone,) = Scorer.score(self.of_light(cutting), [one], [None])
        assert set(np.flatnonzero(~made.cut)) == set(np.argsort(-alone.click)[:10])
        for name in ("click", "conversion", "value", "score", "confidence"):
            np.testing.assert_allclose(getattr(made, name)[~made.cut], getattr(whole, name)[~made.cut], atol=1e-6)
        assert made.score[made.cut].max() < made.score[~made.cut].min()
        assert (made.confidence[made.cut] <= 0.2).all()
        # Among themselves they stand as the light scorer put them.
        order = np.argsort(-made.score[made.cut], kind="stable")
        assert (np.diff(alone.score[made.cut][order]) <= 1e-6).all()

    def of_light(self, scorer: Scorer) -> Scorer:
        made = Scorer.__new__(Scorer)
        made.__dict__.update(scorer.__dict__)
        assert scorer.light is not None
        made.network, made.light = scorer.light, None
        return made

    def test_lists_of_other_lengths_are_cut_as_they_would_be_alone(
        self, cutting: Scorer, state_of: State, input_of: Input
    ) -> None:
        inputs = [
            input_of(state_of(*range(size)), *range(size, size + count)) for size, count in ((3, 30), (5, 8), (1, 12))
        ]
        together = cutting.score(inputs, [None] * 3, 10)
        for one, made in zip(inputs, together, strict=True):
            (alone,) = cutting.score([one], [None], 10)
            np.testing.assert_allclose(made.score, alone.score, atol=1e-5)
            assert (made.cut is None) == (alone.cut is None)
        assert [None if made.cut is None else int(made.cut.sum()) for made in together] == [20, None, 2]

    def test_broken_features_and_unknown_items_leave_finite_scores(
        self, cutting: Scorer, state_of: State, input_of: Input
    ) -> None:
        one = input_of(state_of(1), *range(30, 60))
        one.candidates[::3] = np.nan
        one.candidates[1::3] = np.inf
        (made,) = cutting.score([one], [np.full(DIMENSION, np.nan, np.float32)], 5)
        assert made.cut is not None
        assert all(np.isfinite(getattr(made, name)).all() for name in ("click", "score", "confidence"))

    def test_the_light_scorer_does_without_the_history(self, scorer: Scorer, state_of: State, input_of: Input) -> None:
        scorer.network = TorchNetwork(some_light(), torch.device("cpu"))
        one = input_of(state_of(1, 2, 3), 4, 5, 6)
        other = replace(one, history_rows=np.roll(one.history_rows, 1) * 0 - 1)
        (a,), (b,) = scorer.score([one], [None]), scorer.score([other], [None])
        np.testing.assert_array_equal(a.score, b.score)


@pytest.fixture
def release(make_bundle: MakeBundle, registry_settings: Settings) -> Release:
    return load_release(make_bundle(change=put_light), with_keep(registry_settings, 5), ManualClock(T0_MS))


def asked(state: UserState, count: int = 20) -> RankCandidatesRequest:
    item_ids, zeros = [f"item-{number}" for number in range(count)], [0.5] * count
    return RankCandidatesRequest(
        users=[UserCandidates(state=windows.encode(state), item_ids=item_ids, scores=zeros, source_bits=[1] * count)]
    )


def test_a_job_that_is_late_is_cut_and_its_answer_says_so(
    release: Release, registry_settings: Settings, state_of: State
) -> None:
    clock = ManualClock(1000)
    release.cascade = Cascade(5, clock, 0.5)
    jobs = partial(jobs_of, asked(state_of(1, 2)), release, T0_MS)
    (calm,) = score_jobs(jobs(Deadline.after_ms(100, clock)), registry_settings)
    # The call before took no time on this clock.
    release.cascade = Cascade(5, clock, 0.5)
    (hurried,) = score_jobs(jobs(Deadline.after_ms(10, clock)), registry_settings)
    assert calm.cut is None
    assert not _ranked(calm, None).cut
    answer = _ranked(hurried, 0.1)
    assert sum(answer.cut) == 15
    best = sorted(range(20), key=lambda place: -answer.scores[place])[:5]
    assert not any(answer.cut[place] for place in best)


def test_the_shadow_is_never_in_a_hurry(release: Release, state_of: State) -> None:
    (job,) = jobs_of(asked(state_of(1)), release, T0_MS, Deadline.after_ms(1))
    assert for_release(job, release).deadline is None


def test_a_light_scorer_of_another_ranker_is_refused(make_bundle: MakeBundle, registry_settings: Settings) -> None:
    bundle = make_bundle(change=lambda staged: put_light(staged, "another"))
    with pytest.raises(ArtifactError, match="was made for ranker another"):
        load_release(bundle, registry_settings, ManualClock(T0_MS))


def test_a_changed_light_scorer_is_refused(make_bundle: MakeBundle, registry_settings: Settings) -> None:
    def spoil(staged: Path) -> None:
        put_light(staged)
        file = staged / names.RANKER_LIGHT
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(bytes(raw))

    with pytest.raises(ArtifactError, match=r"ranker_light\.safetensors is not what"):
        load_release(make_bundle(change=spoil), registry_settings, ManualClock(T0_MS))


def test_its_exported_form_serves_and_scores_alike(
    make_bundle: MakeBundle, registry_settings: Settings, state_of: State, input_of: Input
) -> None:
    one = input_of(state_of(1, 2, 3), *range(10, 40))

    def with_form(staged: Path) -> None:
        put_light(staged)
        gains = (np.arange(30) == 3).astype(np.float32)
        save_probe(Probe([one] * 4, [None] * 4, [gains] * 4), DIMENSION, staged)
        write_form(staged, ONNX, registry_settings)

    bundle = make_bundle(change=with_form)
    exported = load_release(bundle, registry_settings, ManualClock(T0_MS)).scorer
    assert exported.light is not None
    assert (exported.light.form, exported.network.form) == (ONNX, ONNX)
    as_torch = registry_settings.ranker.model_copy(update={"form": "torch"})
    settings = registry_settings.model_copy(update={"ranker": as_torch})
    plain = load_release(bundle, settings, ManualClock(T0_MS)).scorer
    assert plain.light is not None
    assert plain.light.form == "torch"
    (ours,), (theirs,) = exported.score([one], [None], 10), plain.score([one], [None], 10)
    np.testing.assert_array_equal(ours.cut, theirs.cut)
    np.testing.assert_allclose(ours.score, theirs.score, atol=1e-5)


def test_a_bundle_without_one_never_cuts(make_bundle: MakeBundle, registry_settings: Settings, state_of: State) -> None:
    settings = with_keep(registry_settings, 5)
    release = load_release(make_bundle(), settings, ManualClock(T0_MS))
    (made,) = score_jobs(jobs_of(asked(state_of(1)), release, T0_MS, Deadline(0.0)), settings)
    assert made.cut is None
