"""A TCP proxy that makes a connection slow or unreliable, from outside of both ends.

Between a client and a dependency in the fault matrix; runs on the benchmark's own event loop. Invariant: bytes of one
connection keep their order, whatever the mode and however often it changes; a broken connection is reset, not closed.
"""

import asyncio
import random
import socket
import struct
from collections import deque
from enum import StrEnum
from typing import cast

from devstack.ports import LOOPBACK

# A connection that is not refused at once lives at most so long while the line is flaky.
_FLAKY_LIFE_SECONDS = 1.0
_RESET = struct.pack("ii", 1, 0)


class Mode(StrEnum):
    """What the proxy does to the connections through it."""

    CLEAR = "clear"
    SLOW = "slow"
    FLAKY = "flaky"


class FaultProxy:
    """Forwards a loopback port to another.

    SLOW adds `slow_ms` to everything that the dependency answers. FLAKY refuses every second connection (drawn) and
    breaks the others within a second.
    """

    def __init__(self, port: int, upstream_port: int, slow_ms: float = 500, seed: int = 7) -> None:
        self.port, self.upstream_port, self.slow_ms = port, upstream_port, slow_ms
        self.draw = random.Random(seed)
        self.links: set[_Link] = set()
        self._mode = Mode.CLEAR
        self._server: asyncio.Server | None = None

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        if mode is Mode.FLAKY:
            for link in list(self.links):
                link.fate()

    @property
    def delay_seconds(self) -> float:
        return self.slow_ms / 1000 if self._mode is Mode.SLOW else 0.0

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Client(self), LOOPBACK, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in list(self.links):
            link.reset()


class _Link:
    """One client's connection and the one that was made for it."""

    def __init__(self, proxy: FaultProxy, client: asyncio.Transport) -> None:
        self._proxy = proxy
        self.client: asyncio.Transport | None = client
        self.upstream: asyncio.Transport | None = None
        # What the client sent before the way was open.
        self.early: list[bytes] = []
        self._answers: deque[bytes] = deque()
        proxy.links.add(self)

    def fate(self) -> None:
        """Decides how a connection on a flaky line ends."""
        draw = self._proxy.draw
        if draw.random() < 0.5:
            self.reset()
        else:
            asyncio.get_running_loop().call_later(draw.uniform(0, _FLAKY_LIFE_SECONDS), self._break)

    def answer(self, data: bytes) -> None:
        delay = self._proxy.delay_seconds
        if delay or self._answers:
            # One timer for each piece, and each timer passes on the oldest: the order is kept.
            self._answers.append(data)
            asyncio.get_running_loop().call_later(delay, self._pass_on)
        elif self.client is not None:
            self.client.write(data)

    def reset(self) -> None:
        """Breaks both sides off, without a goodbye."""
        self._proxy.links.discard(self)
        for transport in (self.client, self.upstream):
            if transport is not None and not transport.is_closing():
                raw = transport.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                transport.abort()
        self.client = self.upstream = None

    def _pass_on(self) -> None:
        if self._answers and self.client is not None:
            self.client.write(self._answers.popleft())

    def _break(self) -> None:
        if self._proxy.mode is Mode.FLAKY:
            self.reset()


class _Client(asyncio.Protocol):
    """The side that connected to us."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._link = _Link(self._proxy, cast(asyncio.Transport, transport))
        self._connecting = asyncio.ensure_future(self._connect())
        if self._proxy.mode is Mode.FLAKY:
            self._link.fate()

    def data_received(self, data: bytes) -> None:
        if self._link.upstream is not None:
            self._link.upstream.write(data)
        else:
            self._link.early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._link.reset()

    async def _connect(self) -> None:
        link = self._link
        try:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(lambda: _Upstream(link), LOOPBACK, self._proxy.upstream_port)
        except OSError:
            link.reset()
            return
        if link.client is None:
            transport.abort()
            return
        link.upstream = transport
        for data in link.early:
            transport.write(data)
        link.early.clear()


class _Upstream(asyncio.Protocol):
    """The side of the dependency."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def data_received(self, data: bytes) -> None:
        self._link.answer(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._link.reset()
