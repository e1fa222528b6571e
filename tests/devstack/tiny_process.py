"""A real process in miniature, for the supervisor's tests: an admin port, and ways to end badly."""

import argparse
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    problem = ""

    def do_GET(self) -> None:
        problem = self.problem if self.path == "/ready" else ""
        self.send_response(503 if problem else 200)
        self.end_headers()
        self.wfile.write(f"{problem or 'ready'}\n".encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fail", default="")
    parser.add_argument("--problem", default="")
    parser.add_argument("--die-after-seconds", type=float)
    parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--journal", type=Path, help="append one line at each start and clean end")
    parser.add_argument("--name", default="tiny")
    arguments = parser.parse_args()
    if arguments.fail:
        print(arguments.fail, file=sys.stderr)
        return 1
    Handler.problem = arguments.problem
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    note(arguments, "start")
    if arguments.die_after_seconds is not None:
        threading.Event().wait(arguments.die_after_seconds)
        print("tiny: worn out", file=sys.stderr, flush=True)
        os._exit(3)
    if arguments.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.sigwait({signal.SIGTERM})
    note(arguments, "stop")
    return 0


def note(arguments: argparse.Namespace, what: str) -> None:
    if arguments.journal is not None:
        environment = {name: value for name, value in os.environ.items() if name.startswith("HEADRACE_")}
        line = json.dumps({"name": arguments.name, "what": what, "pid": os.getpid(), "env": environment})
        with arguments.journal.open("a") as journal:
            journal.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
