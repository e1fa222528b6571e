"""From a click to a changed answer: `python -m benchmarks.click_to_change [--quick] [--json]`. Needs KAFKA_HOME.

Every process on real Kafka and Redis, 200 events a second of other users beside. One user after the other clicks: from
before the produce call until the first answer that knows the click and orders the other items differently, then until
the user's new vector is in the answers too; then clicks over IngestService, whose token the next request brings.
Figures: benchmarks/click_to_change.md. Invariant: nothing is subtracted; the last answer's own time is in each figure.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from benchmarks.plain_load import paced
from benchmarks.serve_world import FULL, QUICK, Shop, make_shop
from core.codec import from_ms
from core.errors import StageError
from devstack.backend import Backend, EventSender
from devstack.click_probe import Click, click_once
from devstack.stack import LOCAL, Stack
from headrace.v1.events_pb2 import Event
from headrace.v1.ingest_service_pb2 import SendEventsRequest
from headrace.v1.ingest_service_pb2_grpc import IngestServiceStub
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub

_TRAFFIC_PER_SECOND = 200
_TRAFFIC_USERS = 2000
_PATIENCE_SECONDS = 5.0
_WARM_UP_CLICKS = 20


@dataclass(frozen=True)
class Plan:
    """How many clicks."""

    clicks: int
    token_clicks: int


PLAN, QUICK_PLAN = Plan(600, 200), Plan(60, 20)


class Measured:
    """The clicks of one run."""

    def __init__(self, stack: Stack, shop: Shop) -> None:
        self._shop = shop
        self._backend = Backend(stack.address("serving"))
        self._sender = EventSender(stack.settings)
        self._channel = grpc.insecure_channel(stack.address("serving"))
        self._ingest = IngestServiceStub(self._channel)
        self._recommender = RecommenderServiceStub(self._channel)
        self._categories = {item.item_id: list(item.categories) for item in shop.bundle.items()}

    def clicks(self, users: Sequence[str]) -> tuple[list[Click], list[float], int, int]:
        """Clicks, times until the new vector, answers that changed by themselves, clicks that nobody saw."""
        clicks, vectors_ms, restless, lost = [], [], 0, 0
        for number, user_id in enumerate(users):
            click, was_restless = click_once(
                self._backend, self._sender, user_id, number % 10, lambda item_id: self._categories[item_id]
            )
            restless += was_restless
            if click is None:
                lost += 1
                continue
            clicks.append(click)
            clicked = time.perf_counter() - click.elapsed_ms / 1000
            vectors_ms.append(self._until_vector(click, clicked))
        return clicks, vectors_ms, restless, lost

    def token_misses(self, users: Sequence[str]) -> int:
        """Clicks over IngestService whose next answer, asked for with the token, did not know them."""
        misses = 0
        for user_id in users:
            before = self._recommender.Recommend(RecommendRequest(user_id=user_id, dry_run=True), timeout=1)
            event = Event(
                event_id=uuid4().hex, user_id=user_id, item_id=before.items[0].item_id, kind="click", surface="home"
            )
            event.event_time.CopyFrom(from_ms(time.time_ns() // 1_000_000))
            sent = self._ingest.SendEvents(SendEventsRequest(events=[event]), timeout=5)
            request = RecommendRequest(user_id=user_id, dry_run=True, tokens=[sent.results[0].token])
            after = self._recommender.Recommend(request, timeout=1)
            misses += after.state_revision <= before.state_revision
        return misses

    def close(self) -> None:
        self._backend.close()
        self._sender.close()
        self._channel.close()

    def _until_vector(self, click: Click, clicked: float) -> float:
        wanted = click.after.state_revision
        while time.perf_counter() - clicked < _PATIENCE_SECONDS:
            answer = self._backend.recommend(click.user_id, dry_run=True)
            if answer is not None and answer.embedding_revision >= wanted:
                break
        return (time.perf_counter() - clicked) * 1000


@contextmanager
def traffic(stack: Stack, shop: Shop) -> Iterator[None]:
    """Events of other users, at a steady rate, on a thread of its own."""
    draw, stopping = random.Random(7), threading.Event()
    items = [(item.item_id, list(item.categories)) for item in shop.bundle.items()]
    sender = EventSender(stack.settings)

    def send(number: int) -> None:
        item_id, categories = items[int(len(items) * draw.random() ** 3)]
        sender.click(f"traffic-{number % _TRAFFIC_USERS}", item_id, categories)

    def run() -> None:
        number = 0
        while not stopping.is_set():
            paced(range(number, number + _TRAFFIC_PER_SECOND), _TRAFFIC_PER_SECOND, send)
            number += _TRAFFIC_PER_SECOND

    thread = threading.Thread(target=run, name="traffic", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        sender.close()


def run(plan: Plan, home: Path, *, quick: bool) -> dict[str, Any]:
    shop = make_shop(home, QUICK if quick else FULL, _say)
    if len(shop.users) < _WARM_UP_CLICKS + plan.clicks:
        raise StageError("users", f"only {len(shop.users)} have a past, {plan.clicks} are needed")
    with Stack(home, kafka=LOCAL, bundles=home / "bundles", fresh=True) as stack:
        shop.fill(stack.settings)
        measured = Measured(stack, shop)
        try:
            with traffic(stack, shop):
                measured.clicks(shop.users[:_WARM_UP_CLICKS])
                _say(f"{plan.clicks} clicks")
                chosen = shop.users[_WARM_UP_CLICKS : _WARM_UP_CLICKS + plan.clicks]
                clicks, vectors_ms, restless, lost = measured.clicks(chosen)
                _say(f"{plan.token_clicks} clicks with a token")
                misses = measured.token_misses(chosen[: plan.token_clicks])
        finally:
            measured.close()
    changed = [click.elapsed_ms for click in clicks if click.changed]
    return {
        "clicks": len(clicks) + lost,
        "clicks_changed": len(changed),
        "clicks_lost": lost,
        "p50_ms": _at(changed, 50),
        "p95_ms": _at(changed, 95),
        "p99_ms": _at(changed, 99),
        "reflected_p50_ms": _at([click.elapsed_ms for click in clicks], 50),
        "reflected_p99_ms": _at([click.elapsed_ms for click in clicks], 99),
        "embedding_p50_ms": _at(vectors_ms, 50),
        "embedding_p99_ms": _at(vectors_ms, 99),
        "changed_without_click": restless,
        "token_clicks": plan.token_clicks,
        "token_misses": misses,
        "background_events_per_second": _TRAFFIC_PER_SECOND,
        "items": shop.bundle.manifest.item_count,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _at(values: Sequence[float], percentile: float) -> float | None:
    return round(float(np.percentile(values, percentile)), 1) if values else None


def _say(text: str) -> None:
    print(f"{'click':>10}  {text}", file=sys.stderr, flush=True)


def main() -> int:
    command = Command("click_to_change", __doc__, "5,000 items and 60 clicks")
    command.add_work()
    return command.run(
        lambda given, work: run(QUICK_PLAN if given.quick else PLAN, work, quick=given.quick), print_result
    )


def print_result(result: Mapping[str, Any], console: Console) -> None:
    table = Table("what", "figure", title="From a click to a changed answer", title_justify="left")
    for name, value in result.items():
        table.add_row(name, str(value))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
