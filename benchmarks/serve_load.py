"""Callers of the front door as a process of their own: `python -m benchmarks.serve_load ADDRESS USERS …`.

Closed (so many callers, each asking again when it has its answer) or open (so many requests a second, whatever becomes
of them). Prints one line of JSON. Invariant: every request is counted, and its time runs from before the call to after
the answer.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop

from core.grpc_runtime import channel
from devstack.backend import tier_name
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub

# Connections that the callers share, as a backend's would.
_CHANNELS = 4
_LATE_GRACE_MS = 10.0
# Answers to be replayed afterwards.
_SAMPLE = 200


@dataclass
class Counts:
    """What became of the requests."""

    sent: int = 0
    failed: int = 0
    late: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    elapsed_ms: list[float] = field(default_factory=list)
    stage_ms: dict[str, list[float]] = field(default_factory=dict)
    recommendation_ids: list[str] = field(default_factory=list)


class Callers:
    """Asks for users in turn."""

    def __init__(self, stubs: Sequence[Any], users: Sequence[str], deadline_ms: float) -> None:
        self._stubs, self._users, self._deadline_ms = stubs, users, deadline_ms
        self.counts = Counts()

    async def ask(self) -> None:
        counts, number = self.counts, self.counts.sent
        counts.sent += 1
        request = RecommendRequest(user_id=self._users[number % len(self._users)])
        begin = time.perf_counter()
        try:
            stub = self._stubs[number % len(self._stubs)]
            answer = await stub.Recommend(request, timeout=self._deadline_ms / 1000)
        except grpc.aio.AioRpcError as error:
            counts.failed += 1
            counts.errors[error.code().name] += 1
            return
        elapsed_ms = (time.perf_counter() - begin) * 1000
        counts.elapsed_ms.append(elapsed_ms)
        counts.late += elapsed_ms > self._deadline_ms + _LATE_GRACE_MS
        counts.tiers[tier_name(answer)] += 1
        counts.recommendation_ids.append(answer.recommendation_id)
        for timing in answer.stage_timings:
            counts.stage_ms.setdefault(timing.stage, []).append(timing.elapsed.ToNanoseconds() / 1e6)

    async def closed(self, callers: int, seconds: float) -> None:
        end = time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < end:
                await self.ask()

        await asyncio.gather(*(one() for _ in range(callers)))

    async def opened(self, per_second: float, seconds: float) -> None:
        begin, tasks, number = time.perf_counter(), set(), 0
        while (at := number / per_second) < seconds:
            task = asyncio.ensure_future(self.ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        await asyncio.gather(*tasks)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    users = arguments.users.read_text("utf-8").split()
    channels = [channel(arguments.address) for _ in range(_CHANNELS)]
    callers = Callers([RecommenderServiceStub(one) for one in channels], users, arguments.deadline_ms)
    await asyncio.gather(*(asyncio.wait_for(one.channel_ready(), 10) for one in channels))
    begin, cpu = time.perf_counter(), time.process_time()
    if arguments.per_second:
        await callers.opened(arguments.per_second, arguments.seconds)
    else:
        await callers.closed(arguments.callers, arguments.seconds)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    for one in channels:
        await one.close(None)
    return _summary(callers.counts, seconds, cpu)


def _summary(counts: Counts, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    answered = len(counts.elapsed_ms)
    return {
        "sent": counts.sent,
        "answered": answered,
        "failed": counts.failed,
        "late": counts.late,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "p50_ms": float(np.percentile(counts.elapsed_ms, 50)) if answered else None,
        "p95_ms": float(np.percentile(counts.elapsed_ms, 95)) if answered else None,
        "p99_ms": float(np.percentile(counts.elapsed_ms, 99)) if answered else None,
        "tiers": dict(counts.tiers),
        "errors": dict(counts.errors),
        "recommendation_ids": random.Random(7).sample(counts.recommendation_ids, min(answered, _SAMPLE)),
        "stage_ms": {name: float(np.percentile(values, 50)) for name, values in counts.stage_ms.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__.split("\n")[0])
    parser.add_argument("address")
    parser.add_argument("users", type=Path, help="file of user ids, one a line")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--deadline-ms", type=float, default=250)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--per-second", type=float, default=0, help="requests a second, instead of callers")
    print(json.dumps(uvloop.run(run(parser.parse_args()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
