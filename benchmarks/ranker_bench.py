"""What the ranker's benchmarks share: made-up bundles of a real size, requests, the process, callers of a fixed number.

Used by benchmarks/rank.py and benchmarks/swap.py. Invariant: a bundle's ranker is not trained, but its shapes, and so
its times, are those of the default settings; requests are encoded before the clock starts.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from core import bundle as names
from core.bundle import Manifest, ReleaseBundle, publish, staging_folder, write_delimited
from core.codec import from_ms
from core.grpc_runtime import channel
from core.settings import Settings
from devstack.ports import Ports
from features import item_stats, windows
from features.catalog import Catalog, Floats, Rows
from features.item_stats import ItemPartial
from features.transforms import stable_hash
from features.vectors import SIGNATURE, ranker_input
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import Item, ItemStats
from headrace.v1.ranker_service_pb2 import RankCandidatesRequest, RankCandidatesResponse, UserCandidates
from offline.export import write_form
from offline.training.tastes import TASTE_WIDTH
from ranker.calibration import Calibration, Platt, save_calibration
from ranker.forms import ONNX
from ranker.model import HEADS, RankerConfig, RankerModel, save_ranker
from ranker.probe import Probe, save_probe

T0_MS = 1_780_000_000_000
ITEMS, CANDIDATES, HISTORY, USERS = 20_000, 500, 50, 64
_PROBE_LISTS, _PROBE_ITEMS = 32, 1000
_READY_SECONDS = 120
_METHOD = "/headrace.v1.RankerService/RankCandidates"

Change = Callable[[Path], None]


class Shop:
    """Items and users, made up once."""

    def __init__(self, settings: Settings, items: int = ITEMS) -> None:
        self._settings = settings
        self.dimension = settings.offline.dimension
        self._rng = np.random.default_rng(settings.offline.seed)
        self.items = [_item(number) for number in range(items)]
        self._stats = [_stats(number, settings) for number in range(items)]
        self._forms: dict[int, tuple[bytes, ...]] = {}
        self.vectors = _unit(self._rng.normal(size=(items, self.dimension)))

    def publish(
        self, registry: Path, version: str, *, seed: int = 0, promote: bool = True, change: Change | None = None
    ) -> ReleaseBundle:
        """A bundle; `change` may spoil its files before they are sealed."""
        staged = staging_folder(registry, version)
        write_delimited(staged / names.ITEMS, self.items)
        write_delimited(staged / names.ITEM_STATS, self._stats)
        save_file({"vectors": self.vectors}, staged / names.ITEM_VECTORS)
        torch.manual_seed(seed)
        config = RankerConfig(self.dimension, len(self.items), TASTE_WIDTH, trained_heads=HEADS)
        model = RankerModel(config).eval()
        torch.nn.init.normal_(model.tastes, std=0.1)
        save_ranker(model, staged)
        save_calibration(Calibration({"click": Platt()}, "sampled"), staged)
        save_probe(self._probe(), self.dimension, staged)
        self._put_form(staged, seed)
        if change is not None:
            change(staged)
        manifest = Manifest(
            bundle_version=version,
            embedding_version="e",
            index_version="i",
            model_version=model.config.model_version,
            feature_signature=SIGNATURE,
            created_time_ms=T0_MS,
            data_watermark_ms=T0_MS,
            dimension=self.dimension,
            item_count=len(self.items),
            log_id="benchmark",
        )
        return publish(registry, staged, manifest, promote=promote)

    def state(self, events: int = HISTORY) -> UserState:
        state = UserState()
        for step, number in enumerate(self._rng.integers(0, len(self.items), events).tolist()):
            categories = tuple(self.items[number].categories)
            event = UserEvent(
                "u", stable_hash(f"{number}/{step}"), f"item-{number}", "click", T0_MS + step, categories=categories
            )
            windows.apply(state, [event], self._settings.features)
        return state

    def user(self, candidates: int = CANDIDATES) -> UserCandidates:
        chosen = self._rng.permutation(len(self.items))[:candidates].tolist()
        return UserCandidates(
            user_id="u",
            state=windows.encode(self.state()),
            embedding=_unit(self._rng.normal(size=(1, self.dimension)))[0].tolist(),
            item_ids=[f"item-{number}" for number in chosen],
            scores=np.linspace(1, 0, candidates).tolist(),
            source_bits=[1] * candidates,
            request_time=from_ms(T0_MS + 3_600_000),
        )

    def _put_form(self, staged: Path, seed: int) -> None:
        """The ONNX form, exported once a seed: that takes seconds."""
        files = (names.RANKER_ONNX, names.RANKER_FORM)
        if seed in self._forms:
            for name, content in zip(files, self._forms[seed], strict=True):
                (staged / name).write_bytes(content)
            return
        write_form(staged, ONNX, self._settings)
        self._forms[seed] = tuple((staged / name).read_bytes() for name in files)

    def _probe(self) -> Probe:
        """Lists of the shop, as training would have kept some."""
        catalog = Catalog.of_items(self.items[:_PROBE_ITEMS], self._settings.features)
        rows: Rows = np.arange(CANDIDATES, dtype=np.int32)
        scores, bits = np.linspace(1, 0, CANDIDATES, dtype=np.float32), np.ones(CANDIDATES, np.int32)
        now_ms, features = T0_MS + 3_600_000, self._settings.features
        states = [self.state() for _ in range(_PROBE_LISTS)]
        inputs = [ranker_input(state, catalog, rows, scores, bits, now_ms, features) for state in states]
        return Probe(inputs, [None] * _PROBE_LISTS, [(rows == 0).astype(np.float32)] * _PROBE_LISTS)

    def requests(self, count: int = USERS) -> list[bytes]:
        return [RankCandidatesRequest(users=[self.user()]).SerializeToString() for _ in range(count)]


@contextmanager
def running_ranker(registry: Path, **variables: str) -> Iterator[tuple[str, Callable[[str], str]]]:
    """`python -m ranker` without Kafka; gives its address and a reader of its HTTP pages."""
    ports = Ports()
    port, admin_port = ports.take("ranker"), ports.take("ranker-admin")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
        "HEADRACE_RANKER__PORT": str(port),
        "HEADRACE_RANKER__ADMIN_PORT": str(admin_port),
        "HEADRACE_RANKER__DEVICE": "cpu",
        "HEADRACE_REGISTRY__PATH": str(registry),
        "HEADRACE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "HEADRACE_TELEMETRY__LOG_LEVEL": "error",
        **variables,
    }
    process = subprocess.Popen([sys.executable, "-m", "ranker"], env=environment)

    def get(path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}{path}", timeout=2) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            return ""

    try:
        end = time.monotonic() + _READY_SECONDS
        while get("/ready") != "ready\n":
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the ranker did not get ready; its last lines say why")
            time.sleep(0.05)
        yield f"127.0.0.1:{port}", get
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(30)
        ports.close()


Answered = Callable[[RankCandidatesResponse, float, float], None]


async def call_for(
    target: str, requests: list[bytes], callers: int, seconds: float, answered: Answered, timeout_seconds: float = 5.0
) -> int:
    """Callers that ask one request after the other; returns how many failed.

    Args:
        target: the ranker's address.
        requests: encoded; each caller begins at another one.
        callers: how many at once.
        seconds: for how long.
        answered: called with each answer, when it was asked for (time.monotonic) and how long it took, in ms.
        timeout_seconds: deadline of each call.
    """
    connection = channel(target)
    ask = connection.unary_unary(_METHOD, lambda raw: raw, RankCandidatesResponse.FromString)
    end = time.monotonic() + seconds
    failed = 0

    async def run(caller: int) -> None:
        nonlocal failed
        number = caller * (len(requests) // callers)
        while (began := time.monotonic()) < end:
            number += 1
            try:
                answer = await ask(requests[number % len(requests)], timeout=timeout_seconds)
            except Exception:  # noqa: BLE001 - a call that fails is counted
                failed += 1
                continue
            answered(answer, began, (time.monotonic() - began) * 1000)

    await asyncio.gather(*(run(caller) for caller in range(callers)))
    await connection.close(None)
    return failed


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else float("nan")


def _item(number: int) -> Item:
    return Item(item_id=f"item-{number}", title=f"Item {number}", categories=[f"taste-{number % 40}"], price=number)


def _stats(number: int, settings: Settings) -> ItemStats:
    partial = ItemPartial()
    for count in range(number % 7):
        event = UserEvent("u", count, f"item-{number}", "click", T0_MS + count)
        item_stats.apply(partial, event, settings.features)
    return item_stats.as_message(f"item-{number}", -1, partial, settings.features)


def _unit(vectors: np.ndarray) -> Floats:
    out: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return out
