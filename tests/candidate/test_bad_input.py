"""What nobody should send, over a real socket: a clear error or a defined answer, never a crash or a wrong index."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candidate.snapshot import load_snapshot
from core import bundle as names
from core.bundle import open_bundle, promote_version
from core.errors import ArtifactError
from features import windows
from features.vectors import SOURCES
from features.windows import Interaction, UserState
from headrace.v1.candidate_service_pb2 import EncodeUsersRequest, RetrieveCandidatesRequest, UserToEncode
from headrace.v1.events_pb2 import Item
from headrace.v1.state_pb2 import UserState as UserStateProto
from headrace.v1.types_pb2 import Context, ItemFilter, LabelMatch, NumberRange

if TYPE_CHECKING:
    from conftest import Opener, OtherTowers, Running, World

T0_MS = 1_700_000_000_000


def state_with(**changes: Any) -> bytes:
    """A state of one click, but for some fields of it."""
    entry = Interaction(T0_MS, 7, "jazz-1", "click", 1.0)._replace(**changes)
    return windows.encode(UserState(revision=1, history=[entry]))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"user_id": "x" * 129}, "user_id"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"num_candidates": 1_000_000}, "num_candidates"),
        ({"state": b"\xff\xff"}, "state"),
        ({"state": b"\x00" * 1_000_001}, "state"),
        ({"state": UserStateProto(encoding=99).SerializeToString()}, "state"),
        ({"state": UserStateProto(encoding=1, kind=[3], event_hash=[1]).SerializeToString()}, "state"),
        ({"state": state_with(value=math.nan, kind="rating")}, "state"),
        ({"state": state_with(time_ms=2**62)}, "state"),
        ({"state": state_with(time_ms=-(2**62))}, "state"),
        ({"context": {"as_of_time": {"seconds": 2**62}}}, "context.as_of_time"),
        ({"context": {"as_of_time": {"seconds": -(2**62)}}}, "context.as_of_time"),
        ({"num_candidates": -1}, "num_candidates"),
        ({"embedding": [math.nan] * 32}, "embedding"),
        ({"embedding": [1.0] * 31 + [math.inf], "embedding_version": "OURS"}, "embedding"),
        ({"embedding": [1.0] * 3, "embedding_version": "OURS"}, "embedding"),
        ({"filter": ItemFilter(ranges=[NumberRange(name="height")])}, "filter.ranges[0].name"),
        ({"filter": ItemFilter(ranges=[NumberRange(name="year", min=2, max=1)])}, "filter.ranges[0]"),
        ({"filter": ItemFilter(labels=[LabelMatch(name="colour", values=["red"])])}, "filter.labels[0].name"),
        ({"filter": ItemFilter(exclude_item_ids=["x"] * 10_001)}, "filter.exclude_item_ids"),
        ({"source_quotas": {"magic": 3}}, "source_quotas"),
        ({"source_quotas": {"ann": 3000}}, "source_quotas[ann]"),
        ({"probe_item_ids": ["x"] * 101}, "probe_item_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_bad_requests_are_refused_by_field(running: Running, change: dict[str, Any], field: str) -> None:
    if change.get("embedding_version") == "OURS":
        change = {**change, "embedding_version": running.snapshots.current.embedding_version}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.retrieve(**change)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(f"{field}:")


@pytest.mark.parametrize(
    ("users", "field"),
    [
        ([], "users"),
        ([UserToEncode(user_id="u")] * 1001, "users"),
        ([UserToEncode(user_id="u"), UserToEncode()], "users[1].user_id"),
        ([UserToEncode(user_id="u", state=b"\xff")], "users[0].state"),
        (
            [UserToEncode(user_id="u")] * 70 + [UserToEncode(user_id="u", state=state_with(value=math.inf))],
            "users[70].state",
        ),
    ],
    ids=["none", "too many", "no id", "broken state", "no number"],
)
async def test_bad_encode_requests_are_refused_by_field(
    running: Running, users: list[UserToEncode], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.stub.EncodeUsers(EncodeUsersRequest(users=users), timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(f"{field}:")


def _tampered(bundle: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a bundle with one file changed, and a manifest that agrees with it."""
    shutil.copytree(bundle, target)
    file = target / name
    file.write_bytes(change(file.read_bytes()))
    manifest = json.loads((target / names.MANIFEST).read_text())
    raw = file.read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    (target / names.MANIFEST).write_text(json.dumps({**manifest, "bundle_version": target.name}))
    return target


