"""The ranker's network computed by a Triton server, asked over the open inference protocol (KServe v2) on gRPC.

Chosen by ranker/release.py where `ranker.form` is triton; offline/export.py writes what the server loads. Invariant: a
bundle's users are scored by the model that was exported from that very bundle, or not at all; no call waits longer than
it may.
"""

from typing import cast

import grpc
import numpy as np
import torch

from core.deadline import Deadline
from core.errors import ArtifactError, StageError, StageTimeoutError
from core.grpc_runtime import blocking_channel
from features.catalog import Floats
from features.vectors import CANDIDATE_FEATURES, USER_FEATURES
from headrace.v1 import kserve_service_pb2 as pb
from headrace.v1.kserve_service_pb2_grpc import GRPCInferenceServiceStub
from ranker.forms import TRITON
from ranker.model import HEADS, ItemTable, RankerBatch

OUTPUT = "logits"
# Parameters of the model's configuration that the exporter writes.
BUNDLE_VERSION, ITEM_COUNT = "bundle_version", "item_count"
# Triton computes requests together whose shapes are equal: lists are padded to one of these lengths.
LENGTHS = (64, 128, 256, 512, 1024, 2048)
# For a call while a bundle is loaded: a server's first calls take longer than those that follow.
_LOAD_MS = 10_000.0
_PADDED = {"candidate_rows": -1, "candidates": 0}
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def model_name(bundle_version: str) -> str:
    """Each bundle has a model of its own: the one that serves and the one before it are loaded side by side."""
    return f"headrace_ranker.{bundle_version}"


def tensors(dimension: int) -> dict[str, tuple[str, list[int]]]:
    """Data type and shape of every input, without the users' axis; -1 = any size."""
    return {
        "user_vectors": ("FP32", [dimension]),
        "has_vector": ("FP32", [1]),
        "history_rows": ("INT64", [-1]),
        "history_weights": ("FP32", [-1]),
        "history_ages": ("FP32", [-1]),
        "users": ("FP32", [len(USER_FEATURES)]),
        "candidate_rows": ("INT64", [-1]),
        "candidates": ("FP32", [-1, len(CANDIDATE_FEATURES)]),
    }


