"""`headrace release`: what it prints, and what it leaves behind."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from core import bundle, registry
from core.bundle import Manifest, publish, staging_folder
from devstack.cli import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for version in ("v1", "v2", "v3"):
        staged = staging_folder(tmp_path, version)
        (staged / "model.bin").write_bytes(version.encode())
        manifest = Manifest(version, "e", "i", "m", "s", 0, 0, 1, 0)
        publish(tmp_path, staged, manifest, promote=version != "v3")
    return tmp_path


def run(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["release", *words, "--registry", str(folder)])


def test_list_shows_roles_and_faults(folder: Path) -> None:
    (folder / "v3" / "model.bin").write_bytes(b"")
    result = run(folder, "list", "--json")
    assert result.exit_code == 0, result.output
    found = {entry["version"]: entry for entry in json.loads(result.output)}
    assert found["v2"]["role"] == "current"
    assert "corrupt" in found["v3"]["problem"]
    assert "v1" in run(folder, "list").output


def test_promote_and_rollback(folder: Path) -> None:
    assert run(folder, "promote", "v3").exit_code == 0
    assert bundle.current_version(folder) == "v3"
    assert "v2 is current again" in run(folder, "rollback").output
    assert bundle.current_version(folder) == "v2"


def test_a_bundle_that_is_not_whole_is_one_line(folder: Path) -> None:
    (folder / "v3" / "model.bin").write_bytes(b"")
    result = run(folder, "promote", "v3")
    assert result.exit_code == 1
    assert "corrupt" in result.output
    assert bundle.current_version(folder) == "v2"


def test_publish_copies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    assert run(other, "publish", str(folder / "v1"), "--promote").exit_code == 0
    assert bundle.open_current(other).version == "v1"


def test_experiments_and_shadow(folder: Path) -> None:
    assert run(folder, "experiment", "v1").exit_code == 0
    assert run(folder, "shadow", "v3", "--share", "0.2").exit_code == 0
    assert registry.read_roles(folder) == registry.Roles(("v1",), "v3", 0.2)
    assert run(folder, "shadow").exit_code == 0
    assert run(folder, "experiment").exit_code == 0
    assert registry.read_roles(folder) == registry.Roles()
