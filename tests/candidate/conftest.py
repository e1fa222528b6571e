"""A tiny world with four tastes, and a bundle of it made by the real trainer."""

import copy
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from candidate.bootstrap import SERVICE, make_sources
from candidate.encoder import encode_items
from candidate.executor import WorkExecutor
from candidate.feed import Snapshots
from candidate.index import ItemIndex, save_index
from candidate.retriever import Retriever
from candidate.service import CandidateService
from candidate.sources import CandidateSource
from candidate.stored_users import StoredUsers
from candidate.towers import save_towers
from core import bundle as names
from core.bundle import Manifest, ReleaseBundle, publish, staging_folder, write_delimited
from core.clock import SystemClock
from core.codec import from_ms
from core.grpc_runtime import GrpcServer, channel
from core.kafka import Record
from core.settings import Settings, load_settings
from core.topics import Topics
from features import item_stats, windows
from features.item_stats import ItemPartial
from features.stores.erasures import UnerasedLog
from features.stores.event_log import user_events
from features.stores.event_rows import EVENTS, ITEMS, to_table
from features.transforms import stable_hash
from features.windows import UserEvent, UserState
from headrace.v1.candidate_service_pb2 import RetrieveCandidatesRequest, RetrieveCandidatesResponse
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceStub, add_CandidateServiceServicer_to_server
from headrace.v1.events_pb2 import Event, Item
from offline.co_visitation import learn_co_visitation
from offline.training.towers import TrainedTowers, train_towers

T0_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
GENRES = ("jazz", "metal", "folk", "techno")
ITEMS_PER_GENRE, USERS, EVENTS_PER_USER = 20, 160, 24


