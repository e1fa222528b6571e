"""Requests that nobody should send: `python -m benchmarks.request_fuzz [--requests N] [--seed S] [--quick] [--json]`.

Every field of every request of the front door, filled with what is odd: nothing, too much, the wrong sign, no
number, no text, the far past. On a whole stack, 32 at once. Figures: benchmarks/request_fuzz.md. Invariant: exit code 0
only when every answer was OK, INVALID_ARGUMENT or RESOURCE_EXHAUSTED (NOT_FOUND for a replay), and the process lived.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from benchmarks.serve_world import QUICK, make_shop
from core.grpc_runtime import channel
from devstack.stack import Stack
from headrace.v1 import ingest_service_pb2 as ingest
from headrace.v1 import recommender_service_pb2 as pb
from headrace.v1.ingest_service_pb2_grpc import IngestServiceStub
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub

_AT_ONCE = 32
_REQUESTS, _QUICK_REQUESTS = 50_000, 2000
_ALLOWED = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
_TEXTS = (
    "",
    "a",
    "ada",
    "\0",
    "a\0b",
    "é" * 64,
    "u" * 128,
    "u" * 129,
    "x" * 5000,
    "item-1",
    "../../etc",
    "😀",
    " ",
    "\n",
)
_INTEGERS = (0, 1, -1, 20, 500, 501, 2**31 - 1, -(2**31))
_LONGS = (*_INTEGERS, 2**63 - 1, -(2**63), 1_780_000_000)
_NUMBERS = (0.0, 1.0, -1.0, 0.5, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), 1e-320)
_SIZES = (0, 0, 1, 1, 2, 5, 30)
_MANY = 11_000
# Kinds of requests and how often each comes.
_SHARES = {
    "Recommend": 70,
    "RecommendBatch": 6,
    "Explain": 8,
    "ReplayRecommendation": 4,
    "SendEvents": 8,
    "SendFeedback": 4,
}


class Odd:
    """Fills messages with odd values; the same seed gives the same messages."""

    def __init__(self, seed: int, users: Sequence[str], items: Sequence[str]) -> None:
        self._draw = random.Random(seed)
        self._known = [*users[:50], *items[:50]]

    def message(self, message: Message, depth: int = 0) -> Message:
        # Most fields stay as they are: a request that is wrong everywhere shows only its first mistake.
        share = self._draw.choice((0.05, 0.2, 0.6)) if depth == 0 else 0.6
        for field in message.DESCRIPTOR.fields:
            if self._draw.random() < share and depth < 4:
                self._fill(message, field, depth)
        return message

    def _fill(self, message: Message, field: Any, depth: int) -> None:
        values = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(self._draw.choice(_SIZES)):
                key, value = field.message_type.fields
                if value.message_type is None:
                    values[self._value(key)] = self._value(value)
        elif field.is_repeated:
            if field.message_type is None and depth < 2 and self._draw.random() < 0.02:
                # Past every limit, but not past what a message may weigh.
                values.extend([self._value(field)] * _MANY)
            else:
                for _ in range(self._draw.choice(_SIZES)):
                    if field.message_type is None:
                        values.append(self._value(field))
                    else:
                        self.message(values.add(), depth + 1)
        elif field.message_type is not None:
            self.message(values, depth + 1)
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: Any) -> Any:
        kind, draw = field.cpp_type, self._draw
        if kind == FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return draw.randbytes(draw.choice((0, 1, 300)))
            return draw.choice(self._known) if draw.random() < 0.4 else draw.choice(_TEXTS)
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return draw.choice(_NUMBERS)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return draw.random() < 0.5
        if kind in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_UINT32):
            return draw.choice((0, 1, 2**32 - 1))
        if kind == FieldDescriptor.CPPTYPE_INT64:
            return draw.choice(_LONGS)
        return draw.choice(_INTEGERS)


def request_of(kind: str, odd: Odd, users: Sequence[str], items: Sequence[str], draw: random.Random) -> Message:
    """A sound request of a kind, made odd."""
    user_id, item_id = draw.choice(users), draw.choice(items)
    if kind == "Recommend":
        return odd.message(pb.RecommendRequest(user_id=user_id))
    if kind == "RecommendBatch":
        batch = pb.RecommendBatchRequest(
            requests=[pb.RecommendRequest(user_id=one) for one in draw.sample(list(users), 3)]
        )
        for entry in batch.requests:
            odd.message(entry)
        return odd.message(batch) if draw.random() < 0.2 else batch
    if kind == "Explain":
        return odd.message(pb.ExplainRequest(request=pb.RecommendRequest(user_id=user_id), item_id=item_id))
    if kind == "ReplayRecommendation":
        return odd.message(pb.ReplayRecommendationRequest(recommendation_id="r", user_id=user_id))
    if kind == "SendEvents":
        return odd.message(ingest.SendEventsRequest())
    return odd.message(ingest.SendFeedbackRequest())


async def fuzz(address: str, users: Sequence[str], items: Sequence[str], count: int, seed: int) -> Counter[str]:
    """Sends `count` requests; how often each kind got each status."""
    outcomes: Counter[str] = Counter()
    draw, odd = random.Random(seed), Odd(seed, users, items)
    async with channel(address) as connection:
        recommender, ingesting = RecommenderServiceStub(connection), IngestServiceStub(connection)
        left = iter(range(count))

        async def caller() -> None:
            for _ in left:
                kind = draw.choices(list(_SHARES), list(_SHARES.values()))[0]
                request = request_of(kind, odd, users, items, draw)
                method: Any = getattr(ingesting if kind.startswith("Send") else recommender, kind)
                try:
                    answer = await method(request, timeout=30)
                except grpc.aio.AioRpcError as error:
                    outcomes[f"{kind} {error.code().name}"] += 1
                    continue
                outcomes[f"{kind} OK"] += 1
                if kind == "Recommend" and not answer.items:
                    outcomes["empty answers"] += not _asks_for_nothing(request)

        await asyncio.gather(*(caller() for _ in range(_AT_ONCE)))
    return outcomes


def _asks_for_nothing(request: Any) -> bool:
    """Whether the request's own filter or score may leave no item at all."""
    return bool(request.filter.ByteSize() or request.HasField("min_score") or request.context.HasField("as_of_time"))


