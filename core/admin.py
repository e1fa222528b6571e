"""The admin port of every process: `/live`, `/ready` and `/metrics` over HTTP.

The supervisor, Kubernetes and Prometheus ask here. Invariant: `/ready` answers 200 only when every named check
passes, else 503 with one line per check that does not.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

# A check returns why it does not pass, or nothing.
Check = Callable[[], str | None]


class Readiness:
    """Named conditions under which a process may take traffic."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def add(self, name: str, check: Check) -> None:
        self._checks[name] = check

    def problems(self) -> list[str]:
        return [f"{name}: {problem}" for name, check in list(self._checks.items()) if (problem := check())]


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Says nothing: a probe each second is not news."""


class AdminServer:
    """Serves on its own thread until closed. `port` is the real one where 0 was asked for."""

    def __init__(self, host: str, port: int, readiness: Readiness) -> None:
        metrics = make_wsgi_app()

        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                body: Iterable[bytes] = metrics(environ, start_response)
                return body
            status, text = "404 Not Found", "try /live, /ready or /metrics"
            if path == "/live":
                status, text = "200 OK", "live"
            elif path == "/ready":
                problems = readiness.problems()
                status, text = ("503 Service Unavailable", "\n".join(problems)) if problems else ("200 OK", "ready")
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{text}\n".encode()]

        try:
            self._server: WSGIServer = make_server(host, port, app, handler_class=_QuietHandler)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {host}:{port}, for /ready and /metrics") from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="admin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