OURS = [
    names.ITEMS,
    names.ITEM_STATS,
    names.ITEM_VECTORS,
    names.TOWERS,
    names.TOWERS_CONFIG,
    names.INDEX,
    f"{names.INDEX}.json",
    names.CO_VISITATION,
    names.CO_VISITATION_FACTS,
]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_refused_also_where_the_checksum_agrees(
    music: World, tmp_path: Path, name: str, share: float
) -> None:
    cut = _tampered(music.bundle.path, tmp_path / "cut", name, lambda raw: raw[: int(share * len(raw))])
    if name == names.ITEM_STATS and share == 0.0:
        # No statistics are a defined state.
        load_snapshot(open_bundle(cut), music.settings)
        return
    with pytest.raises(ArtifactError):
        load_snapshot(open_bundle(cut), music.settings)


@pytest.mark.parametrize("name", OURS)
def test_a_file_that_is_not_the_manifests_is_refused(music: World, tmp_path: Path, name: str) -> None:
    shutil.copytree(music.bundle.path, tmp_path / "bundle")
    file = tmp_path / "bundle" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(ArtifactError, match="corrupt"):
        open_bundle(tmp_path / "bundle")
    file.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    "taken",
    [[names.TOWERS, names.TOWERS_CONFIG], [names.ITEM_VECTORS], [names.INDEX, f"{names.INDEX}.json"]],
    ids=["towers", "vectors", "index"],
)
def test_parts_of_other_towers_are_refused(
    music: World, other_towers: OtherTowers, tmp_path: Path, taken: list[str]
) -> None:
    """Of the same shape, checksums in order: it is the embedding version that tells."""
    registry, _ = other_towers
    mixed = tmp_path / "mixed"
    shutil.copytree(music.bundle.path, mixed)
    for at, name in enumerate(taken):
        source, target = mixed if at == 0 else tmp_path / f"mixed{at - 1}", tmp_path / f"mixed{at}"
        _tampered(source, target, name, lambda _, name=name: (registry / "v2" / name).read_bytes())
        mixed = target
    with pytest.raises(ArtifactError, match="embedding version"):
        load_snapshot(open_bundle(mixed), music.settings)


async def test_a_broken_bundle_leaves_the_old_one_serving(opener: Opener, music: World, tmp_path: Path) -> None:
    registry = tmp_path / "bundles"
    shutil.copytree(music.registry, registry)
    promote_version(registry, "v1")
    running = await opener(registry=registry)
    _tampered(registry / "v1", registry / "broken", names.ITEM_VECTORS, lambda raw: raw[:-100])
    promote_version(registry, "broken")
    with pytest.raises(ArtifactError):
        running.snapshots._swap()
    response = await running.retrieve()
    assert response.bundle_version == "v1"
    assert response.candidates


async def test_items_of_another_shape_never_reach_the_index(running: Running) -> None:
    """A vector field of any size, texts of any kind: the item tower makes the vector."""
    running.put(Item(item_id="odd", title="\0\uffff" * 50, numbers={"": 1e300}, categories=[""] * 64))
    running.put(Item(item_id="bad", numbers={"x": math.nan}))
    catalog = running.snapshots.current.catalog
    assert catalog.row("odd") >= 0
    assert catalog.row("bad") < 0


text = st.sampled_from(["", "jazz", "jazz-1", "label", "price", "year", "nowhere"]) | st.text(max_size=140)
int32 = st.integers(-2, 40) | st.integers(-(2**31), 2**31 - 1)
int64 = st.integers(0, 60) | st.integers(-(2**63), 2**63 - 1)
number = st.integers(-5, 5).map(float) | st.floats(width=32)
times = st.builds(dict, seconds=int64 | st.integers(0, 4_000_000_000), nanos=int32)


