"""Other forms of a trained ranker: ONNX in fp32 and int8, bf16, a Triton model repository; each behind a gate.

`headrace train` puts the fp32 ONNX form into the bundle, `headrace export` makes the others. Invariant: a form is
written only if, on the bundle's own probe, no probability moves by more than `ranker.forms.MAX_SCORE_CHANGE` and
NDCG@10 loses no more than MAX_NDCG_LOSS of itself.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from core import bundle as names
from core.bundle import ReleaseBundle, open_bundle, publish, read_delimited, staging_folder
from core.errors import ArtifactError, ConfigError
from core.settings import Settings
from features.catalog import Catalog
from features.vectors import CANDIDATE_FEATURES, USER_FEATURES
from headrace.v1.events_pb2 import Item
from offline.models import read_item_vectors
from offline.ndcg import ndcg
from ranker.forms import (
    BF16,
    MAX_SCORE_CHANGE,
    ONNX,
    ONNX_INPUTS,
    ONNX_INT8,
    TRITON,
    Bf16Network,
    Network,
    OnnxNetwork,
    TorchNetwork,
    onnx_inputs,
    score_change,
)
from ranker.model import CLICK, HEADS, LIGHT, ItemTable, RankerBatch, RankerModel, item_table, load_ranker
from ranker.probe import Probe, load_probe
from ranker.scorer import collate
from ranker.triton import BUNDLE_VERSION, ITEM_COUNT, OUTPUT, model_name, tensors

MAX_NDCG_LOSS = 0.01
FILES = {ONNX: names.RANKER_ONNX, ONNX_INT8: names.RANKER_INT8}
_OPSET = 18
_TRITON_USERS = 64
# Weights that share a scale.
_INT8_BLOCK = 32
# Inputs with a second free axis.
_FREE = dict.fromkeys(("candidate_rows", "candidates"), "candidates")
_FREE |= dict.fromkeys(("history_rows", "history_weights", "history_ages"), "history")
# Some shape of every axis that is free; none of them is 1, which the exporter would take for fixed.
_EXAMPLE_USERS, _EXAMPLE_CANDIDATES, _EXAMPLE_HISTORY = 2, 3, 4


@dataclass(frozen=True)
class Drift:
    """How far a form is from the network as trained, on the probe."""

    form: str
    max_score_change: float
    ndcg_at_10: float
    reference_ndcg_at_10: float

    def check(self) -> None:
        """Raises ArtifactError where the form is too far off."""
        lost = self.reference_ndcg_at_10 - self.ndcg_at_10
        if not self.max_score_change <= MAX_SCORE_CHANGE or lost > MAX_NDCG_LOSS * self.reference_ndcg_at_10:
            raise ArtifactError(
                f"form {self.form} is refused: a score changes by {self.max_score_change:.4f} (allowed "
                f"{MAX_SCORE_CHANGE}), NDCG@10 from {self.reference_ndcg_at_10:.4f} to {self.ndcg_at_10:.4f} (allowed "
                f"{MAX_NDCG_LOSS:.0%}); serve another form"
            )


def export_form(registry: Path, version: str, form: str, settings: Settings) -> tuple[ReleaseBundle, Drift]:
    """Publishes a bundle like another one, with a form of its ranker that is used by itself; it is not promoted.

    Raises:
        ArtifactError: no such bundle, or the form drifts too far.
        ConfigError: the exporter is not installed.
    """
    source = open_bundle(registry / version)
    staged = staging_folder(registry, f"{version}-{form}")
    try:
        shutil.copytree(source.path, staged, dirs_exist_ok=True)
        drift = write_form(staged, form, settings)
        manifest = replace(
            source.manifest,
            bundle_version=f"{version}-{form}",
            metrics={**source.manifest.metrics, "form_max_score_change": drift.max_score_change},
        )
        return publish(registry, staged, manifest, promote=False), drift
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_form(folder: Path, form: str, settings: Settings) -> Drift:
    """Writes a form beside the ranker in `folder` and makes it the one that serves. Raises as `export_form`."""
    model = load_ranker(folder)
    if form == ONNX_INT8:
        with TemporaryDirectory() as scratch:
            whole = Path(scratch) / "whole.onnx"
            _write_onnx(model, whole)
            _quantise(whole, folder / names.RANKER_INT8)
    elif form == ONNX:
        _write_onnx(model, folder / names.RANKER_ONNX)
    elif form != BF16:
        raise ConfigError(f"--form {form}: say {ONNX}, {ONNX_INT8}, {BF16} or {TRITON}")
    network = Bf16Network(model, torch.device("cpu")) if form == BF16 else OnnxNetwork(folder / FILES[form], form)
    drift = measure(folder, network, model, settings)
    try:
        drift.check()
    except ArtifactError:
        if form in FILES:
            (folder / FILES[form]).unlink()
        raise
    if form == ONNX:
        _write_light(folder, settings)
    (folder / names.RANKER_FORM).write_text(form + "\n", "utf-8")
    return drift


def _write_light(folder: Path, settings: Settings) -> None:
    """The light scorer as ONNX, where there is one. Raises ArtifactError where it drifts."""
    if not (folder / names.RANKER_LIGHT).is_file():
        return
    light, file = load_ranker(folder, LIGHT), folder / names.RANKER_LIGHT_ONNX
    _write_onnx(light, file)
    try:
        measure(folder, OnnxNetwork(file, ONNX), light, settings).check()
    except ArtifactError:
        file.unlink()
        raise


def measure(folder: Path, network: Network, model: RankerModel, settings: Settings) -> Drift:
    """A form against the network as trained, on the probe in `folder`."""
    probe, table = load_probe(folder), _table(model, folder, settings)
    reference = TorchNetwork(model, torch.device("cpu"))
    batches = probe_batches(probe, model.config.dimension, len(table))
    return Drift(
        network.form,
        score_change(network, reference, batches, table),
        _ndcg(network, probe, batches, table),
        _ndcg(reference, probe, batches, table),
    )


def probe_batches(probe: Probe, dimension: int, item_count: int) -> list[RankerBatch]:
    """One batch a list."""
    return [
        collate([one], [vector], dimension, item_count)
        for one, vector in zip(probe.inputs, probe.user_vectors, strict=True)
    ]


def write_triton(folder: Path, target: Path, settings: Settings) -> Path:
    """A model for a Triton repository: `config.pbtxt` and `1/model.onnx` in a folder of `target` named by the bundle.

    The items' vectors and categories are in the file, so that requests of several users make one batch. Triton batches
    requests of equal shape only: ranker/triton.py pads candidates to few lengths. Where it is refused, nothing is
    written.

    Raises:
        ArtifactError: no such bundle, or the form drifts too far.
        ConfigError: the exporter is not installed.
    """
    version = open_bundle(folder).version
    model = load_ranker(folder)
    table = _table(model, folder, settings)
    home = target / model_name(version)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        _write_onnx(model, path, table)
        measure(folder, OnnxNetwork(path, ONNX), model, settings).check()
        (home / "1").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, home / "1" / path.name)
    lines = [f'name: "{home.name}"', 'platform: "onnxruntime_onnx"', f"max_batch_size: {_TRITON_USERS}"]
    for name, (kind, dims) in tensors(model.config.dimension).items():
        lines.append(f'input {{ name: "{name}" data_type: TYPE_{kind} dims: [ {", ".join(map(str, dims))} ] }}')
    lines.append(f'output {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ -1, {len(HEADS)} ] }}')
    lines.append("dynamic_batching { preferred_batch_size: [ 4, 8, 16 ] max_queue_delay_microseconds: 1000 }")
    for key, value in ((BUNDLE_VERSION, version), (ITEM_COUNT, len(table))):
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    (home / "config.pbtxt").write_text("\n".join(lines) + "\n", "utf-8")
    return home


class _Flat(nn.Module):
    """The network with its inputs side by side, as ONNX wants them."""

    vectors: Tensor
    categories: Tensor

    def __init__(self, model: RankerModel, table: ItemTable | None) -> None:
        super().__init__()
        self.model = model
        self._holds_items = table is not None
        if table is not None:
            self.register_buffer("vectors", table.vectors)
            self.register_buffer("categories", table.categories)

    def forward(self, *inputs: Tensor) -> Tensor:
        tables = _Tables(self.vectors, self.categories) if self._holds_items else _Tables(*inputs[-2:])
        logits: Tensor = self.model(RankerBatch(*inputs[: len(RankerBatch._fields)]), tables)
        return logits


@dataclass
class _Tables:
    vectors: Tensor
    categories: Tensor


def _write_onnx(model: RankerModel, path: Path, table: ItemTable | None = None) -> None:
    """The items are inputs, or those of `table` are part of the file."""
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it, and says so less plainly
    except ImportError as error:
        raise ConfigError("exporting to ONNX needs more packages: pip install 'headrace[export]'") from error
    batch, tables = _example(model)
    axes = {name: torch.export.Dim(name, min=1) for name in ("users", "candidates", "history", "items")}
    shapes = [{0: axes["users"]} | ({1: axes[_FREE[name]]} if name in _FREE else {}) for name in RankerBatch._fields]
    inputs: tuple[Tensor, ...] = tuple(batch)
    if table is None:
        inputs = onnx_inputs(batch, tables)
        shapes += [{0: axes["items"]}, {0: axes["items"]}]
    with _quiet():
        torch.onnx.export(
            _Flat(model, table).eval(),
            inputs,
            path,
            input_names=list(ONNX_INPUTS[: len(inputs)]),
            output_names=[OUTPUT],
            dynamic_shapes=(tuple(shapes),),
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and quantiser speak of their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _quantise(source: Path, target: Path) -> None:
    """Weights in 8 bits, a scale for each block of them; what is computed from them keeps its digits.

    In 8 bits, too, features that reach far beside the small components of a vector moved probabilities by .06 to .29.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model = onnx.load(source)
    # The last sum decides the order, and is small.
    heads = {one.name for one in model.graph.initializer if len(one.dims) == 2 and one.dims[-1] == len(HEADS)}
    kept = [node.name for node in model.graph.node if heads.intersection(node.input)]
    config = DefaultWeightOnlyQuantConfig(block_size=_INT8_BLOCK, bits=8, accuracy_level=0)
    with _quiet():
        quantiser = MatMulNBitsQuantizer(model, nodes_to_exclude=kept, algo_config=config)
        quantiser.process()
        quantiser.model.save_model_to_file(str(target))


