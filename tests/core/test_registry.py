"""The registry: promote, roll back, publish from elsewhere, roles; what is not whole is refused."""

from pathlib import Path

import pytest

from core import bundle, registry
from core.bundle import HISTORY, Manifest, publish, staging_folder
from core.errors import ArtifactError, ConfigError
from core.registry import Roles


def make(folder: Path, version: str, *, promote: bool = True) -> Path:
    staged = staging_folder(folder, version)
    (staged / "model.bin").write_bytes(version.encode() * 100)
    manifest = Manifest(
        bundle_version=version,
        embedding_version="e",
        index_version="i",
        model_version="m",
        feature_signature="s",
        created_time_ms=0,
        data_watermark_ms=0,
        dimension=1,
        item_count=0,
    )
    return publish(folder, staged, manifest, promote=promote).path


def corrupt(path: Path) -> None:
    (path / "model.bin").write_bytes(b"x")


def test_a_rollback_goes_back_one_by_one(tmp_path: Path) -> None:
    for version in ("v1", "v2", "v3"):
        make(tmp_path, version)
    assert bundle.roll_back(tmp_path) == "v2"
    assert bundle.current_version(tmp_path) == "v2"
    assert bundle.roll_back(tmp_path) == "v1"
    with pytest.raises(ArtifactError, match="served before v1"):
        bundle.roll_back(tmp_path)
    assert bundle.current_version(tmp_path) == "v1"


def test_a_rollback_passes_over_what_is_gone(tmp_path: Path) -> None:
    for version in ("v1", "v2", "v3"):
        path = make(tmp_path, version)
        if version == "v2":
            gone = path
    (gone / bundle.MANIFEST).unlink()
    assert bundle.roll_back(tmp_path) == "v1"


def test_a_promotion_that_was_cut_off_can_be_rolled_back(tmp_path: Path) -> None:
    make(tmp_path, "v1")
    history = (tmp_path / HISTORY).read_text()
    make(tmp_path, "v2")
    (tmp_path / HISTORY).write_text(history)
    assert bundle.roll_back(tmp_path) == "v1"


def test_a_registry_from_before_there_was_a_history_has_one(tmp_path: Path) -> None:
    make(tmp_path, "v1")
    (tmp_path / HISTORY).unlink()
    make(tmp_path, "v2")
    assert bundle.roll_back(tmp_path) == "v1"


def test_the_same_version_again_is_one_entry(tmp_path: Path) -> None:
    make(tmp_path, "v1")
    make(tmp_path, "v2")
    bundle.promote_version(tmp_path, "v2")
    assert bundle.served_versions(tmp_path) == ["v1", "v2"]


def test_what_is_published_from_elsewhere_is_the_same_bundle(tmp_path: Path) -> None:
    source = make(tmp_path / "there", "v1")
    made = registry.install(tmp_path / "here", source, promote=True)
    assert made.manifest == bundle.open_bundle(source).manifest
    assert bundle.current_version(tmp_path / "here") == "v1"
    with pytest.raises(ArtifactError, match="never change"):
        registry.install(tmp_path / "here", source)


def test_what_is_not_whole_is_neither_published_nor_promoted(tmp_path: Path) -> None:
    source = make(tmp_path / "there", "v1")
    corrupt(source)
    with pytest.raises(ArtifactError, match="corrupt"):
        registry.install(tmp_path / "here", source)
    assert bundle.versions(tmp_path / "here") == []
    make(tmp_path, "v1")
    corrupt(make(tmp_path, "v2", promote=False))
    with pytest.raises(ArtifactError, match="corrupt"):
        registry.promote(tmp_path, "v2")
    assert bundle.current_version(tmp_path) == "v1"


@pytest.mark.parametrize("version", ["v9", "", "../v1", ".building-v1"])
def test_a_version_that_is_not_there_is_refused(tmp_path: Path, version: str) -> None:
    make(tmp_path, "v1")
    with pytest.raises(ArtifactError, match="it holds: v1"):
        registry.promote(tmp_path, version)


def test_roles_are_read_as_written(tmp_path: Path) -> None:
    assert registry.read_roles(tmp_path) == Roles()
    for version in ("v1", "v2", "v3"):
        make(tmp_path, version, promote=version == "v1")
    roles = Roles(("v2",), "v3", 0.25)
    registry.write_roles(tmp_path, roles)
    assert registry.read_roles(tmp_path) == roles
    assert [entry.role for entry in registry.entries(tmp_path)] == ["current", "experiment", "shadow"]


def test_roles_of_what_is_not_there_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "v1")
    with pytest.raises(ArtifactError, match="it holds: v1"):
        registry.write_roles(tmp_path, Roles(("v9",)))
    with pytest.raises(ConfigError, match="within"):
        registry.write_roles(tmp_path, Roles((), "v1", 1.5))
    (tmp_path / registry.ROLES).write_text("{")
    with pytest.raises(ArtifactError, match="name the roles anew"):
        registry.read_roles(tmp_path)


def test_the_list_says_what_is_wrong(tmp_path: Path) -> None:
    make(tmp_path, "v1")
    corrupt(make(tmp_path, "v2", promote=False))
    whole, broken = registry.entries(tmp_path)
    assert (whole.problem, whole.role) == ("", "current")
    assert broken.manifest is None
    assert "corrupt" in broken.problem
