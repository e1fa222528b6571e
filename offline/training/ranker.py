"""Trains the ranker on the questions of an event log, calibrates it, and says how much better its order is.

A log gives questions (ranker_questions), these get candidates and features (ranker_rows), the network is fitted to them
(ranker_fit) and measured (ranker_quality). A light scorer learns from it, for lists that it has no time for; with
`offline.ranker_student`, first a smaller ranker does, to serve in its place (ranker_distil). The newest part of the
log, by event time, is held out. Invariant: the same log, towers, settings and seed give the same model; nothing at or
after `before_ms` is read, and no training label reaches into the held-out time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from candidate.encoder import UserEncoder
from core.errors import ConfigError
from core.settings import Settings
from core.telemetry import get_logger
from features.catalog import Catalog, Rows
from features.stores.event_log import EventLog
from headrace.v1.events_pb2 import Item
from offline.replay import Entry, read_entries
from offline.reporting import Reporter
from offline.training.ranker_candidates import CandidateSources
from offline.training.ranker_distil import LIGHT_SHAPE, STUDENT_SHAPE, TEACHER_SHAPE, without_tastes
from offline.training.ranker_fit import Split, Trainer
from offline.training.ranker_quality import calibrate, order
from offline.training.ranker_questions import Question, questions_of
from offline.training.ranker_rows import Row, RowMaker
from offline.training.tastes import tastes_of
from offline.training.towers import TrainedTowers
from ranker.calibration import save_calibration
from ranker.model import CLICK, LIGHT, RankerConfig, RankerModel, save_ranker
from ranker.probe import MAX_LISTS, Probe, save_probe
from ranker.scorer import Scorer

_log = get_logger("training")

HELD_OUT_LISTS, SERVED_LISTS = 2000, 400
# Of what the towers held out, the newest part is held out here too.
HELD_OUT_SHARE, LEAST_LISTS = 0.3, 300


Thing = TypeVar("Thing")


@dataclass
class TrainedRanker:
    """What training gives."""

    model: RankerModel
    metrics: dict[str, float]
    # What cuts its lists where time is short.
    light: RankerModel | None = None
    # The larger one that it learnt from, if any.
    teacher: RankerModel | None = None


def train_ranker(
    log: EventLog,
    items: Sequence[Item],
    towers: TrainedTowers,
    settings: Settings,
    work: Path,
    *,
    device: str = "auto",
    before_ms: int | None = None,
    progress: bool = True,
) -> TrainedRanker:
    """Trains the ranker and writes it, its light scorer and its calibration into `work`.

    Args:
        log: events and, where there are any, impressions.
        items: the catalogue, in the order of the item vectors.
        towers: the trained towers; their vectors are inputs of the ranker and bring its negatives. Those as validated,
            where there are such: towers that have learnt the answers make vectors that are too good.
        settings: `offline` for the training, `features` and `candidate` for what is computed and retrieved.
        work: folder for RANKER, RANKER_LIGHT, their configurations and CALIBRATION.
        device: cpu, cuda, or auto for CUDA where there is one.
        before_ms: events at or after this time are not looked at.
        progress: show progress bars on the terminal.

    Raises:
        ConfigError: the log holds no question that could be learned from.
    """
    started = time.monotonic()
    reporter = Reporter(shown=progress)
    torch.manual_seed(settings.offline.seed)
    towers = towers.validated or towers
    entries = list(read_entries(log, end_ms=before_ms))
    rows = _rows(entries, items, towers, settings, reporter)
    if not any((row.labels[:, CLICK] > 0).any() for row in rows.train):
        raise ConfigError(
            f"event log {log.root} has nothing to train a ranker on: it needs events of features.positive_kinds by "
            "users with some history; import more events"
        )
    categories, chosen = _categories(items, settings), _device(device)
    offline = settings.offline
    learnt_ms = _time_at(entries, 1 - offline.validation_share) + 1
    tastes = tastes_of(entries, items, settings.features, learnt_ms, offline.seed)
    make = partial(Trainer, rows, towers.item_vectors, categories, settings, chosen, tastes)
    trainer, teacher = make(TEACHER_SHAPE if offline.ranker_student else RankerConfig), None
    epochs = trainer.run(reporter)
    if offline.ranker_student:
        teacher = trainer.model
        trainer = make(STUDENT_SHAPE, teacher)
        epochs = trainer.run(reporter)
    lighter = make(LIGHT_SHAPE, trainer.model)
    lighter.run(reporter)
    calibration, metrics = calibrate(trainer, rows.held_out, rows.served)
    for name, model in (("teacher_", teacher), ("light_", lighter.model), ("", trainer.model)):
        if model is not None:
            scorer = Scorer(model, towers.item_vectors, categories, calibration, chosen)
            ranked, retrieved = order(scorer, rows.served, towers.item_vectors)
            metrics |= {f"{name}ndcg_at_10": ranked, "retrieval_ndcg_at_10": retrieved}
    # As the towers, which in the end learn from everything.
    newest = torch.from_numpy(tastes_of(entries, items, settings.features, entries[-1].time_ms + 1, offline.seed))
    for model in (trainer.model, teacher):
        if model is not None:
            model.tastes.copy_(newest)
    save_ranker(trainer.model, work)
    light = without_tastes(lighter.model.cpu())
    light.config = replace(light.config, teacher_version=trainer.model.config.model_version)
    save_ranker(light, work, LIGHT)
    save_calibration(calibration, work)
    sample = evenly(rows.served or rows.held_out or rows.train, MAX_LISTS)
    gains = [(row.labels[:, CLICK] > 0).astype(np.float32) for row in sample]
    probe = Probe([row.features for row in sample], [row.user_vector for row in sample], gains)
    save_probe(probe, towers.item_vectors.shape[1], work)
    seconds = time.monotonic() - started
    metrics |= {"rows": float(sum(len(row.labels) for row in rows.train)), "epochs": epochs, "seconds": seconds}
    _log.info("ranker trained", **{name: round(value, 4) for name, value in metrics.items()})
    return TrainedRanker(trainer.model.cpu(), metrics, light, teacher)


def _categories(items: Sequence[Item], settings: Settings) -> Rows:
    """Category numbers of the items, as the catalogue gives them, [n, 4]."""
    return Catalog.of_items(items, settings.features).column("categories")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _rows(
    entries: Sequence[Entry], items: Sequence[Item], towers: TrainedTowers, settings: Settings, reporter: Reporter
) -> Split:
    train, held_out = _split(questions_of(entries, settings), entries, settings)
    served = evenly([question for question in held_out if question.has_click()], SERVED_LISTS)
    parts = ((train, 0), (held_out, 1), (served, 2))
    asked = sorted(((q, part) for part_questions, part in parts for q in part_questions), key=lambda a: a[0].time_ms)
    encoder = UserEncoder(towers.towers.eval(), settings.features)
    maker = RowMaker(entries, items, CandidateSources(encoder, towers.item_vectors, settings), settings)
    with reporter.bar("ranker: features", 2 * len(asked)) as advance:
        made = maker.make([question for question, _ in asked], [part == 2 for _, part in asked], advance)
    found: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for (_, part), row in zip(asked, made, strict=True):
        if row is not None:
            found[part].append(row)
    return Split(*found)


def _split(
    questions: Sequence[Question], entries: Sequence[Entry], settings: Settings
) -> tuple[list[Question], list[Question]]:
    """Questions to train on and to hold out, by time; each thinned evenly to what is allowed.

    To train on: those from the time that the towers held out. On older ones the towers' vectors are better than they
    will ever be in serving, and a ranker that learns from them trusts them too much (on the simulated shop: worse than
    retrieval alone, in spite of seven times the rows). Where the towers left too few, older ones serve all the same.
    """
    share = settings.offline.validation_share
    towers_end_ms, train_end_ms = _time_at(entries, 1 - share), _time_at(entries, 1 - HELD_OUT_SHARE * share)
    # No label may reach into what is held out.
    until_ms = train_end_ms - settings.features.session_gap_seconds * 1000
    train = _informative([q for q in questions if towers_end_ms < q.time_ms < until_ms], settings.offline.seed)
    if sum(question.has_click() for question in train) < LEAST_LISTS:
        train = _informative([q for q in questions if q.time_ms < until_ms], settings.offline.seed)
    held_out = [q for q in questions if q.time_ms > train_end_ms]
    per_list = [len(q.click) + settings.offline.ranker_negatives for q in train]
    budget = int(settings.offline.ranker_max_rows / max(1.0, float(np.mean(per_list)) if per_list else 1.0))
    # Old tastes and old statistics teach less: of a long log the newer part, and of that an even sample.
    return evenly(train[-2 * budget :], budget), evenly(held_out, HELD_OUT_LISTS)


def _time_at(entries: Sequence[Entry], share: float) -> int:
    """Time by which this share of the entries had happened."""
    return entries[max(0, min(len(entries), round(len(entries) * share)) - 1)].time_ms if entries else 0


def _informative(questions: Sequence[Question], seed: int) -> list[Question]:
    """Lists without a click say little: as many of them are kept as there are with one."""
    silent = [index for index, question in enumerate(questions) if question.shown and not question.has_click()]
    drop = max(0, 2 * len(silent) - len(questions))
    dropped = set(np.random.default_rng(seed).permutation(silent)[:drop].tolist())
    return [question for index, question in enumerate(questions) if index not in dropped]


def evenly(things: Sequence[Thing], count: int) -> list[Thing]:
    if len(things) <= count:
        return list(things)
    return [things[int(index)] for index in np.linspace(0, len(things) - 1, count)]
