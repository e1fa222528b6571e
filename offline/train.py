"""From an event log to a release bundle: towers, ranker, index, statistics, popularity, batch scores; then publish.

`headrace train` and the demo call `train`. Each step's outputs lie in `<registry>/.training/<key>/`, the key being a
hash of the data, the settings and the formats of the code. Invariant: a run that was cut off goes on after its last
finished step, and the same data and settings never train twice.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from candidate.index import ItemIndex, save_index
from candidate.towers import FORMAT as TOWERS_FORMAT
from candidate.towers import load_towers, save_towers
from core import bundle as names
from core.bundle import Manifest, ReleaseBundle, open_bundle, promote_version, publish, staging_folder, write_delimited
from core.clock import Clock, SystemClock
from core.errors import ArtifactError, ConfigError, RecommenderError
from core.settings import Settings
from features import vectors, windows
from features.stores.erasures import UnerasedLog
from features.stores.event_log import EventLog
from headrace.v1.events_pb2 import Item
from offline.batch_scores import write_batch_scores
from offline.co_visitation import learn_co_visitation
from offline.export import write_form
from offline.logs import log_fingerprint, open_log, read_items
from offline.models import Models, read_item_vectors
from offline.popularity import popularity_lists
from offline.rebuild import PlacedReplay, placed_entries
from offline.reporting import Reporter
from offline.training.ranker import TrainedRanker, train_ranker
from offline.training.towers import TrainedTowers, train_towers
from ranker.forms import ONNX
from ranker.model import LIGHT, MAIN, load_ranker

# Raise it when a step writes something else from the same data and settings.
FORMAT = 4
_WORK = ".training"
_DONE = "done.json"
_TOWERS_FILES = (names.TOWERS, names.TOWERS_CONFIG, names.ITEM_VECTORS)
_RANKER_FILES = (*MAIN, *LIGHT, names.RANKER_PROBE, names.CALIBRATION)


def train(
    log_root: str | Path,
    registry: Path,
    settings: Settings,
    *,
    device: str = "auto",
    before_ms: int | None = None,
    fresh: bool = False,
    promote: bool = True,
    progress: bool = True,
    clock: Clock | None = None,
) -> ReleaseBundle:
    """Makes a release bundle from the events of a log, or finds the one that was made of the same.

    Args:
        log_root: folder or URL of the event log.
        registry: where bundles live.
        settings: of features, candidates and training.
        device: where to train: auto, cpu or cuda.
        before_ms: only events before this time.
        fresh: forget unfinished work and bundles of the same data and settings.
        promote: make the bundle CURRENT.
        progress: say on stderr what is going on.
        clock: tells the time of the bundle's making.

    Raises:
        ConfigError: no log, no events in it, or a registry that cannot be written; says what to do.
    """
    reporter = Reporter(shown=progress)
    log = open_log(log_root, before_ms)
    key = training_key(log, settings, before_ms)
    found = None if fresh else _finished(registry, key)
    if found is not None:
        reporter.say(f"bundle {found.version} was made of the same data and settings; --fresh trains again")
        if promote:
            promote_version(registry, found.version)
        return found
    work = registry / _WORK / key
    with _only_one(work, fresh=fresh):
        run = _Run(log, settings, work, device, before_ms, reporter)
        towers, towers_metrics = run.towers()
        ranker, ranker_metrics = run.ranker(towers)
        release, watermark_ms = run.release(towers)
        now_ms = (clock or SystemClock()).now_ms()
        version = f"{datetime.fromtimestamp(now_ms / 1000, UTC):%Y%m%dT%H%M%S}-{key[:8]}"
        manifest = Manifest(
            bundle_version=version,
            embedding_version=towers.towers.embedding_version,
            index_version=_file_version("i", release / names.INDEX),
            model_version=ranker.model.config.model_version,
            feature_signature=vectors.SIGNATURE,
            created_time_ms=now_ms,
            data_watermark_ms=watermark_ms,
            dimension=towers.item_vectors.shape[1],
            item_count=len(run.items),
            metrics={**towers_metrics, **ranker_metrics},
        )
        staged = staging_folder(registry, version)
        for file in release.iterdir():
            shutil.copy2(file, staged / file.name)
        made = publish(registry, staged, manifest, promote=promote)
    shutil.rmtree(work, ignore_errors=True)
    reporter.say(f"bundle {made.version} {'is current' if promote else 'is published, not promoted'}")
    return made


def training_key(log: EventLog, settings: Settings, before_ms: int | None) -> str:
    """Hash of all that a bundle is made of: data, settings, formats."""
    digest = hashlib.blake2b(digest_size=16)
    sections = (
        settings.features,
        settings.offline,
        settings.serving.blend_weights,
        settings.candidate.exact_max_items,
        settings.candidate.co_visitation,
    )
    dumped = [part.model_dump(mode="json") if hasattr(part, "model_dump") else part for part in sections]
    versions = (FORMAT, names.FORMAT, TOWERS_FORMAT, windows.ENCODING, vectors.SIGNATURE)
    digest.update(json.dumps([versions, dumped], sort_keys=True).encode())
    digest.update(log_fingerprint(log, before_ms).encode())
    return digest.hexdigest()


class _Run:
    """The steps of one training, each done once."""

    def __init__(
        self, log: UnerasedLog, settings: Settings, work: Path, device: str, before_ms: int | None, reporter: Reporter
    ) -> None:
        self._log, self._settings, self._work = log, settings, work
        self._device, self._before_ms, self._reporter = device, before_ms, reporter
        self.items: list[Item] = read_items(log)
        self._how: dict[str, Any] = {"device": device, "before_ms": before_ms, "progress": reporter.shown}

    def towers(self) -> tuple[TrainedTowers, dict[str, float]]:
        folder, metrics = self._begin("towers")
        # For the ranker's training, which must not meet towers that know its questions' answers.
        validated = folder / "validated"
        if metrics is None:
            trained = train_towers(self._log, self.items, self._settings, folder, **self._how)
            if trained.validated is not None:
                validated.mkdir(exist_ok=True)
                save_towers(trained.validated.towers, validated)
                save_file({"vectors": trained.validated.item_vectors}, validated / names.ITEM_VECTORS)
            metrics = self._end(folder, trained.metrics)
            return trained, metrics
        earlier = None
        if validated.is_dir():
            earlier = TrainedTowers(load_towers(validated), read_item_vectors(validated), metrics)
        return TrainedTowers(load_towers(folder), read_item_vectors(folder), metrics, validated=earlier), metrics

    def ranker(self, towers: TrainedTowers) -> tuple[TrainedRanker, dict[str, float]]:
        folder, metrics = self._begin("ranker")
        if metrics is None:
            trained = train_ranker(self._log, self.items, towers, self._settings, folder, **self._how)
            metrics = self._end(folder, {f"ranker_{name}": value for name, value in trained.metrics.items()})
            return trained, metrics
        return TrainedRanker(load_ranker(folder), metrics), metrics

    def release(self, towers: TrainedTowers) -> tuple[Path, int]:
        """Puts all files of the bundle into one folder; returns it and the data's watermark."""
        self._reporter.say("index, statistics, co-visitation, popularity, batch scores")
        folder = self._work / "release"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for step, files in (("towers", _TOWERS_FILES), ("ranker", _RANKER_FILES)):
            for name in files:
                shutil.copy2(self._work / step / name, folder / name)
        rows = np.arange(len(towers.item_vectors))
        index = ItemIndex.build(
            towers.item_vectors, rows, self._settings.candidate.exact_max_items, towers.towers.embedding_version
        )
        save_index(index, folder / names.INDEX)
        # Apart by source partition, as the stream counts them: what it broadcasts replaces these sums.
        replay = PlacedReplay(self.items, self._settings.features)
        replay.place(placed_entries(self._log, self._before_ms))
        now_ms = replay.watermark_ms
        write_delimited(folder / names.ITEMS, self.items)
        known = {item.item_id for item in self.items}
        write_delimited(folder / names.ITEM_STATS, (s for s in replay.placed_stats() if s.item_id in known))
        learn_co_visitation(self._log, self._settings, now_ms, self._before_ms).save(folder)
        self._export(folder)
        _write_json(folder / names.POPULARITY, popularity_lists(replay, now_ms, self._settings))
        _write_json(folder / names.BLEND, {"weights": self._settings.serving.blend_weights})
        _write_json(folder / names.RULES, {})
        models = Models.load(folder, replay.catalog, self._settings, self._device)
        parts = self._work / "batch_scores"
        target = folder / names.BATCH_SCORES
        write_batch_scores(models, replay.catalog, replay.states, now_ms, parts, target, self._reporter)
        return folder, now_ms

    def _export(self, folder: Path) -> None:
        """The form that the ranker computes fastest on a CPU, where its exporter is installed and it does not drift."""
        try:
            write_form(folder, ONNX, self._settings)
        except RecommenderError as error:
            self._reporter.say(f"no ONNX form, torch will serve: {error}")

    def _begin(self, step: str) -> tuple[Path, dict[str, float] | None]:
        """The step's folder, and its metrics where it was finished before."""
        folder = self._work / step
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / _DONE
        if done.is_file():
            self._reporter.say(f"{step}: finished before, reused")
            return folder, json.loads(done.read_text("utf-8"))
        self._reporter.say(f"{step}: training on {len(self.items):,} items")
        return folder, None

    def _end(self, folder: Path, metrics: dict[str, float]) -> dict[str, float]:
        plain = {name: float(value) for name, value in metrics.items()}
        unfinished = folder / f".{_DONE}.tmp"
        _write_json(unfinished, plain)
        unfinished.replace(folder / _DONE)
        return plain


def _finished(registry: Path, key: str) -> ReleaseBundle | None:
    """The newest sound bundle of this key."""
    for version in reversed(names.versions(registry)):
        if version.endswith(f"-{key[:8]}"):
            try:
                found = open_bundle(registry / version)
                # Sound files of a network that this version no longer has are no use.
                load_towers(found.path)
                load_ranker(found.path)
            except ArtifactError:
                continue
            return found
    return None


@contextmanager
def _only_one(work: Path, *, fresh: bool) -> Iterator[None]:
    """The work folder for this process alone. The lock goes with the process, however it ends."""
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(work.parent / f"{work.name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise ConfigError(f"registry.path {work.parent.parent} is not writable: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another `headrace train` works on the same data in {work}; wait for it to end") from error
    else:
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        yield
    finally:
        os.close(lock)


def _file_version(prefix: str, path: Path) -> str:
    return prefix + hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True) + "\n", "utf-8")
