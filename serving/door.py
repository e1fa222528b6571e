"""How long a request waits at the door: the process asks its own server, again and again, and looks at the clock.

Beside the requests, for `serving.load`. Between a request's arrival and its handler lie the server's queue, the
poller's thread and several turns of the event loop, none of which the loop's own lateness shows. Invariant: a question
that is still under way counts with the time that it has waited by now, so a door that is stuck is seen at once.
"""

import asyncio
from contextlib import suppress

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.clock import Clock
from core.grpc_runtime import channel

_PAUSE_SECONDS = 0.05
_PATIENCE_SECONDS = 5.0
# Hosts that mean "every address of this machine".
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}  # noqa: S104 - asked, not listened on


class Door:
    """What a question to this very server takes, there and back."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last_ms = 0.0
        self._asked_at: float | None = None

    @property
    def wait_ms(self) -> float:
        """The last question's time, or that of the one under way where it is longer already."""
        under_way = 0.0 if self._asked_at is None else (self._clock.monotonic() - self._asked_at) * 1000
        return max(self._last_ms, under_way)

    async def watch(self, host: str, port: int) -> None:
        """Asks until cancelled."""
        async with channel(f"{_EVERYWHERE.get(host, host)}:{port}") as connection:
            check = health_pb2_grpc.HealthStub(connection).Check
            while True:
                self._asked_at = asked_at = self._clock.monotonic()
                with suppress(grpc.aio.AioRpcError):
                    await check(health_pb2.HealthCheckRequest(), timeout=_PATIENCE_SECONDS)
                self._last_ms = (self._clock.monotonic() - asked_at) * 1000
                self._asked_at = None
                await asyncio.sleep(_PAUSE_SECONDS)
