"""A supervisor in a process of its own, for the tests that end it: prints the pids of its children, then waits."""

import json
import signal
import sys
from pathlib import Path

import psutil

from devstack.processes import ProcessSpec
from devstack.stack import Stack

TINY = Path(__file__).with_name("tiny_process.py")


def main() -> None:
    # Tests may be run under nohup, which hands down that the signal is ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    home, ports = Path(sys.argv[1]), sys.argv[2:]
    specs = [
        ProcessSpec(
            f"tiny-{port}",
            (sys.executable, str(TINY), "--port", port, "--journal", str(home / "journal"), "--name", port),
            admin_port=int(port),
            depends_on=("redis", "kafka"),
            wave=1,
        )
        for port in ports
    ]
    with Stack(home, processes=specs, say=lambda _name, _text: None) as stack:
        pids = {name: stack.pid(name) for name in stack.names}
        assert sorted(pids.values()) == sorted(child.pid for child in psutil.Process().children(recursive=True))
        print(json.dumps(pids), flush=True)
        stack.wait()


if __name__ == "__main__":
    main()
