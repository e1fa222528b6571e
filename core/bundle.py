"""Release bundles: one folder that holds one version of everything that must agree.

    <registry>/CURRENT                 the version that serves
    <registry>/HISTORY                 the versions that served, newest last (see core/registry.py)
    <registry>/<version>/manifest.json versions, signature, checksums, metrics
    <registry>/<version>/<files>       see NAMES below

Written by offline, loaded whole or refused by candidate, ranker and serving. Invariant: a folder with a manifest is
complete (the manifest is written last, the folder appears by one rename), and CURRENT is replaced in one step.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from core.errors import ArtifactError, ConfigError
from core.pace import paced
from headrace.v1.events_pb2 import Item, ItemStats

FORMAT = 1
MANIFEST = "manifest.json"
CURRENT = "CURRENT"
HISTORY = "HISTORY"
_HISTORY_MAX = 100
MAX_RECORD_BYTES = 4 * 1024 * 1024

# Files of a bundle, by what they are.
ITEMS = "items.binpb"  # headrace.v1.Item, length-delimited
ITEM_STATS = "item_stats.binpb"  # headrace.v1.ItemStats, length-delimited
ITEM_VECTORS = "item_vectors.safetensors"  # `vectors` float32 [n, d], rows in the order of ITEMS
VECTORS_VERSION = "embedding_version"  # in that file's metadata: of the towers that made them
TOWERS = "towers.safetensors"
TOWERS_CONFIG = "towers.json"
INDEX = "index.faiss"
CO_VISITATION = "co_visitation.safetensors"  # pairs of items, and beside them what they are of
CO_VISITATION_FACTS = "co_visitation.json"
RANKER = "ranker.safetensors"
RANKER_CONFIG = "ranker.json"
RANKER_LIGHT = "ranker_light.safetensors"  # cuts the list where the ranker has too little time for all of it; optional
RANKER_LIGHT_CONFIG = "ranker_light.json"
RANKER_LIGHT_ONNX = "ranker_light.onnx"
RANKER_PROBE = "ranker_probe.safetensors"  # real inputs: to check forms, and to compare live ones with
RANKER_ONNX = "ranker.onnx"  # other forms of RANKER, all optional
RANKER_INT8 = "ranker.int8.onnx"
RANKER_FORM = "ranker_form.txt"  # the form that serves where the settings leave it open
CALIBRATION = "calibration.json"
BLEND = "blend.json"
POPULARITY = "popularity.json"
RULES = "rules.json"
BATCH_SCORES = "batch_scores.parquet"  # user_id, item_ids, scores: written to the online store, not served from here


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself."""

    bundle_version: str
    embedding_version: str
    index_version: str
    model_version: str
    feature_signature: str
    created_time_ms: int
    # Newest event time that went into it.
    data_watermark_ms: int
    dimension: int
    item_count: int
    # name -> {"sha256": ..., "bytes": ...}
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    # "topic/partition" -> offset: from where replicas follow the compacted topics, and of which log.
    follow_offsets: dict[str, int] = field(default_factory=dict)
    log_id: str = ""
    format: int = FORMAT