def _table(model: RankerModel, folder: Path, settings: Settings) -> ItemTable:
    catalog = Catalog.of_items(read_delimited(folder / names.ITEMS, Item), settings.features)
    return item_table(model, read_item_vectors(folder), catalog.column("categories"), torch.device("cpu"))


def _ndcg(network: Network, probe: Probe, batches: Sequence[RankerBatch], table: ItemTable) -> float:
    """Mean NDCG@10 of the click head over the lists with a click; 0 where there is none."""
    scores = [network.logits(batch, table)[0, :, CLICK] for batch in batches]
    values = [ndcg(one, gains) for one, gains in zip(scores, probe.gains, strict=True) if gains.any()]
    return float(np.mean(values)) if values else 0.0


def _example(model: RankerModel) -> tuple[RankerBatch, _Tables]:
    users, candidates, history = _EXAMPLE_USERS, _EXAMPLE_CANDIDATES, _EXAMPLE_HISTORY
    dimension = model.config.dimension
    batch = RankerBatch(
        torch.zeros(users, dimension),
        torch.ones(users, 1),
        torch.zeros(users, history, dtype=torch.int64),
        torch.ones(users, history),
        torch.ones(users, history),
        torch.zeros(users, len(USER_FEATURES)),
        torch.zeros(users, candidates, dtype=torch.int64),
        torch.zeros(users, candidates, len(CANDIDATE_FEATURES)),
    )
    width = dimension + model.config.taste_width
    return batch, _Tables(torch.zeros(5, width), torch.zeros(5, 4, dtype=torch.int32))
