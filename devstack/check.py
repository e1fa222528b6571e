"""`headrace check`: tries every dependency out and says, for each that is missing, how to get it.

Invariant: a dependency counts as there only after it did something (imported, answered, ran).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.bundle import open_current
from core.errors import ArtifactError, ConfigError, RecommenderError
from core.kafka import wait_for_kafka
from core.settings import Settings, load_settings
from devstack.kafka_broker import broker_spec
from devstack.kafka_local import kafka_home, local_kafka_problem
from devstack.redis_server import redis_binary, redis_url_problem
from devstack.stack import bundles_below
from devstack.supervisor import Supervisor

DISK_MIN_BYTES = 1_000_000_000
_TIMEOUT_SECONDS = 5


class Verdict(StrEnum):
    """OK, optional and absent, or needed and missing."""

    OK = "ok"
    NOTE = "note"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    name: str
    verdict: Verdict
    found: str


def run_checks(home: Path, config: Path | None = None) -> list[Finding]:
    """Tries everything out, the cheap things first."""
    try:
        settings = load_settings(config)
    except ConfigError as error:
        return [Finding("settings", Verdict.MISSING, str(error))]
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_faiss,
        check_torch,
        lambda: check_redis(os.environ.get("REDIS_URL")),
        check_embedded_kafka,
        lambda: check_local_kafka(kafka_home()),
        lambda: check_disk(home),
        lambda: check_bundle(bundles_below(home, settings)),
    ]
    if os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        checks.insert(5, lambda: check_kafka(settings))
    return [Finding("settings", Verdict.OK, "valid"), *(check() for check in checks)]


def print_findings(findings: list[Finding], console: Console | None = None) -> int:
    """Prints the table; returns the exit code: 1 where something needed is missing."""
    marks = {Verdict.OK: "[green]ok[/]", Verdict.NOTE: "[yellow]note[/]", Verdict.MISSING: "[red]missing[/]"}
    table = Table(box=None, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("is")
    table.add_column("found, or how to get it", overflow="fold")
    for finding in findings:
        table.add_row(finding.name, marks[finding.verdict], Text(finding.found))
    (console or Console()).print(table)
    return int(any(finding.verdict is Verdict.MISSING for finding in findings))


def check_python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding("python", Verdict.OK, found)
    return Finding("python", Verdict.MISSING, f"{found}; Headrace needs 3.11 or 3.12")


def check_faiss() -> Finding:
    there = [name for name in ("faiss-cpu", "faiss-gpu") if _version(name)]
    if len(there) == 2:
        return Finding(
            "faiss",
            Verdict.MISSING,
            "faiss-cpu and faiss-gpu are both installed and overwrite each other; `pip uninstall faiss-cpu faiss-gpu`, "
            "then install one extra: `pip install '.[cpu]'` or `pip install '.[gpu]'`",
        )
    return _imported("faiss", there[0] if there else "faiss-cpu", "import faiss; faiss.IndexFlatIP(2)")


def check_torch() -> Finding:
    code = "import torch; torch.zeros(1); print('CUDA' if torch.cuda.is_available() else 'CPU')"
    return _imported("torch", "torch", code)


def check_redis(url: str | None) -> Finding:
    if url:
        problem = redis_url_problem(url)
        return Finding("redis", Verdict.MISSING if problem else Verdict.OK, problem or "answers (REDIS_URL)")
    try:
        binary = redis_binary()
        said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except ConfigError as error:
        return Finding("redis", Verdict.MISSING, str(error))
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("redis", Verdict.MISSING, f"{binary} does not run ({error}); set REDIS_URL to a Redis of yours")
    found = next((word[2:] for word in said.split() if word.startswith("v=")), "?")
    return Finding("redis", Verdict.OK, f"{found}, embedded ({binary})")


def check_embedded_kafka() -> Finding:
    """Starts the embedded broker and asks it."""
    with tempfile.TemporaryDirectory(prefix="headrace-check-") as folder:
        spec, _ = broker_spec(Path(folder) / "kafka")
        supervisor = Supervisor([spec], Path(folder), say=lambda _name, _text: None)
        try:
            supervisor.start_all(30)
        except RecommenderError as error:
            return Finding(
                "kafka (embedded)", Verdict.MISSING, f"{error}; `pip install --force-reinstall confluent-kafka`"
            )
        finally:
            supervisor.stop_all()
    return Finding(
        "kafka (embedded)", Verdict.OK, f"confluent-kafka {_version('confluent-kafka')}, started and stopped"
    )


def check_kafka(settings: Settings) -> Finding:
    where = settings.kafka.bootstrap_servers
    try:
        wait_for_kafka(settings.kafka, _TIMEOUT_SECONDS)
    except RecommenderError as error:
        return Finding("kafka", Verdict.MISSING, f"{error}; start it, or unset KAFKA_BOOTSTRAP_SERVERS")
    return Finding("kafka", Verdict.OK, f"answers at {where} (KAFKA_BOOTSTRAP_SERVERS)")


def check_local_kafka(home: Path | None) -> Finding:
    """Only for `--kafka local`: absent is a note; named but unusable is an error."""
    problem = local_kafka_problem(home)
    if problem is None:
        return Finding("kafka (local)", Verdict.OK, f"KAFKA_HOME={home}")
    if home is None:
        return Finding("kafka (local)", Verdict.NOTE, f"only for --kafka local: {problem}")
    return Finding("kafka (local)", Verdict.MISSING, problem)


def check_disk(home: Path) -> Finding:
    there = home.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.1f} GB free at {there}"
    if not os.access(there, os.W_OK):
        return Finding("disk", Verdict.MISSING, f"{there} cannot be written to; give another folder with --home")
    if free < DISK_MIN_BYTES:
        return Finding("disk", Verdict.MISSING, f"{text}; at least {DISK_MIN_BYTES / 1e9:.0f} GB are needed")
    return Finding("disk", Verdict.OK, text)


def check_bundle(registry: Path) -> Finding:
    """Absent is a note (training makes the first one), broken is an error."""
    try:
        bundle = open_current(registry)
    except ArtifactError as error:
        absent = not (registry / "CURRENT").exists()
        return Finding("release bundle", Verdict.NOTE if absent else Verdict.MISSING, str(error))
    return Finding("release bundle", Verdict.OK, f"{bundle.version} in {registry}, {bundle.manifest.item_count} items")


def _imported(name: str, package: str, code: str) -> Finding:
    """Imports in a process of its own: a broken binary must not take the check with it."""
    found = _version(package)
    if found is None:
        return Finding(
            name, Verdict.MISSING, "not installed; `pip install '.[cpu]'` (with CUDA: `pip install '.[gpu]'`)"
        )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(name, Verdict.MISSING, f"{package} {found} does not work: {last}; install the extra again")
    return Finding(name, Verdict.OK, " ".join((package, found, done.stdout.strip())).strip())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
