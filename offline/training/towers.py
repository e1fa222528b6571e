"""Trains the user and the item tower on the positive interactions of an event log.

Called by offline/train.py. The newest part of the log, by event time, chooses the epoch to keep (NDCG@10, full
ranking, seen items left out); in the end that part is learnt, too (`offline.refit_epochs`). With
`offline.teacher_blocks`, larger user towers are trained first, and the one that serves learns from them. Invariant:
nothing at or after `before_ms` is read.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from candidate.encoder import encode_items
from candidate.history import kind_names
from candidate.towers import Towers, TowersConfig, save_towers
from core.bundle import ITEM_VECTORS, VECTORS_VERSION
from core.settings import Settings
from core.telemetry import get_logger
from features.stores.event_log import EventLog
from headrace.v1.events_pb2 import Item
from offline.training.distil import Ensemble, TeacherVectors
from offline.training.interactions import Held, hold_out, load_steps
from offline.training.precision import products_precision
from offline.training.trainer import TowersData, TowerTrainer

_log = get_logger("training")

CURVE = "towers_curve.json"
VALIDATION_TARGETS = 2000
# The learning rate of the refit begins at this share of that of the training.
REFIT_RATE_SHARE = 0.3


@dataclass
class TrainedTowers:
    """What training gives. `item_vectors` [n, d] has its rows in the order of the items."""

    towers: Towers
    item_vectors: npt.NDArray[np.float32]
    metrics: dict[str, float]
    # The larger ones that they learnt from, if any.
    teachers: Sequence["TrainedTowers"] = ()
    # They themselves as validated, before they learnt from what was held out, too.
    validated: "TrainedTowers | None" = None


def train_towers(
    log: EventLog,
    items: Sequence[Item],
    settings: Settings,
    work: Path,
    *,
    device: str = "auto",
    before_ms: int | None = None,
    progress: bool = True,
) -> TrainedTowers:
    """Trains both towers and writes them, with the item vectors, into `work`.

    Args:
        log: the events.
        items: the catalogue; rows of the vectors are in its order.
        settings: `offline` for the model and the training, `features` for what counts.
        work: folder for the files; `work/checkpoints` lets a run that was cut short go on.
        device: cpu, cuda, or auto for CUDA where there is one.
        before_ms: events at or after this time are not looked at.
        progress: show a progress bar on the terminal.

    Raises:
        ConfigError: the log holds nothing to train on.
    """
    started = time.monotonic()
    steps = load_steps(log, items, settings.features, before_ms)
    held, train = hold_out(steps, settings.offline.validation_share, VALIDATION_TARGETS, settings.offline.seed)
    in_training = np.zeros(len(steps.rows) + 1, np.int64)
    in_training[train + 1] = 1
    # What is trained on is the older part of each user's steps.
    ends = steps.starts[:-1] + np.diff(np.cumsum(in_training)[steps.starts])
    # What comes into training in the end only has an id part from the start.
    ids = np.unique(steps.rows if settings.offline.refit_epochs else steps.rows[train])
    trained = fit_towers(
        TowersData(items, steps, ends, held, steps.starts[1:], ids), settings, work, device=device, progress=progress
    )
    work.mkdir(parents=True, exist_ok=True)
    save_towers(trained.towers, work)
    whose = {VECTORS_VERSION: trained.towers.embedding_version}
    save_file({"vectors": trained.item_vectors}, work / ITEM_VECTORS, metadata=whose)
    _log.info("towers trained", seconds=round(time.monotonic() - started, 1), **trained.metrics)
    return trained


def fit_towers(
    data: TowersData,
    settings: Settings,
    work: Path,
    *,
    device: str = "auto",
    progress: bool = True,
    teachers: Sequence[TrainedTowers] = (),
) -> TrainedTowers:
    """The same from steps at hand; writes checkpoints and the learning curve into `work`, no towers.

    `teachers` were trained by `fit_teacher` on the same data; where none are given, those of the settings are.
    """
    device = _device(device)
    offline = settings.offline
    if offline.teacher_blocks and not teachers:
        seeds = range(offline.seed, offline.seed + offline.teachers)
        teachers = [
            fit_teacher(data, settings, work / f"teacher-{seed}", seed, device=device, progress=progress)
            for seed in seeds
        ]
    opinions = _opinions(teachers, data, settings, device) if teachers else None
    trainer = TowerTrainer(data, _config(data, settings), settings.features, offline, work, device, opinions)
    towers = trainer.run("towers", progress=progress)
    (work / CURVE).write_text(json.dumps(trainer.checkpoint.progress.curve, indent=1) + "\n", "utf-8")
    validated = TrainedTowers(towers, encode_items(towers, data.items), trainer.metrics(), teachers)
    if not offline.refit_epochs:
        return validated
    return _refitted(validated, data, settings, work / "refit", device, progress, opinions)


def fit_teacher(
    data: TowersData, settings: Settings, work: Path, seed: int, *, device: str = "auto", progress: bool = True
) -> TrainedTowers:
    """Trains a large tower; only its length, its blocks and their dropout differ from those of the one that serves."""
    offline = settings.offline.model_copy(update={"seed": seed})
    large = replace(
        _config(data, settings),
        blocks=offline.teacher_blocks,
        history_length=offline.teacher_history_length,
        dropout=offline.teacher_dropout,
    )
    trainer = TowerTrainer(data, large, settings.features, offline, work, _device(device))
    towers = trainer.run(f"teacher {seed}", progress=progress)
    return TrainedTowers(towers, encode_items(towers, data.items), trainer.metrics())


def _config(data: TowersData, settings: Settings) -> TowersConfig:
    return TowersConfig(
        dimension=settings.offline.dimension,
        blocks=settings.offline.blocks,
        heads=settings.offline.heads,
        history_length=settings.features.history_length,
        kinds=kind_names(settings.features),
        item_ids=tuple(data.items[row].item_id for row in data.ids),
        dropout=settings.offline.dropout,
    )


def _refitted(
    validated: TrainedTowers,
    data: TowersData,
    settings: Settings,
    work: Path,
    device: str,
    progress: bool,
    opinions: TeacherVectors | None,
) -> TrainedTowers:
    """The same towers, gone on with over all steps: what was held out to validate is the newest that there is."""
    offline = settings.offline.model_copy(
        update={
            "max_epochs": settings.offline.refit_epochs,
            "learning_rate": settings.offline.learning_rate * REFIT_RATE_SHARE,
        }
    )
    whole = replace(data, ends=data.refit_ends, held=Held.nothing())
    towers = validated.towers
    trainer = TowerTrainer(whole, towers.config, settings.features, offline, work, device, opinions, towers)
    towers = trainer.run("refit", progress=progress)
    metrics = {**validated.metrics, "towers_refit_seconds": trainer.metrics()["towers_seconds"]}
    return TrainedTowers(towers, encode_items(towers, data.items), metrics, validated.teachers, validated)


def _opinions(teachers: Sequence[TrainedTowers], data: TowersData, settings: Settings, device: str) -> TeacherVectors:
    towers, vectors = [one.towers for one in teachers], [one.item_vectors for one in teachers]
    # The refit asks them of steps that they were not trained on, too.
    ends = np.maximum(data.ends, data.refit_ends) if settings.offline.refit_epochs else data.ends
    return TeacherVectors.of(
        Ensemble(towers, vectors, settings.features),
        data.steps,
        ends,
        data.ids,
        settings.offline.teacher_share,
        device,
        products_precision(device),
    )


def _device(wish: str) -> str:
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wish