class TritonNetwork:
    """The exported network on a server. It knows the items of the bundle as they were; later ones count as unknown."""

    form = TRITON

    def __init__(self, target: str, timeout_ms: float, bundle_version: str, dimension: int) -> None:
        """Raises ArtifactError where no server answers, or it has not the model of this bundle."""
        self._target, self._name = target, model_name(bundle_version)
        self._timeout_ms, self._allowed_ms = timeout_ms, _LOAD_MS
        self._tensors = tensors(dimension)
        self._stub = GRPCInferenceServiceStub(blocking_channel(target))
        config = self._config(bundle_version)
        self._check(config, bundle_version)
        self._item_count = int(config.parameters[ITEM_COUNT].string_value)
        self._most_users = config.max_batch_size

    def begin_to_serve(self) -> None:
        """The bundle is loaded: from now on the setting bounds each call."""
        self._allowed_ms = self._timeout_ms

    def logits(self, batch: RankerBatch, table: ItemTable) -> Floats:  # noqa: ARG002 - the server has its own items
        """Raises StageError where the server does not answer, StageTimeoutError where it does not in time."""
        deadline = Deadline.after_ms(self._allowed_ms)
        users, count = batch.candidate_rows.shape
        length = next((one for one in LENGTHS if one >= count), count)
        arrays = {name: self._array(name, tensor, length) for name, tensor in zip(batch._fields, batch, strict=True)}
        parts = [
            self._infer({name: array[start : start + self._most_users] for name, array in arrays.items()}, deadline)
            for start in range(0, users, self._most_users)
        ]
        return np.concatenate(parts)[:, :count]

    def _array(self, name: str, tensor: torch.Tensor, length: int) -> np.ndarray:
        array = tensor.numpy()
        if name.endswith("_rows"):
            array = np.where(array < self._item_count, array, -1)
        if name in _PADDED:
            behind = [(0, 0), (0, length - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
            array = np.pad(array, behind, constant_values=_PADDED[name])
        return array

    def _infer(self, arrays: dict[str, np.ndarray], deadline: Deadline) -> Floats:
        request = pb.ModelInferRequest(model_name=self._name)
        request.outputs.add(name=OUTPUT)
        for name, array in arrays.items():
            kind, _ = self._tensors[name]
            request.inputs.add(name=name, datatype=kind, shape=array.shape)
            request.raw_input_contents.append(array.astype("<i8" if kind == "INT64" else "<f4").tobytes())
        try:
            response = self._stub.ModelInfer(request, timeout=deadline.remaining_seconds())
        except grpc.RpcError as error:
            code, problem = _told(error)
            late = code is grpc.StatusCode.DEADLINE_EXCEEDED
            where = f"{self._target} answered {code.name}: {problem}; is Triton up, and {self._name} loaded?"
            raise (StageTimeoutError if late else StageError)(TRITON, where) from error
        shape = (*arrays["candidate_rows"].shape, len(HEADS))
        told = [(one.name, one.datatype, tuple(one.shape)) for one in response.outputs]
        raw = b"".join(response.raw_output_contents)
        if told != [(OUTPUT, "FP32", shape)] or len(raw) != 4 * np.prod(shape):
            raise StageError(TRITON, f"{self._target} answered {told}, not {OUTPUT} {shape}; export the model again")
        return np.frombuffer(raw, "<f4").reshape(shape)

    def _config(self, bundle_version: str) -> pb.ModelConfig:
        """What the server says of the model."""
        problem, seconds = "it is not ready", self._allowed_ms / 1000
        try:
            if self._stub.ModelReady(pb.ModelReadyRequest(name=self._name), timeout=seconds).ready:
                asked = pb.ModelConfigRequest(name=self._name)
                return self._stub.ModelConfig(asked, timeout=seconds).config
        except grpc.RpcError as error:
            code, problem = _told(error)
            if code in _AWAY:
                raise ArtifactError(
                    f"form {TRITON}: no Triton server answers at {self._target} ({problem}); start it with "
                    "`tritonserver --model-repository=DIR`, or set ranker.triton_target, or ranker.form to auto"
                ) from error
        raise ArtifactError(
            f"form {TRITON}: {self._target} does not serve model {self._name} ({problem}); write it with "
            f"`headrace export --form triton --bundle {bundle_version} --out DIR`, DIR the server's model repository, "
            "and let the server load it"
        )

    def _check(self, config: pb.ModelConfig, bundle_version: str) -> None:
        """Raises ArtifactError where the model is another than the exporter writes for this bundle."""
        again = f"export it again with `headrace export --form triton --bundle {bundle_version} --out DIR`"
        about = f"form {TRITON}: model {self._name} at {self._target}"
        version = config.parameters[BUNDLE_VERSION].string_value
        if version != bundle_version:
            raise ArtifactError(f"{about} was made from bundle {version!r}, not {bundle_version!r}; {again}")
        kinds = {"FP32": pb.TYPE_FP32, "INT64": pb.TYPE_INT64}
        wanted = {(name, kinds[kind], tuple(dims)) for name, (kind, dims) in self._tensors.items()}
        wanted.add((OUTPUT, pb.TYPE_FP32, (-1, len(HEADS))))
        served = {(one.name, one.data_type, tuple(one.dims)) for one in config.input}
        served |= {(one.name, one.data_type, tuple(one.dims)) for one in config.output}
        if wrong := sorted(wanted ^ served):
            raise ArtifactError(f"{about} has other inputs and outputs than this version, as {wrong[0][0]}; {again}")
        if config.max_batch_size < 1 or not config.parameters[ITEM_COUNT].string_value.isdecimal():
            raise ArtifactError(f"{about} does not say its {ITEM_COUNT} and a max_batch_size above 0; {again}")


def _told(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Code and, in one line, the problem."""
    call = cast(grpc.Call, error)
    return call.code(), " ".join(str(call.details()).split())[:200]
