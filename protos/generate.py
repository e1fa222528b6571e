"""Regenerates the stubs of `headrace.v1`, beside the protos or into another folder (the test compares).

Not part of any process. Invariant: the committed stubs are exactly what this writes.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Writes `headrace/v1/*_pb2*.py[i]` below `out`."""
    files = sorted(p.relative_to(PROTOS).as_posix() for p in PROTOS.glob("headrace/v1/*.proto"))
    services = [name for name in files if name.endswith("_service.proto")]
    common = ["protoc", f"-I{PROTOS}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    bin_dir = Path(sys.executable).parent
    messages = [f"--plugin={bin_dir / 'protoc-gen-mypy'}", f"--python_out={out}", f"--mypy_out=quiet:{out}"]
    grpc = [
        f"--plugin={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--grpc_python_out={out}",
        f"--mypy_grpc_out=quiet:{out}",
    ]
    for arguments in (common + messages + files, common + grpc + services):
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed: see the lines above")


if __name__ == "__main__":
    generate(PROTOS)
