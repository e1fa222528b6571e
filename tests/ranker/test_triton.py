"""The network on a server of Triton's protocol: a real socket, the exported model, and every way in which it may fail.

The server here is the test's own: it reads the repository as Triton does and computes with ONNX Runtime.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from core.bundle import ReleaseBundle
from core.clock import ManualClock
from core.errors import ArtifactError, StageTimeoutError
from core.grpc_runtime import GrpcServer, channel
from core.settings import Settings
from features.vectors import RankerInput
from features.windows import UserState
from headrace.v1 import kserve_service_pb2 as pb
from headrace.v1.kserve_service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)
from headrace.v1.ranker_service_pb2 import RankCandidatesRequest, RankerServiceGetModelInfoRequest, UserCandidates
from headrace.v1.ranker_service_pb2_grpc import RankerServiceStub, add_RankerServiceServicer_to_server
from offline.export import write_triton
from ranker.bootstrap import SERVICE, make_batcher
from ranker.probe import Probe, save_probe
from ranker.release import Release, load_release
from ranker.releases import Releases
from ranker.service import RankerService
from ranker.triton import LENGTHS, model_name

T0_MS = 1_700_000_000_000
DIMENSION = 16
KINDS = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}
MakeBundle = Callable[..., ReleaseBundle]
State = Callable[..., UserState]
Input = Callable[..., RankerInput]


class Server(GRPCInferenceServiceServicer):
    """Serves a folder of models as it was when the server began, and refuses what Triton refuses."""

    def __init__(self, repository: Path, port: int = 0) -> None:
        self.configs: dict[str, pb.ModelConfig] = {}
        self._sessions = {}
        for file in repository.glob("*/config.pbtxt"):
            config = text_format.Parse(file.read_text("utf-8"), pb.ModelConfig())
            assert config.name == file.parent.name
            self.configs[config.name] = config
            model = file.parent / "1" / "model.onnx"
            self._sessions[config.name] = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        # Candidates' shapes as they came, and what to make of an answer.
        self.shapes: list[tuple[int, ...]] = []
        self.change: Callable[[pb.ModelInferResponse], object] = id
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def stop(self) -> None:
        self.may_answer.set()
        self._server.stop(0).wait()

    def ModelReady(self, request: pb.ModelReadyRequest, context: grpc.ServicerContext) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=request.name in self.configs)

    def ModelConfig(self, request: pb.ModelConfigRequest, context: grpc.ServicerContext) -> pb.ModelConfigResponse:
        if request.name not in self.configs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return pb.ModelConfigResponse(config=self.configs[request.name])

    def ModelInfer(self, request: pb.ModelInferRequest, context: grpc.ServicerContext) -> pb.ModelInferResponse:
        self.may_answer.wait()
        config = self.configs[request.model_name]
        values = {}
        for told, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            values[told.name] = np.frombuffer(raw, KINDS[told.datatype]).reshape(told.shape)
        assert set(values) == {one.name for one in config.input}
        for one in config.input:
            shape, kind = values[one.name].shape, pb.DataType.Name(one.data_type)
            assert KINDS[kind.removeprefix("TYPE_")] == values[one.name].dtype
            assert 1 <= shape[0] <= config.max_batch_size
            assert all(dim in (-1, size) for dim, size in zip(one.dims, shape[1:], strict=True))
        self.shapes.append(values["candidate_rows"].shape)
        session = self._sessions[request.model_name]
        known = [one.name for one in session.get_inputs()]
        (logits,) = session.run([one.name for one in request.outputs], {name: values[name] for name in known})
        response = pb.ModelInferResponse(model_name=request.model_name, model_version="1")
        response.outputs.add(name="logits", datatype="FP32", shape=logits.shape)
        response.raw_output_contents.append(logits.astype("<f4").tobytes())
        self.change(response)
        return response


@pytest.fixture
def probe(state_of: State, input_of: Input) -> Probe:
    inputs = [input_of(state_of(*range(size)), *range(10, 30)) for size in range(1, 9)]
    vectors = [np.full(DIMENSION, 0.25, np.float32) if size % 2 else None for size in range(1, 9)]
    gains = [(np.arange(20) == size).astype(np.float32) for size in range(1, 9)]
    return Probe(inputs, vectors, gains)


@pytest.fixture
def bundle(make_bundle: MakeBundle, probe: Probe) -> ReleaseBundle:
    return make_bundle(change=lambda staged: save_probe(probe, DIMENSION, staged))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For an export that takes seconds, of a bundle that is always the same."""
    return tmp_path_factory.mktemp("triton") / "repository"


