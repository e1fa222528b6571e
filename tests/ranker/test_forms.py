"""Other forms of the network: the same scores, or none at all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core import bundle as names
from core.bundle import ReleaseBundle
from core.clock import ManualClock
from core.errors import ArtifactError, ConfigError
from core.settings import Settings
from features.vectors import CANDIDATE_FEATURES, RankerInput
from features.windows import UserState
from offline import export
from offline.export import Drift, export_form, write_triton
from ranker.forms import BF16, ONNX, ONNX_INT8, OnnxNetwork
from ranker.model import RankerModel
from ranker.probe import Probe, load_probe, save_probe
from ranker.release import load_release

T0_MS = 1_700_000_000_000
DIMENSION = 16
MakeBundle = Callable[..., ReleaseBundle]
State = Callable[..., UserState]
Input = Callable[..., RankerInput]


@pytest.fixture
def probe(state_of: State, input_of: Input) -> Probe:
    inputs = [input_of(state_of(*range(size)), *range(10, 30)) for size in range(1, 9)]
    vectors = [np.full(DIMENSION, 0.25, np.float32) if size % 2 else None for size in range(1, 9)]
    gains = [(np.arange(20) == size).astype(np.float32) for size in range(1, 9)]
    return Probe(inputs, vectors, gains)


@pytest.fixture
def with_probe(make_bundle: MakeBundle, probe: Probe) -> Callable[..., ReleaseBundle]:
    def make(version: str = "v1", change: Callable[[Path], None] | None = None, **more: object) -> ReleaseBundle:
        def both(staged: Path) -> None:
            save_probe(probe, DIMENSION, staged)
            if change is not None:
                change(staged)

        return make_bundle(version, change=both, **more)

    return make


def of_form(settings: Settings, form: str) -> Settings:
    return settings.model_copy(update={"ranker": settings.ranker.model_copy(update={"form": form})})


def test_a_probe_is_read_as_written(probe: Probe, tmp_path: Path) -> None:
    save_probe(probe, DIMENSION, tmp_path)
    read = load_probe(tmp_path)
    for ours, theirs in zip(read.inputs, probe.inputs, strict=True):
        for name in RankerInput.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert [vector is None for vector in read.user_vectors] == [vector is None for vector in probe.user_vectors]
    for ours, theirs in zip(read.gains, probe.gains, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_broken_probe_is_refused(tmp_path: Path) -> None:
    (tmp_path / names.RANKER_PROBE).write_bytes(b"no")
    with pytest.raises(ArtifactError, match="train again"):
        load_probe(tmp_path)


@pytest.mark.parametrize(("form", "tolerance"), [(ONNX, 1e-5), (BF16, 0.02), (ONNX_INT8, 0.02)])
def test_a_form_scores_like_the_network(
    with_probe: MakeBundle, registry_settings: Settings, form: str, tolerance: float, probe: Probe
) -> None:
    bundle = with_probe()
    made, drift = export_form(bundle.path.parent, "v1", form, registry_settings)
    assert made.version == f"v1-{form}"
    assert names.current_version(bundle.path.parent) == "v1"
    assert drift.max_score_change <= tolerance
    release = load_release(made, registry_settings, ManualClock(T0_MS))
    assert release.scorer.network.form == form
    plain = load_release(made, of_form(registry_settings, "torch"), ManualClock(T0_MS))
    for size in (1, 3, 8):
        scores = release.scorer.score(probe.inputs[:size], probe.user_vectors[:size])
        expected = plain.scorer.score(probe.inputs[:size], probe.user_vectors[:size])
        for ours, theirs in zip(scores, expected, strict=True):
            np.testing.assert_allclose(ours.score, theirs.score, atol=2 * tolerance)


def test_an_item_that_came_later_is_known_to_the_form_too(
    with_probe: MakeBundle, registry_settings: Settings, state_of: State, input_of: Input
) -> None:
    bundle = with_probe()
    made, _ = export_form(bundle.path.parent, "v1", ONNX, registry_settings)
    ours = load_release(made, registry_settings, ManualClock(T0_MS)).scorer
    theirs = load_release(made, of_form(registry_settings, "torch"), ManualClock(T0_MS)).scorer
    one = input_of(state_of(1), 2, 3)
    later = replace(one, candidate_rows=np.array([2, 60], np.int32))
    for scorer in (ours, theirs):
        scorer.table.put_categories(60, np.array([[5, 0, 0, 0]], np.int32))
    (a,), (b,) = ours.score([later], [None]), theirs.score([later], [None])
    np.testing.assert_allclose(a.score, b.score, atol=1e-5)


def test_a_form_that_drifts_is_refused(
    with_probe: MakeBundle, registry_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_probe()
    write = export._write_onnx

    def spoilt(model: RankerModel, path: Path, table: object = None) -> None:
        with torch.no_grad():
            model.heads.weight.mul_(1.5)
        write(model, path, table)
        with torch.no_grad():
            model.heads.weight.div_(1.5)

    monkeypatch.setattr(export, "_write_onnx", spoilt)
    with pytest.raises(ArtifactError, match="form onnx is refused"):
        export_form(bundle.path.parent, "v1", ONNX, registry_settings)
    assert names.versions(bundle.path.parent) == ["v1"]


def test_a_lost_order_is_refused_too() -> None:
    Drift(ONNX, 0.001, 0.2, 0.2).check()
    with pytest.raises(ArtifactError, match=r"NDCG@10 from 0.2000 to 0.1970"):
        Drift(ONNX, 0.001, 0.197, 0.2).check()
    with pytest.raises(ArtifactError, match="a score changes by nan"):
        Drift(ONNX, float("nan"), 0.2, 0.2).check()


def test_at_load_a_form_of_another_network_gives_way_to_torch(
    with_probe: MakeBundle, registry_settings: Settings
) -> None:
    first = with_probe()
    made, _ = export_form(first.path.parent, "v1", ONNX, registry_settings)

    def foreign(staged: Path) -> None:
        (staged / names.RANKER_ONNX).write_bytes(made.file(names.RANKER_ONNX).read_bytes())

    other = with_probe("v2", change=foreign, seed=9)
    assert load_release(other, registry_settings, ManualClock(T0_MS)).scorer.network.form == "torch"
    with pytest.raises(ArtifactError, match="changes a score by"):
        load_release(other, of_form(registry_settings, ONNX), ManualClock(T0_MS))


def test_a_form_that_the_bundle_lacks_is_refused_where_the_settings_ask_for_it(
    with_probe: MakeBundle, registry_settings: Settings
) -> None:
    bundle = with_probe()
    assert load_release(bundle, registry_settings, ManualClock(T0_MS)).scorer.network.form == "torch"
    with pytest.raises(ArtifactError, match=r"has no ranker\.int8\.onnx"):
        load_release(bundle, of_form(registry_settings, ONNX_INT8), ManualClock(T0_MS))


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="headrace export"):
        OnnxNetwork(tmp_path / "x.onnx", ONNX)


def test_an_unknown_form_is_one_line(with_probe: MakeBundle, registry_settings: Settings) -> None:
    bundle = with_probe()
    with pytest.raises(ConfigError, match="say onnx, onnx-int8, bf16 or triton"):
        export_form(bundle.path.parent, "v1", "fp8", registry_settings)


def test_the_triton_repository_holds_items_and_scores_alike(
    with_probe: MakeBundle, registry_settings: Settings, tmp_path: Path, probe: Probe
) -> None:
    bundle = with_probe()
    home = write_triton(bundle.path, tmp_path / "triton", registry_settings)
    config = (home / "config.pbtxt").read_text()
    assert "dynamic_batching" in config
    assert f'input {{ name: "candidates" data_type: TYPE_FP32 dims: [ -1, {len(CANDIDATE_FEATURES)} ] }}' in config
    import onnxruntime

    session = onnxruntime.InferenceSession(home / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert "item_vectors" not in [one.name for one in session.get_inputs()]
