"""Committed generated code is what the generator writes today."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"


def generated_files(root: Path) -> dict[str, str]:
    files = sorted(root.glob("headrace/v1/*_pb2*.py*"))
    return {file.name: file.read_text("utf-8") for file in files}


def test_the_stubs_are_up_to_date(tmp_path) -> None:
    program = "import sys, pathlib, generate; generate.generate(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=PROTOS, check=True)
    fresh, committed = generated_files(tmp_path), generated_files(PROTOS)
    assert sorted(fresh) == sorted(committed)
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, f"run `make protos`: {stale}"