@pytest.fixture
def repository(bundle: ReleaseBundle, registry_settings: Settings, tmp_path: Path, exported: Path) -> Path:
    if not exported.exists():
        write_triton(bundle.path, exported, registry_settings)
    return Path(shutil.copytree(exported, tmp_path / "triton"))


@contextmanager
def serving(repository: Path) -> Iterator[Server]:
    server = Server(repository)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(repository: Path) -> Iterator[Server]:
    with serving(repository) as server:
        yield server


def with_triton(settings: Settings, port: int, **more: object) -> Settings:
    own = {"form": "triton", "triton_target": f"127.0.0.1:{port}", **more}
    return settings.model_copy(update={"ranker": settings.ranker.model_copy(update=own)})


def load(bundle: ReleaseBundle, settings: Settings) -> Release:
    return load_release(bundle, settings, ManualClock(T0_MS))


def test_the_server_scores_like_the_network_in_shapes_that_can_be_batched(
    bundle: ReleaseBundle, server: Server, registry_settings: Settings, probe: Probe, state_of: State, input_of: Input
) -> None:
    ours = load(bundle, with_triton(registry_settings, server.port, triton_timeout_ms=20_000.0)).scorer
    theirs = load(bundle, registry_settings).scorer
    assert (ours.network.form, theirs.network.form) == ("triton", "torch")
    # Alone, several together, and lists longer than the catalogue.
    long = [input_of(state_of(1, 2, 99), *range(-1, 39), *range(60)), input_of(state_of(), 3)]
    for inputs, vectors in (
        (probe.inputs[:1], probe.user_vectors[:1]),
        (probe.inputs, probe.user_vectors),
        (long, [None, None]),
    ):
        made, expected = ours.score(inputs, vectors), theirs.score(inputs, vectors)
        for one, other in zip(made, expected, strict=True):
            for name in ("score", "click", "conversion", "value", "confidence"):
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)
    assert {length for _, length in server.shapes} <= set(LENGTHS)
    assert {64, 128} <= {length for _, length in server.shapes}


def test_more_users_than_the_server_takes_at_once_are_sent_in_parts(
    bundle: ReleaseBundle, server: Server, registry_settings: Settings, probe: Probe
) -> None:
    server.configs[model_name("v1")].max_batch_size = 3
    ours = load(bundle, with_triton(registry_settings, server.port, triton_timeout_ms=20_000.0)).scorer
    server.shapes.clear()
    made = ours.score(probe.inputs, probe.user_vectors)
    expected = load(bundle, registry_settings).scorer.score(probe.inputs, probe.user_vectors)
    assert [users for users, _ in server.shapes] == [3, 3, 2]
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_allclose(one.score, other.score, atol=1e-5)


def test_an_item_that_came_after_the_export_counts_as_unknown(
    bundle: ReleaseBundle, server: Server, registry_settings: Settings, state_of: State, input_of: Input
) -> None:
    ours = load(bundle, with_triton(registry_settings, server.port, triton_timeout_ms=20_000.0)).scorer
    theirs = load(bundle, registry_settings).scorer
    ours.table.put_categories(60, np.array([[5, 0, 0, 0]], np.int32))
    one = input_of(state_of(1, 4), 2, 3)
    history = one.history_rows.copy()
    history[-1] = 60
    later = replace(one, candidate_rows=np.array([2, 60], np.int32), history_rows=history)
    unknown = replace(
        one, candidate_rows=np.array([2, -1], np.int32), history_rows=np.where(history == 60, -1, history)
    )
    (made,), (expected,) = ours.score([later], [None]), theirs.score([unknown], [None])
    np.testing.assert_allclose(made.click, expected.click, atol=1e-5)


