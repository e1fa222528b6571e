"""Plain events for the figures of cost and latency: nothing late, nothing twice, nothing broken.

Pure, but for the pacing: the same arguments give the same events. Invariant: every message is a valid protobuf
`Event`, its user drawn by a Zipf law over `users` (exponent 0 = uniform), its item by Zipf 1 over the catalogue.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from core.codec import from_ms
from headrace.v1.events_pb2 import Event

T = TypeVar("T")
_KINDS = ("view",) * 5 + ("click",) * 3 + ("cart", "purchase")
_CATEGORIES = (20, 50)


@dataclass(frozen=True)
class PlainConfig:
    """What to make."""

    events: int
    users: int
    zipf: float
    items: int = 10_000
    seed: int = 7
    # First part of user ids: loads of different names share no user.
    name: str = "user"


def plain_events(config: PlainConfig, start_ms: int, step_ms: float) -> list[Event]:
    """Events in order of time, `step_ms` apart."""
    draw = random.Random(config.seed)
    users = draw.choices(range(config.users), cum_weights=_zipf(config.users, config.zipf), k=config.events)
    items = draw.choices(range(config.items), cum_weights=_zipf(config.items, 1.0), k=config.events)
    kinds = draw.choices(_KINDS, k=config.events)
    return [
        Event(
            event_id=f"{draw.getrandbits(64):016x}",
            user_id=f"{config.name}-{user}",
            item_id=f"item-{item}",
            kind=kind,
            event_time=from_ms(start_ms + int(number * step_ms)),
            session_id=f"session-{user}",
            categories=[f"category-{size}-{item % size}" for size in _CATEGORIES],
        )
        for number, (user, item, kind) in enumerate(zip(users, items, kinds, strict=True))
    ]


def paced(events: Sequence[T], per_second: float, send: Callable[[T], None]) -> None:
    """Calls `send` for each event at its time; what is late is sent at once."""
    begin = time.perf_counter()
    for number, event in enumerate(events):
        wait = begin + number / per_second - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        send(event)


def _zipf(count: int, exponent: float) -> list[float]:
    return list(accumulate((rank + 1) ** -exponent for rank in range(count)))
