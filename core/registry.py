"""What a registry of bundles says beside CURRENT: which versions are loaded as well, and which one is tried in shadow.

    <registry>/ROLES   JSON: {"experiments": [...], "shadow": "...", "shadow_share": 0.1}

`headrace release` writes it, the ranker follows it. Invariant: the file is replaced in one step; a version that it
names was whole when it was named.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from core.bundle import (
    MANIFEST,
    Manifest,
    ReleaseBundle,
    current_version,
    open_bundle,
    promote_version,
    staging_folder,
    versions,
)
from core.errors import ArtifactError, ConfigError

ROLES = "ROLES"


@dataclass(frozen=True)
class Roles:
    """Versions that are loaded beside the current one."""

    # May be asked for by name.
    experiments: tuple[str, ...] = ()
    # Scores a share of the traffic, for its metrics alone. Empty = none.
    shadow: str = ""
    shadow_share: float = 0.0

    def named(self) -> tuple[str, ...]:
        return (*self.experiments, self.shadow) if self.shadow else self.experiments


@dataclass(frozen=True)
class Entry:
    """One bundle of a registry, as `headrace release list` shows it."""

    version: str
    # current, shadow, experiment, or nothing.
    role: str
    # None where it cannot be read; `problem` then says why.
    manifest: Manifest | None
    problem: str = ""


def read_roles(registry: Path) -> Roles:
    """Raises ArtifactError where the file is there and is none."""
    try:
        raw = json.loads((registry / ROLES).read_text("utf-8"))
        roles = Roles(tuple(map(str, raw["experiments"])), str(raw["shadow"]), float(raw["shadow_share"]))
        if not 0 <= roles.shadow_share <= 1:
            raise ValueError("shadow_share is not within 0..1")
    except FileNotFoundError:
        return Roles()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{registry / ROLES} cannot be read ({error}); remove it and name the roles anew"
        ) from error
    return roles


def write_roles(registry: Path, roles: Roles) -> None:
    """Raises ConfigError for a share out of range, ArtifactError for a version that is not there or not whole."""
    if not 0 <= roles.shadow_share <= 1:
        raise ConfigError(f"the share of traffic must be within 0..1, not {roles.shadow_share}")
    for version in roles.named():
        _known(registry, version)
        open_bundle(registry / version)
    temporary = registry / f".{ROLES}-{os.getpid()}"
    temporary.write_text(json.dumps(asdict(roles)) + "\n", "utf-8")
    temporary.replace(registry / ROLES)


def install(registry: Path, source: Path, *, promote: bool = False) -> ReleaseBundle:
    """Copies a bundle that was made elsewhere into the registry.

    Args:
        registry: where bundles live.
        source: the bundle's folder.
        promote: make it CURRENT.

    Raises:
        ArtifactError: it is not whole, before or after the copy, or the registry has one of that name.
    """
    version = open_bundle(source).version
    target = registry / version
    if target.exists():
        raise ArtifactError(f"bundle {version} exists already in {registry}; bundles never change")
    staged = staging_folder(registry, version)
    try:
        shutil.copytree(source, staged, dirs_exist_ok=True)
        open_bundle(staged)
        staged.rename(target)
    except (OSError, ArtifactError):
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if promote:
        promote_version(registry, version)
    return open_bundle(target)


def promote(registry: Path, version: str) -> ReleaseBundle:
    """Makes a whole version CURRENT. Raises ArtifactError where it is not there or not whole."""
    _known(registry, version)
    bundle = open_bundle(registry / version)
    promote_version(registry, version)
    return bundle


def entries(registry: Path) -> list[Entry]:
    """All bundles, oldest first by name, each looked at whole."""
    try:
        current = current_version(registry)
    except ArtifactError:
        current = ""
    roles = read_roles(registry)
    found = []
    for version in versions(registry):
        named = (("current", version == current), ("shadow", version == roles.shadow))
        role = ", ".join([name for name, has in (*named, ("experiment", version in roles.experiments)) if has])
        try:
            found.append(Entry(version, role, open_bundle(registry / version).manifest))
        except ArtifactError as error:
            found.append(Entry(version, role, None, str(error)))
    return found


def _known(registry: Path, version: str) -> None:
    named_well = version and "/" not in version and not version.startswith(".")
    if not named_well or not (registry / version / MANIFEST).is_file():
        known = ", ".join(versions(registry)) or "none"
        raise ArtifactError(f"no bundle {version!r} in {registry}; it holds: {known}")
