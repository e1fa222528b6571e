import socket

import pytest

from core.errors import ConfigError
from devstack.ports import Ports


def listen(port: int) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


def test_ports_are_distinct_and_a_server_can_listen_on_them_again_and_again(ports: Ports) -> None:
    taken = [ports.take(f"process-{index}") for index in range(20)]
    assert len(set(taken)) == 20
    for _ in range(2):
        with listen(taken[0]), socket.create_connection(("127.0.0.1", taken[0]), 1):
            pass


def test_a_held_port_is_given_to_nobody_else(ports: Ports) -> None:
    port = ports.take("serving")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_a_port_in_use_is_named_with_what_to_do(ports: Ports) -> None:
    with listen(0) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} for serving: .* --fixed-ports"):
            ports.take("serving", port)