def genre_item(item_id: str, genre: str, **more: object) -> Item:
    return Item(item_id=item_id, title=f"{genre} record {item_id}", categories=[genre], **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class World:
    settings: Settings
    log: UnerasedLog
    items: list[Item]
    trained: TrainedTowers
    bundle: ReleaseBundle

    @property
    def registry(self) -> Path:
        return self.bundle.path.parent


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings(
        None,
        {
            "offline": {"dimension": 32, "max_epochs": 6, "batch_size": 32},
            "kafka": {"bootstrap_servers": "127.0.0.1:1", "log_id": "test"},
            "candidate": {"port": 0, "admin_port": 0},
        },
    )


@pytest.fixture(scope="session")
def music(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> World:
    """Users who like one genre each, 10% of the time another; a trained and published bundle."""
    root = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(5)
    items = [
        genre_item(
            f"{genre}-{n}",
            genre,
            year=1980 + n,
            price=5.0 + n,
            labels={"label": f"label-{n % 2}"},
            publish_time=from_ms(T0_MS + n * HOUR_MS) if n >= ITEMS_PER_GENRE - 3 else None,
        )
        for genre in GENRES
        for n in range(ITEMS_PER_GENRE)
    ]
    events = []
    for user in range(USERS):
        for step in range(EVENTS_PER_USER):
            genre = GENRES[user % 4] if rng.random() < 0.9 else GENRES[int(rng.integers(4))]
            events.append(
                Event(
                    event_id=f"{user}-{step}",
                    user_id=f"user-{user}",
                    item_id=f"{genre}-{int(rng.integers(ITEMS_PER_GENRE))}",
                    kind="click",
                    event_time=from_ms(T0_MS + step * HOUR_MS + user * 1000),
                    categories=[genre],
                )
            )
    log = UnerasedLog(root / "log")
    log.write(ITEMS, to_table(ITEMS, items), "items")
    log.write(EVENTS, to_table(EVENTS, events), "events")
    items = list(log.items())
    trained = train_towers(log, items, settings, root / "work", progress=False)
    bundle = publish_bundle(root / "bundles", "v1", root / "work", items, trained, log, settings)
    return World(settings, log, items, trained, bundle)


def publish_bundle(
    registry: Path,
    version: str,
    work: Path,
    items: list[Item],
    trained: TrainedTowers,
    log: UnerasedLog,
    settings: Settings,
) -> ReleaseBundle:
    staged = staging_folder(registry, version)
    for name in (names.TOWERS, names.TOWERS_CONFIG, names.ITEM_VECTORS):
        (staged / name).write_bytes((work / name).read_bytes())
    write_delimited(staged / names.ITEMS, items)
    partials: dict[str, ItemPartial] = {}
    for event in user_events(log.events()):
        item_stats.apply(partials.setdefault(event.item_id, ItemPartial()), event, settings.features)
    stats = [item_stats.as_message(item_id, -1, partial, settings.features) for item_id, partial in partials.items()]
    write_delimited(staged / names.ITEM_STATS, stats)
    embedding_version = trained.towers.embedding_version
    index = ItemIndex.build(trained.item_vectors, np.arange(len(items)), 1000, embedding_version)
    save_index(index, staged / names.INDEX)
    learn_co_visitation(log, settings, T0_MS + EVENTS_PER_USER * HOUR_MS).save(staged)
    dimension = trained.item_vectors.shape[1]
    manifest = Manifest(version, embedding_version, f"i-{version}", "", "", T0_MS, T0_MS, dimension, len(items))
    return publish(registry, staged, replace(manifest, log_id="test"))


# A registry of two bundles of the same items, and their embedding versions.
OtherTowers = tuple[Path, dict[str, str]]


@pytest.fixture(scope="session")
def other_towers(music: World, tmp_path_factory: pytest.TempPathFactory) -> OtherTowers:
    """v1, and v2 of towers that think a little differently."""
    root = tmp_path_factory.mktemp("other")
    shutil.copytree(music.registry, root / "bundles")
    towers = copy.deepcopy(music.trained.towers)
    with torch.no_grad():
        for parameter in towers.user.parameters():
            parameter.mul_(0.9)
    vectors = encode_items(towers, music.items)
    (root / "work").mkdir()
    save_towers(towers, root / "work")
    whose = {names.VECTORS_VERSION: towers.embedding_version}
    save_file({"vectors": vectors}, root / "work" / names.ITEM_VECTORS, metadata=whose)
    trained = TrainedTowers(towers, vectors, {})
    publish_bundle(root / "bundles", "v2", root / "work", music.items, trained, music.log, music.settings)
    versions = {"v1": music.trained.towers.embedding_version, "v2": towers.embedding_version}
    assert len(set(versions.values())) == 2
    return root / "bundles", versions


@pytest.fixture(scope="session")
def state_of(settings: Settings) -> Callable[..., UserState]:
    """A state from the items that a user clicked, oldest first."""

    def make(*item_ids: str, kind: str = "click") -> UserState:
        state = UserState()
        for step, item_id in enumerate(item_ids):
            event = UserEvent("u", stable_hash(f"{item_id}/{step}"), item_id, kind, T0_MS + step * 60_000)
            windows.apply(state, [event], settings.features)
        return state

    return make


@dataclass
class Running:
    """A service, its client, and the hand that plays Kafka."""

    stub: Any
    snapshots: Snapshots
    settings: Settings
    executor: WorkExecutor

    def put(self, item: Item) -> None:
        self.news(item)

    def remove(self, item_id: str) -> None:
        self.news(item_id)

    def news(self, *of_items: Item | str) -> None:
        """One batch of the items topic: items that come or change, ids of those that go."""
        self.snapshots.feeds.catalog.apply(
            [
                self._record(one, None) if isinstance(one, str) else self._record(one.item_id, one.SerializeToString())
                for one in of_items
            ]
        )

    def tell(self, offset: int, event: Event) -> None:
        """One message of the events topic."""
        assert self.snapshots.feeds.events is not None
        topic = Topics(self.settings.kafka.topic_prefix).events
        self.snapshots.feeds.events.resume()
        self.snapshots.feeds.events.apply([Record(topic, b"u", event.SerializeToString(), None, 0, offset)])

    def _record(self, item_id: str, value: bytes | None) -> Record:
        topic = Topics(self.settings.kafka.topic_prefix).items
        return Record(topic, item_id.encode(), value, None, 0, 0)

    async def retrieve(
        self, state: UserState | bytes | None = None, *, timeout_seconds: float = 10, **more: Any
    ) -> RetrieveCandidatesResponse:
        request: dict[str, Any] = {"user_id": "u", "num_candidates": 30, **more}
        if state is not None:
            request["state"] = state if isinstance(state, bytes) else windows.encode(state)
        return await self.stub.RetrieveCandidates(RetrieveCandidatesRequest(**request), timeout=timeout_seconds)


@asynccontextmanager
async def service(
    settings: Settings, executor: WorkExecutor, sources: Sequence[CandidateSource]
) -> AsyncIterator[Running]:
    """A service on a real port, without Kafka, on the bundle that its registry calls current."""
    snapshots = Snapshots(settings)
    server = GrpcServer("127.0.0.1", 0, [SERVICE])
    users = StoredUsers(settings)
    retriever = Retriever(settings, sources, SystemClock())
    served = CandidateService(snapshots, retriever, executor, users=users)
    add_CandidateServiceServicer_to_server(served, server.grpc)
    server.start()
    async with channel(f"127.0.0.1:{server.port}") as connection:
        yield Running(CandidateServiceStub(connection), snapshots, settings, executor)
    await server.stop(0)
    executor.close()
    users.close()


class Opener(Protocol):
    """Opens services; all are closed at the end of the test."""

    async def __call__(
        self,
        registry: Path | None = None,
        executor: WorkExecutor | None = None,
        sources: Sequence[CandidateSource] | None = None,
        redis_url: str = "",
        **candidate: Any,
    ) -> Running: ...


@pytest.fixture
async def opener(music: World) -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:

        async def open_one(
            registry: Path | None = None,
            executor: WorkExecutor | None = None,
            sources: Sequence[CandidateSource] | None = None,
            redis_url: str = "",
            **candidate: Any,
        ) -> Running:
            values = music.settings.model_dump()
            values["registry"]["path"] = registry or music.registry
            values["candidate"] |= candidate
            values["redis"]["url"] = redis_url or "redis://127.0.0.1:1/0"
            settings = Settings(**values)
            return await stack.enter_async_context(
                service(settings, executor or WorkExecutor(2, 16), sources or make_sources())
            )

        yield open_one


@pytest.fixture
async def running(opener: Opener) -> Running:
    return await opener()