@dataclass(frozen=True)
class ReleaseBundle:
    """A bundle on local disk, its checksums verified."""

    path: Path
    manifest: Manifest

    @property
    def version(self) -> str:
        return self.manifest.bundle_version

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files; ArtifactError where the bundle has none of that name."""
        if name not in self.manifest.files:
            raise ArtifactError(f"bundle {self.version} has no {name}; train a new one with `headrace train`")
        return self.path / name

    def has(self, name: str) -> bool:
        return name in self.manifest.files

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text("utf-8"))

    def items(self) -> Iterator[Item]:
        return paced(read_delimited(self.file(ITEMS), Item))

    def item_stats(self) -> Iterator[ItemStats]:
        return paced(read_delimited(self.file(ITEM_STATS), ItemStats))


def open_bundle(path: Path) -> ReleaseBundle:
    """Opens and verifies a bundle.

    Raises:
        ArtifactError: no manifest, another format, a missing or changed file; says which and what to do.
    """
    try:
        raw = json.loads((path / MANIFEST).read_text("utf-8"))
        manifest = Manifest(**raw)
    except FileNotFoundError as error:
        raise ArtifactError(f"no bundle at {path}; make one with `headrace train`") from error
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path / MANIFEST} cannot be read ({error}); train again or roll back") from error
    if manifest.format != FORMAT:
        raise ArtifactError(
            f"bundle {path.name} has format {manifest.format}, this version reads {FORMAT}; train again"
        )
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"bundle {path.name}: {name} is missing; train again or roll back")
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise ArtifactError(f"bundle {path.name}: {name} is corrupt (checksum differs); train again or roll back")
    return ReleaseBundle(path, manifest)


def current_version(registry: Path) -> str:
    """Version that CURRENT names. Raises ArtifactError where there is none."""
    try:
        version = (registry / CURRENT).read_text("utf-8").strip()
    except OSError as error:
        raise ArtifactError(f"no release bundle in {registry}; make one with `headrace train`") from error
    if not version or "/" in version or version.startswith("."):
        raise ArtifactError(f"{registry / CURRENT} names no version; promote one with `headrace release promote`")
    return version


def open_current(registry: Path) -> ReleaseBundle:
    return open_bundle(registry / current_version(registry))


def staging_folder(registry: Path, version: str) -> Path:
    """An empty folder to build a bundle in; `publish` turns it into `<registry>/<version>`."""
    folder = registry / f".building-{version}"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"registry.path {registry} is not writable: {error.strerror}") from error
    return folder


def publish(registry: Path, staged: Path, manifest: Manifest, *, promote: bool = True) -> ReleaseBundle:
    """Adds checksums and the manifest, gives the folder its name, and (by default) makes it CURRENT."""
    files = {
        file.name: {"sha256": _sha256(file), "bytes": file.stat().st_size}
        for file in sorted(staged.iterdir())
        if file.name != MANIFEST
    }
    complete = Manifest(**{**manifest.__dict__, "files": files})
    (staged / MANIFEST).write_text(json.dumps(complete.__dict__, indent=2, sort_keys=True) + "\n", "utf-8")
    target = registry / manifest.bundle_version
    if target.exists():
        raise ArtifactError(f"bundle {manifest.bundle_version} exists already in {registry}; bundles never change")
    staged.rename(target)
    if promote:
        promote_version(registry, manifest.bundle_version)
    return ReleaseBundle(target, complete)


def put_file(folder: Path, name: str, made: Path) -> None:
    """Puts another file of the same meaning into a bundle, with its checksum: for erasure, which no version survives.

    Whoever opens the bundle between the two steps is told that it is corrupt, and tries again.
    """
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["files"][name] = {"sha256": _sha256(made), "bytes": made.stat().st_size}
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", "utf-8")
    made.replace(folder / name)
    unfinished.replace(folder / MANIFEST)


def promote_version(registry: Path, version: str) -> None:
    """Makes a version CURRENT, in one step, and remembers that it was."""
    if not (registry / version / MANIFEST).is_file():
        raise ArtifactError(f"no bundle {version} in {registry}; it holds: {', '.join(versions(registry)) or 'none'}")
    served = served_versions(registry)
    _replace(registry / CURRENT, version)
    if served[-1:] != [version]:
        _replace(registry / HISTORY, "\n".join([*served, version][-_HISTORY_MAX:]))


def roll_back(registry: Path) -> str:
    """Makes the version CURRENT that served before the one that serves, and returns it.

    Raises:
        ArtifactError: none served before, or none that is still there.
    """
    current, served = current_version(registry), served_versions(registry)
    # What follows CURRENT in the history is left of a promotion or a rollback that was cut off.
    newest = max(index for index, version in enumerate(served) if version == current)
    before = [
        version for version in served[:newest] if version != current and (registry / version / MANIFEST).is_file()
    ]
    if not before:
        raise ArtifactError(f"no version in {registry} served before {current}; promote one with `headrace release`")
    _replace(registry / CURRENT, before[-1])
    _replace(registry / HISTORY, "\n".join(before))
    return before[-1]


def served_versions(registry: Path) -> list[str]:
    """Versions that were CURRENT, oldest first; the last one is."""
    try:
        served = (registry / HISTORY).read_text("utf-8").split()
    except FileNotFoundError:
        served = []
    try:
        current = current_version(registry)
    except ArtifactError:
        return served
    # Of a registry without a history, or of a promotion that was cut off.
    return served if current in served else [*served, current]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text + "\n", "utf-8")
    temporary.replace(path)


def versions(registry: Path) -> list[str]:
    """Complete bundles, oldest first by name."""
    return sorted(folder.parent.name for folder in registry.glob(f"[!.]*/{MANIFEST}"))


def write_delimited(path: Path, messages: Iterable[Item] | Iterable[ItemStats]) -> int:
    """Writes messages, each after its length (4 bytes, little-endian); returns how many."""
    count = 0
    with path.open("wb") as file:
        for message in messages:
            raw = message.SerializeToString(deterministic=True)
            file.write(len(raw).to_bytes(4, "little") + raw)
            count += 1
    return count


def read_delimited(path: Path, kind: Any) -> Iterator[Any]:
    """Reads what `write_delimited` wrote. Raises ArtifactError at a cut or changed record."""
    with path.open("rb") as file:
        while head := file.read(4):
            size = int.from_bytes(head, "little")
            raw = file.read(size) if size <= MAX_RECORD_BYTES else b""
            try:
                if len(head) < 4 or len(raw) != size:
                    raise DecodeError("cut short")
                yield kind.FromString(raw)
            except DecodeError as error:
                raise ArtifactError(f"{path}: broken record ({error}); train again or roll back") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