def few(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(strategy, max_size=3)


filters = st.builds(
    ItemFilter,
    categories_any=few(text),
    categories_none=few(text),
    exclude_item_ids=few(text),
    ranges=few(st.builds(NumberRange, name=text, min=st.none() | number, max=st.none() | number)),
    labels=few(st.builds(LabelMatch, name=text, values=few(text))),
)
histories = st.lists(
    st.builds(Interaction, st.integers(0, 5) | int64, st.integers(0, 2**64 - 1), text, text, number), max_size=5
)
states = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda history: _encoded(history), histories),
    st.just(state_with()),
    st.just(b""),
)
embeddings = st.one_of(
    st.just([]), st.lists(number, max_size=40), st.just([0.25] * 32), st.lists(number, min_size=32, max_size=32)
)
requests = st.builds(
    RetrieveCandidatesRequest,
    user_id=st.just("u") | text,
    embedding=embeddings,
    embedding_version=st.sampled_from(["OURS", "", "e0"]),
    embedding_revision=int64,
    state=states,
    num_candidates=st.integers(1, 80) | int32,
    filter=st.none() | filters,
    exclude_seen=st.booleans(),
    source_quotas=st.dictionaries(st.sampled_from(SOURCES) | text, st.integers(0, 30) | int32, max_size=3),
    context=st.none() | st.builds(Context, surface=text, as_of_time=st.none() | times),
    probe_item_ids=few(text),
    segment=text,
    columns=st.booleans(),
)
encodings = st.builds(
    EncodeUsersRequest, users=st.lists(st.builds(UserToEncode, user_id=st.just("u") | text, state=states), max_size=4)
)
ALLOWED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
}


def _encoded(history: list[Interaction]) -> bytes:
    try:
        return windows.encode(UserState(revision=len(history), history=sorted(history)))
    except ValueError:
        # Times further apart than the encoding can say.
        return b""


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Examples; hypothesis and the event loop do not mix."""
    examples: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None)
    @given(strategy)
    def draw(example: Any) -> None:
        examples.append(example)

    draw()
    return examples


def _mended(request: RetrieveCandidatesRequest) -> RetrieveCandidatesRequest:
    """The same with what is most often wrong put right, so that the sources see odd requests, too."""
    mended = RetrieveCandidatesRequest()
    mended.CopyFrom(request)
    mended.user_id, mended.num_candidates = "u", 1 + abs(request.num_candidates) % 80
    mended.ClearField("source_quotas")
    mended.ClearField("context")
    del mended.filter.ranges[:], mended.filter.labels[:]
    return mended


async def test_whatever_a_request_holds_it_is_answered_or_refused_by_name(running: Running) -> None:
    answered = 0
    version, catalog = running.snapshots.current.embedding_version, running.snapshots.current.catalog
    for example in drawn(requests, 400):
        if example.embedding_version == "OURS":
            example.embedding_version = version
        for request in (example, _mended(example)):
            try:
                response = await running.stub.RetrieveCandidates(request, timeout=10)
            except grpc.aio.AioRpcError as error:
                assert error.code() in ALLOWED, (request, error)
                continue
            answered += 1
            found = [candidate.item_id for candidate in response.candidates] or list(response.item_ids)
            assert len(found) == len(set(found)) <= request.num_candidates
            assert not set(found) & set(request.filter.exclude_item_ids)
            assert all(catalog.row(item_id) >= 0 for item_id in found)
            scores = [candidate.score for candidate in response.candidates] or list(response.scores)
            assert all(map(math.isfinite, scores))
            assert [probe.item_id for probe in response.probes] == list(request.probe_item_ids)
    assert answered > 100


async def test_whatever_is_to_be_encoded_it_is_encoded_or_refused_by_name(running: Running) -> None:
    answered = 0
    for request in drawn(encodings, 300):
        try:
            response = await running.stub.EncodeUsers(request, timeout=10)
        except grpc.aio.AioRpcError as error:
            assert error.code() in ALLOWED, (request, error)
            continue
        answered += 1
        assert len(response.users) == len(request.users)
        for user in response.users:
            assert len(user.embedding) in (0, 32)
            assert all(map(math.isfinite, user.embedding))
    assert answered > 30
