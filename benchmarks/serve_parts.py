"""What the parts of an answer cost by themselves: Redis read, index search, model call, re-rank arithmetic, three hops.

Beside a running stack, in this process and one thread; the sum is what an answer could cost if nothing were in
between. Invariant: each part works on the real bundle and a real user's row, with as many candidates as an answer.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
import numpy as np
import redis
import torch

from candidate.snapshot import load_snapshot
from core.bundle import ReleaseBundle
from core.clock import SystemClock
from core.deadline import Deadline
from core.grpc_runtime import channel
from core.settings import Settings
from features import windows
from features.vectors import ranker_input
from headrace.v1.recommender_service_pb2 import RecommendRequest
from ranker.release import load_release as load_ranker
from serving.budget import Budget
from serving.query import SOURCE_BIT, Candidates, Query, UserFeatures
from serving.release import load_release
from serving.stages.rerank import BlendingReRanker
from serving.store_reader import UserStore
from serving.trace import Trace

_ROUNDS = 300
# Of an answer of 20 items, of 500 candidates with their scores, of 500 scores: what the three hops carry.
_HOPS = ((100, 4_000), (2_000, 20_000), (20_000, 10_000))


async def bare_parts_ms(settings: Settings, bundle: ReleaseBundle, user_id: str) -> dict[str, float]:
    """Median time of each part."""
    torch.set_num_threads(1)
    clock = SystemClock()
    parts = {"redis": await _redis(settings, user_id)}
    store = UserStore(settings.redis, settings.features.project)
    row = await store.read(user_id, Deadline.after_ms(1000, clock))
    await store.close()
    state = windows.decode(row.state)
    release = load_release(bundle, settings)
    catalog, now_ms = release.catalog, clock.now_ms()
    index = load_snapshot(bundle, settings).index
    quota, wanted = settings.candidate.quotas["ann"], settings.serving.num_candidates
    allowed, vector = catalog.servable(now_ms), np.array(row.vector, np.float32)[None]
    parts["search"] = _median(lambda: index.search(vector, quota, allowed))
    rows = index.search(vector, wanted, allowed)[0][0].astype(np.int32)
    scores = np.linspace(1, 0, len(rows), dtype=np.float32)
    bits = np.full(len(rows), SOURCE_BIT["ann"], np.int32)
    ranker = load_ranker(bundle, settings, clock)
    made = ranker_input(state, ranker.catalog, rows, scores, bits, now_ms, settings.features)
    parts["model"] = _median(lambda: ranker.scorer.score([made], [vector[0]]))
    ranked = ranker.scorer.score([made], [vector[0]])[0].score
    candidates = Candidates(rows, scores, scores, np.zeros_like(scores), bits, ranked)
    user = UserFeatures(user_id, state, row.state, segment=row.segment)
    reranker = BlendingReRanker(settings.serving, settings.features)
    budget = Budget(Deadline.after_ms(250, clock), settings.serving.stage_budget_ms)
    query = Query(
        RecommendRequest(user_id=user_id),
        "bare",
        20,
        now_ms,
        release,
        budget,
        Trace(clock),
        wanted,
        settings.serving.on(""),
    )
    parts["rerank"] = _median(lambda: reranker.rerank(query, user, candidates))
    parts["hops"] = await _hops()
    return {name: round(value, 3) for name, value in parts.items()}


def _median(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1000)
    return float(np.median(times))


async def _median_async(call: Callable[[], Awaitable[Any]]) -> float:
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        await call()
        times.append((time.perf_counter() - begin) * 1000)
    return float(np.median(times))


async def _redis(settings: Settings, user_id: str) -> float:
    """The row as bytes, over one blocking connection."""
    store = UserStore(settings.redis, settings.features.project)
    key, fields = store.key_and_fields(user_id)
    await store.close()
    with redis.Redis.from_url(settings.redis.url.get_secret_value()) as client:
        return _median(lambda: client.hmget(key, fields))


async def _hops() -> float:
    """Three calls with as many bytes as an answer's, of a server that does nothing."""
    server = grpc.aio.server()
    answers = {f"/bare/{number}": bytes(size) for number, (_, size) in enumerate(_HOPS)}

    class Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg]
        def service(self, details: Any) -> Any:
            answer = answers[details.method]

            async def handle(_: bytes, __: Any) -> bytes:
                return answer

            return grpc.unary_unary_rpc_method_handler(handle)

    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    total = 0.0
    async with channel(f"127.0.0.1:{port}") as connection:
        for number, (size, _) in enumerate(_HOPS):
            call: Any = connection.unary_unary(f"/bare/{number}")  # type: ignore[call-arg]
            total += await _median_async(partial(call, bytes(size)))
    await server.stop(0)
    return total


def run_parts(settings: Settings, bundle: ReleaseBundle, user_id: str) -> dict[str, float]:
    return asyncio.run(bare_parts_ms(settings, bundle, user_id))
