"""Data for the fault matrix: a simulated shop, a small trained bundle, users with a past, items that may not be shown.

Invariant: what an answer is judged by is read back from the online store and the topics, not taken from a plan.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.fault_load import World
from core.bundle import ReleaseBundle, open_current
from core.errors import StageTimeoutError
from core.kafka import KafkaProducer
from core.settings import Settings, load_settings
from core.topics import Topics
from devstack.demo_data import active_users, prepare
from features import windows
from features.definitions import USER_STATE
from features.stores.event_log import EventLog
from features.stores.online import OnlineStore
from headrace.v1.recommender_service_pb2 import ExplainRequest, RecommendRequest
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub
from offline.materialize import materialize
from offline.train import train

_USERS, _ITEMS, _SEED = 400, 600, 7
# Users that the load asks for, and others whose clicks are looked for.
_ASKED, _PROBES = 60, 60
# So many of the most popular items are taken from sale.
_UNAVAILABLE = 10
_TRAINING = {"offline": {"max_epochs": 3, "ranker_epochs": 1, "ranker_max_rows": 20_000}}
_CUT = "split_ms"
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class MadeWorld:
    """What was prepared on disk."""

    root: Path
    split_ms: int
    bundle: ReleaseBundle
    users: list[str]
    probe_users: list[str]

    def fill(self, settings: Settings) -> World:
        """Fills the online store, takes popular items from sale, and returns when the front door knows."""
        materialize(self.root, self.bundle, settings, before_ms=self.split_ms, progress=False)
        unavailable = self._take_from_sale(settings)
        return World(self.users, self._seen(settings), frozenset(unavailable))

    def _seen(self, settings: Settings) -> dict[str, frozenset[str]]:
        kinds = frozenset(settings.serving.exclude_seen_kinds)
        store = OnlineStore(settings.redis, settings.features.project)
        rows = store.read(USER_STATE, [(user_id,) for user_id in self.users], ("state",))
        store.close()
        states = (windows.decode(row.cells["state"]) for row in rows)  # type: ignore[arg-type]  # a bytes column
        return {
            user_id: frozenset(windows.recent_items(state, kinds))
            for user_id, state in zip(self.users, states, strict=True)
        }

    def _take_from_sale(self, settings: Settings) -> list[str]:
        popular = [str(entry[0]) for entry in self.bundle.json("popularity.json")["all"][:_UNAVAILABLE]]
        producer, topic = KafkaProducer(settings.kafka), Topics(settings.kafka.topic_prefix).items
        for item in self.bundle.items():
            if item.item_id in popular:
                item.available = False
                producer.send(topic, item.item_id.encode(), item.SerializeToString()).result(10)
        producer.close()
        with grpc.insecure_channel(f"127.0.0.1:{settings.serving.port}") as channel:
            for item_id in popular:
                _wait_until_gone(RecommenderServiceStub(channel), self.users[0], item_id)
        return popular


def make_world(home: Path, say: Callable[[str], None]) -> MadeWorld:
    """Prepares data and bundle below `home`, or uses those that lie there from an earlier run."""
    for name in ("redis", "kafka", "event_log"):
        shutil.rmtree(home / name, ignore_errors=True)
    root, registry, cut = home / "dataset", home / "bundles", home / _CUT
    if not cut.is_file():
        say("simulating a shop and training a small bundle")
        data = prepare("simulated", None, root, users=_USERS, items=_ITEMS, seed=_SEED)
        train(root, registry, load_settings(overrides=_TRAINING), before_ms=data.split_ms, progress=False)
        cut.write_text(str(data.split_ms), "utf-8")
    split_ms = int(cut.read_text("utf-8"))
    known: Sequence[str] = active_users(EventLog(root), split_ms, _ASKED + _PROBES, _SEED)
    return MadeWorld(root, split_ms, open_current(registry), list(known[:_ASKED]), list(known[_ASKED:]))


def _wait_until_gone(stub: RecommenderServiceStub, user_id: str, item_id: str) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    request = ExplainRequest(request=RecommendRequest(user_id=user_id), item_id=item_id)
    while time.monotonic() < end:
        answer = stub.Explain(request, timeout=5)
        if not answer.in_answer and "available" in answer.dropped_reason:
            return
        time.sleep(0.02)
    raise StageTimeoutError("serving", f"does not learn that {item_id} is not available")
