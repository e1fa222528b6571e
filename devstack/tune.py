"""`headrace tune`: blend weights fitted on the newest part of a log, put into a bundle of their own.

The models are those of the bundle that serves; what it was trained on is not used to weigh it: choices are taken from
after its data watermark. Invariant: bundles never change; the tuned one is a new version with the same models.
"""

import json
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from core.bundle import BLEND, MANIFEST, open_current, publish, staging_folder
from core.errors import ConfigError
from core.settings import Settings
from devstack.blend_fit import Choice, fit_weights
from devstack.blend_replay import PARTS, BlendReplay, Plan
from features.catalog import Catalog
from features.stores.event_log import EventLog
from features.stores.event_rows import USERS
from offline.logs import open_log
from offline.models import Models

# Fewer choices say too little of a segment to give it weights of its own, or of anything at all.
_SEGMENT_CHOICES, _LEAST_CHOICES = 500, 50


@dataclass(frozen=True)
class Tuned:
    """What `tune` found."""

    bundle_version: str
    choices: int
    weights: dict[str, float]
    segments: dict[str, dict[str, float]]
    seconds: float


def tune(log_root: str | Path, registry: Path, settings: Settings, *, limit: int = 4000, promote: bool = True) -> Tuned:
    """Fits the weights of the current bundle and publishes it with them.

    Args:
        log_root: folder or URL of the event log; its events after the bundle's data watermark are learnt from.
        registry: where bundles live.
        settings: of features and candidates.
        limit: about so many moments are looked at.
        promote: whether the new version serves from now on.

    Raises:
        ConfigError: too few choices after the bundle's watermark; says what to do.
        ArtifactError: no bundle.
    """
    started = time.monotonic()
    log, bundle = open_log(log_root), open_current(registry)
    items = list(bundle.items())
    catalog = Catalog.of_items(items, settings.features)
    models = Models.load(bundle.path, catalog, settings, "cpu")
    start_ms = bundle.manifest.data_watermark_ms + 1
    moments = log.events(start_ms, columns=["user_id"]).num_rows
    segments = _segments(log)
    replay = BlendReplay(log, items, models, settings)
    choices = [
        Choice(moment.parts, at, segments.get(moment.user_id, ""))
        for moment in replay.moments(Plan(start_ms, every=max(1, moments // limit)))
        if moment.known
        for at in moment.places
    ]
    if len(choices) < _LEAST_CHOICES:
        raise ConfigError(
            f"{len(choices)} choices after the bundle's data, {_LEAST_CHOICES} are needed; train the bundle on an "
            "older part of the log (`headrace train --before TIME`), or wait for more events"
        )
    weights = fit_weights(choices, PARTS)
    by_segment: dict[str, list[Choice]] = defaultdict(list)
    for choice in choices:
        by_segment[choice.segment].append(choice)
    of_segments = {
        name: fit_weights(some, PARTS) for name, some in by_segment.items() if name and len(some) >= _SEGMENT_CHOICES
    }
    version = f"{bundle.version.partition('-tuned')[0]}-tuned{int(time.time())}"
    staged = staging_folder(registry, version)
    for file in bundle.path.iterdir():
        if file.name not in (MANIFEST, BLEND):
            shutil.copy2(file, staged / file.name)
    (staged / BLEND).write_text(json.dumps({"weights": weights, "segments": of_segments}, indent=2), "utf-8")
    publish(registry, staged, replace(bundle.manifest, bundle_version=version), promote=promote)
    return Tuned(version, len(choices), weights, of_segments, time.monotonic() - started)


def _segments(log: EventLog) -> dict[str, str]:
    if not log.files(USERS):
        return {}
    rows = log.states(USERS)
    return dict(zip(rows["user_id"].to_pylist(), rows["segment"].to_pylist(), strict=True))