def test_without_a_server_the_bundle_is_refused(
    bundle: ReleaseBundle, server: Server, registry_settings: Settings
) -> None:
    server.stop()
    with pytest.raises(ArtifactError, match=rf"no Triton server answers at 127.0.0.1:{server.port} .*tritonserver"):
        load(bundle, with_triton(registry_settings, server.port))


def test_a_bundle_that_was_not_exported_is_refused(
    bundle: ReleaseBundle, server: Server, registry_settings: Settings, make_bundle: MakeBundle
) -> None:
    other = make_bundle("v2", seed=9)
    with pytest.raises(ArtifactError, match=r"does not serve model headrace_ranker\.v2 .*--form triton --bundle v2"):
        load(other, with_triton(registry_settings, server.port))


def test_a_model_of_another_bundle_is_refused(
    bundle: ReleaseBundle, server: Server, registry_settings: Settings
) -> None:
    server.configs[model_name("v1")].parameters["bundle_version"].string_value = "v0"
    with pytest.raises(ArtifactError, match="was made from bundle 'v0', not 'v1'; export it again"):
        load(bundle, with_triton(registry_settings, server.port))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.input[5].dims.append(1), "other inputs and outputs than this version, as users;"),
        (lambda config: config.output.pop(), "other inputs and outputs than this version, as logits;"),
        (lambda config: config.parameters["item_count"].Clear(), "does not say its item_count"),
        (lambda config: config.ClearField("max_batch_size"), "and a max_batch_size above 0"),
    ],
    ids=["input", "output", "item-count", "batch"],
)
def test_a_model_of_another_shape_is_refused(
    bundle: ReleaseBundle,
    server: Server,
    registry_settings: Settings,
    change: Callable[[pb.ModelConfig], object],
    said: str,
) -> None:
    change(server.configs[model_name("v1")])
    with pytest.raises(ArtifactError, match=said):
        load(bundle, with_triton(registry_settings, server.port))


def test_another_network_under_the_bundles_name_is_refused(
    bundle: ReleaseBundle,
    repository: Path,
    registry_settings: Settings,
    make_bundle: MakeBundle,
    probe: Probe,
    tmp_path: Path,
) -> None:
    other = make_bundle("v2", seed=9, change=lambda staged: save_probe(probe, DIMENSION, staged))
    foreign = write_triton(other.path, tmp_path / "other", registry_settings)
    shutil.copyfile(foreign / "1" / "model.onnx", repository / model_name("v1") / "1" / "model.onnx")
    with serving(repository) as server, pytest.raises(ArtifactError, match="form triton changes a score by"):
        load(bundle, with_triton(registry_settings, server.port))


def test_a_server_that_fails_while_the_bundle_is_tried_out_refuses_it(
    bundle: ReleaseBundle, server: Server, registry_settings: Settings
) -> None:
    server.change = lambda response: response.outputs[0].shape.append(1)
    with pytest.raises(ArtifactError, match=r"bundle v1 could not be tried out: triton: .*export the model again"):
        load(bundle, with_triton(registry_settings, server.port))


def test_a_server_that_does_not_answer_in_time_is_a_late_stage(
    bundle: ReleaseBundle, server: Server, registry_settings: Settings, probe: Probe
) -> None:
    release = load(bundle, with_triton(registry_settings, server.port, triton_timeout_ms=50.0))
    server.may_answer.clear()
    with pytest.raises(StageTimeoutError, match=r"triton: .*DEADLINE_EXCEEDED") as caught:
        release.scorer.score(probe.inputs, probe.user_vectors)
    assert caught.value.dependency == "triton"