def bad(outcomes: Counter[str]) -> dict[str, int]:
    """Outcomes that should not be."""
    found = {}
    for name, count in outcomes.items():
        kind, _, status = name.partition(" ")
        if status not in _ALLOWED and (kind, status) != ("ReplayRecommendation", "NOT_FOUND") and count:
            found[name] = count
    return found


def run(home: Path, count: int, seed: int) -> dict[str, Any]:
    shop = make_shop(home, QUICK, _say)
    items = [item.item_id for item in shop.bundle.items()]
    with Stack(home, bundles=home / "bundles", fresh=True) as stack:
        shop.fill(stack.settings)
        pid = stack.pid("serving")
        asyncio.run(fuzz(stack.address("serving"), shop.users, items, min(500, count), seed + 1))
        before = _memory_mb(pid)
        begin = time.monotonic()
        _say(f"{count:,} requests")
        outcomes = asyncio.run(fuzz(stack.address("serving"), shop.users, items, count, seed))
        seconds = time.monotonic() - begin
        return {
            "requests": count,
            "seed": seed,
            "outcomes": dict(sorted(outcomes.items())),
            "bad": bad(outcomes),
            "restarted": stack.pid("serving") != pid,
            "memory_before_mb": before,
            "memory_after_mb": _memory_mb(pid),
            "seconds": round(seconds, 1),
            "load_average": round(os.getloadavg()[0], 1),
        }


def _memory_mb(pid: int) -> float:
    process = psutil.Process(pid)
    rss: int = sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    return round(rss / 1e6, 1)


def _say(text: str) -> None:
    print(f"{'fuzz':>10}  {text}", file=sys.stderr, flush=True)


def main() -> int:
    command = Command("request_fuzz", __doc__, f"{_QUICK_REQUESTS:,} requests")
    command.add("--requests", type=int, default=_REQUESTS)
    command.add("--seed", type=int, default=7)
    command.add_work()
    return command.run(
        lambda given, work: run(work, _QUICK_REQUESTS if given.quick else given.requests, given.seed),
        print_result,
        is_good=lambda result: not (result["bad"] or result["restarted"]),
    )


def print_result(result: Mapping[str, Any], console: Console) -> None:
    table = Table("what", "figure", title="Odd requests", title_justify="left")
    for name, value in result.items():
        table.add_row(name, json.dumps(value))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
