"""The embedded Kafka broker: librdkafka's mock cluster in a process of its own (`python -m devstack.kafka_broker`).

For the demo, tests and first steps; it keeps the newest 5 MiB or 100k messages of a partition in memory and forgets
everything when it ends. Invariant: each start is another log (offsets begin at 0), so each start announces a fresh
`log_id`, and rows that carry offsets of an older log are recognised.
"""

import argparse
import json
import os
import signal
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from core.errors import StageError
from devstack.mock_cluster import start_mock_cluster
from devstack.processes import ProcessSpec, python_module, tcp_problem

# The mock has this many partitions per topic, always.
PARTITIONS = 4
# The mock lets a fetch wait its time out although data has come, so this is the latency of a quiet topic.
FETCH_WAIT_MAX_MS = 5
# Short: it lets a worker that comes back after a kill wait out the session of the dead one.
SESSION_TIMEOUT_MS = 4000


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a started broker tells: where it is and which log it has."""

    bootstrap_servers: str
    log_id: str
    pid: int


def run_broker(announce: Path | None) -> None:
    """Runs a broker until SIGTERM or SIGINT. Announces it as one JSON line, in the file `announce` or on stdout."""
    signals = {signal.SIGTERM, signal.SIGINT}
    # Before librdkafka starts its threads: they inherit the mask, and the signal waits for us.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    address, _cluster = start_mock_cluster()
    line = json.dumps(asdict(Announcement(address, uuid.uuid4().hex, os.getpid())))
    if announce is None:
        print(line, flush=True)
    else:
        part = announce.with_name(f"{announce.name}.part")
        part.write_text(f"{line}\n", "utf-8")
        part.replace(announce)
    signal.sigwait(signals)


def read_announcement(announce: Path) -> Announcement | None:
    """What the broker announced last, or nothing."""
    try:
        return Announcement(**json.loads(announce.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def broker_spec(folder: Path) -> tuple[ProcessSpec, Path]:
    """The process, and the file in which it announces itself."""
    folder.mkdir(parents=True, exist_ok=True)
    announce = folder / "announcement.json"
    announce.unlink(missing_ok=True)

    def problem() -> str | None:
        announced = read_announcement(announce)
        if announced is None:
            return "the broker has not announced itself yet"
        return tcp_problem(int(announced.bootstrap_servers.rpartition(":")[2]))

    command = python_module("devstack.kafka_broker", "--announce", str(announce))
    return ProcessSpec("kafka", command, check=problem, start_timeout_seconds=30), announce


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m devstack.kafka_broker", description="embedded Kafka broker")
    parser.add_argument("--announce", type=Path, help="file for the announcement (default: a line on stdout)")
    try:
        run_broker(parser.parse_args().announce)
    except StageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
