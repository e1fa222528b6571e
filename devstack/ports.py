"""Ports that belong to the stack from the moment they are picked.

A picked port is held by a socket that is bound but never listens: the kernel gives it to nobody else, while a child
that sets SO_REUSEADDR (all servers here do) can listen on it, again after a restart too. Invariant: a port handed
out stays ours until `close`, or until this process ends, however it ends.
"""

import socket

from core.errors import ConfigError

LOOPBACK = "127.0.0.1"


class Ports:
    """Hands out loopback ports by name and holds them."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}

    def take(self, name: str, port: int = 0) -> int:
        """Reserves `port` (0 = any free one) for the process `name` and returns it.

        Raises:
            ConfigError: another process has that port.
        """
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((LOOPBACK, port))
        except OSError as error:
            held.close()
            raise ConfigError(
                f"port {port} for {name}: {error.strerror}; stop what uses it, or let the stack pick free ports "
                "(leave out --fixed-ports)"
            ) from error
        self._held[f"{name}:{len(self._held)}"] = held
        return int(held.getsockname()[1])

    def close(self) -> None:
        for held in self._held.values():
            held.close()
        self._held.clear()