async def test_a_server_that_dies_is_an_unavailable_ranker_until_it_is_back(
    bundle: ReleaseBundle, repository: Path, registry_settings: Settings
) -> None:
    server = Server(repository)
    settings = with_triton(registry_settings, server.port, triton_timeout_ms=2_000.0)
    clock = ManualClock(T0_MS + 3_600_000)
    releases, batcher, front = Releases(settings, clock), make_batcher(settings), GrpcServer("127.0.0.1", 0, [SERVICE])
    add_RankerServiceServicer_to_server(RankerService(releases, batcher, clock), front.grpc)
    batcher.start()
    front.start()
    user = UserCandidates(item_ids=["item-1", "item-2"], scores=[1.0, 0.5], source_bits=[1, 1])
    request = RankCandidatesRequest(users=[user])
    try:
        async with channel(f"127.0.0.1:{front.port}") as connection:
            stub = RankerServiceStub(connection)
            before = await stub.RankCandidates(request, timeout=20)
            told = await stub.GetModelInfo(RankerServiceGetModelInfoRequest(), timeout=20)
            assert told.form == "triton"
            server.stop()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.RankCandidates(request, timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert re.search(r"triton: .* answered UNAVAILABLE", caught.value.details() or "")
            server = Server(repository, server.port)
            end = time.monotonic() + 20
            while True:
                try:
                    after = await stub.RankCandidates(request, timeout=20)
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
                    assert time.monotonic() < end
            np.testing.assert_allclose(after.users[0].scores, before.users[0].scores, atol=1e-6)
    finally:
        await front.stop(0)
        await batcher.close()
        server.stop()


async def test_a_bundle_that_the_server_gets_later_is_loaded_then(
    bundle: ReleaseBundle,
    repository: Path,
    registry_settings: Settings,
    make_bundle: MakeBundle,
    probe: Probe,
    tmp_path: Path,
) -> None:
    server = Server(repository)
    clock = ManualClock(T0_MS)
    releases = Releases(with_triton(registry_settings, server.port), clock)
    later = make_bundle("v2", seed=9, change=lambda staged: save_probe(probe, DIMENSION, staged))
    try:
        assert not await releases.look()
        server.stop()
        exported = write_triton(later.path, tmp_path / "later", registry_settings)
        shutil.copytree(exported, repository / exported.name)
        server = Server(repository, server.port)
        assert not await releases.look()
        clock.advance(30_000)
        assert await releases.look()
        assert releases.current.version == "v2"
    finally:
        releases.close()
        server.stop()


def test_a_refused_export_leaves_the_repository_as_it_is(
    bundle: ReleaseBundle, registry_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline.export.score_change", lambda *_: 0.5)
    with pytest.raises(ArtifactError, match="is refused"):
        write_triton(bundle.path, tmp_path / "new", registry_settings)
    assert not (tmp_path / "new").exists()


def test_messages_are_those_of_tritons_own_client() -> None:
    """Bytes that tritonclient 2.73.0 wrote: of a request, of an answer and of a model's whole configuration."""
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="candidate_rows", datatype="INT64", shape=[1, 2])
    request.inputs.add(name="has_vector", datatype="FP32", shape=[1, 1])
    request.outputs.add(name="logits")
    request.raw_input_contents.extend([np.array([3, -1], "<i8").tobytes(), np.ones(1, "<f4").tobytes()])
    assert request.SerializeToString().hex() == (
        "0a016d2a1b0a0e63616e6469646174655f726f77731205494e5436341a0201022a160a0a6861735f766563746f721204465033321a020101"
        "32080a066c6f676974733a100300000000000000ffffffffffffffff3a040000803f"
    )
    answer = pb.ModelInferResponse.FromString(
        bytes.fromhex(
            "0a016d1201311a013722070a0178120208012a130a066c6f676974731204465033321a03010103320c0000803f0000004000004040"
        )
    )
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [("logits", "FP32", [1, 1, 3])]
    assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [1, 2, 3]
    config = pb.ModelConfigResponse.FromString(
        bytes.fromhex(
            "0aab010a016d12106f6e6e7872756e74696d655f6f6e6e781a040a02080120402a1e0a0e63616e6469646174655f726f77731009220a"
            "ffffffffffffffffff012a0a0a036f64641008220104321a0a066c6f67697473100b1a0bffffffffffffffffff010322016c3a090a03"
            "6d5f3010012002420a6d6f64656c2e6f6e6e785a070a02040810e80772160a0e62756e646c655f76657273696f6e12040a0276318a01"
            "0b6f6e6e7872756e74696d65"
        )
    ).config
    assert (config.name, config.max_batch_size, list(config.output[0].dims)) == ("m", 64, [-1, 3])
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [
        ("candidate_rows", pb.TYPE_INT64, [-1]),
        ("odd", 8, [4]),
    ]
    assert config.parameters["bundle_version"].string_value == "v1"
