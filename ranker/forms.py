"""How the ranker's network is computed: torch, ONNX Runtime or a server, in fp32, bf16 or int8; one face for all.

Chosen by ranker/release.py when a bundle is loaded, used by ranker/scorer.py. Invariant: a form that is not fp32 torch
serves only after it has scored the bundle's own probe within MAX_SCORE_CHANGE of fp32 torch.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import nn

from core.errors import ArtifactError
from features.catalog import Floats
from ranker.model import ItemTable, RankerBatch, RankerModel, Tables

# The last is computed elsewhere: ranker/triton.py.
TORCH, BF16, ONNX, ONNX_INT8, TRITON = "torch", "bf16", "onnx", "onnx-int8", "triton"
FORMS = (TORCH, BF16, ONNX, ONNX_INT8, TRITON)
# On probabilities; the regression gate of the tests is as wide.
MAX_SCORE_CHANGE = 0.02


class Network(Protocol):
    """Logits of a batch, [B, C, heads]."""

    @property
    def form(self) -> str: ...

    def logits(self, batch: RankerBatch, table: ItemTable) -> Floats:
        """`batch` is on the CPU, `table` on the network's device."""
        ...


class TorchNetwork:
    """The network as it was trained, on a CPU or a GPU."""

    form = TORCH

    def __init__(self, model: RankerModel, device: torch.device) -> None:
        self._model, self._device = model.to(device).eval(), device

    def logits(self, batch: RankerBatch, table: ItemTable) -> Floats:
        with torch.inference_mode():
            logits: Floats = self._model(batch.to(self._device), table).float().cpu().numpy()
        return logits


class Bf16Network:
    """The same with weights, vectors and activations in bfloat16: half the memory to read, two digits of precision."""

    form = BF16

    def __init__(self, model: RankerModel, device: torch.device) -> None:
        self._model, self._device = copy.deepcopy(model).bfloat16().to(device).eval(), device
        # The last sum decides the order: it keeps its digits.
        self._model.heads.float()
        self._model.sharpness = nn.Parameter(self._model.sharpness.float())
        self._source: torch.Tensor | None = None
        self._vectors = torch.zeros(0)

    def logits(self, batch: RankerBatch, table: ItemTable) -> Floats:
        if self._source is not table.vectors:
            # Vectors change only by growing, which makes a new tensor of them.
            self._source, self._vectors = table.vectors, table.vectors.bfloat16()
        # Ages, counts and scores keep their digits until they are standardised, or counts above 256 would be rounded.
        with torch.inference_mode():
            moved = batch.to(self._device)
            narrow = moved._replace(
                user_vectors=moved.user_vectors.bfloat16(),
                has_vector=moved.has_vector.bfloat16(),
                history_weights=moved.history_weights.bfloat16(),
                history_ages=moved.history_ages.bfloat16(),
            )
            logits: Floats = self._model(narrow, _Narrow(self._vectors, table.categories)).float().cpu().numpy()
        return logits


class OnnxNetwork:
    """The exported network in ONNX Runtime on one thread: one call without the interpreter's lock, fused operators."""

    def __init__(self, path: Path, form: str) -> None:
        """Raises ArtifactError where the file is none, or ONNX Runtime is not installed."""
        self.form = form
        try:
            import onnxruntime as ort  # an extra: torch serves without it
        except ImportError as error:
            raise ArtifactError(f"form {form} needs ONNX Runtime; install it with `pip install onnxruntime`") from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self._inputs = [one.name for one in self._session.get_inputs()]
        except Exception as error:  # ONNX Runtime's errors share no base class
            problem = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{path} cannot be read ({problem}); export it again with `headrace export`") from error

    def logits(self, batch: RankerBatch, table: ItemTable) -> Floats:
        values = {name: tensor.numpy() for name, tensor in zip(ONNX_INPUTS, onnx_inputs(batch, table), strict=True)}
        (logits,) = self._session.run(None, {name: values[name] for name in self._inputs})
        return cast(Floats, logits)


class _Narrow(NamedTuple):
    """The items in fewer digits."""

    vectors: torch.Tensor
    categories: torch.Tensor


# The inputs of an exported network, in the order of `onnx_inputs`.
ONNX_INPUTS = (*RankerBatch._fields, "item_vectors", "item_categories")


def onnx_inputs(batch: RankerBatch, table: Tables) -> tuple[torch.Tensor, ...]:
    return (*batch, table.vectors, table.categories)


def score_change(network: Network, reference: Network, batches: list[RankerBatch], table: ItemTable) -> float:
    """Largest change of an uncalibrated probability of any head against the reference; inf where one is not finite."""
    worst = 0.0
    for batch in batches:
        there = (batch.candidate_rows >= 0).numpy()
        ours, theirs = (_probabilities(one.logits(batch, table))[there] for one in (network, reference))
        if not np.isfinite(ours).all():
            return float("inf")
        worst = max(worst, float(np.abs(ours - theirs).max(initial=0.0)))
    return worst


def _probabilities(logits: Floats) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * logits))
