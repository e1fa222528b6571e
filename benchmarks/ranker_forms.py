"""The ranker in cheaper forms: `python -m benchmarks.ranker_forms [--dataset NAME] [--quick] [--json]`.

NDCG@10 of whole retrieved lists of the newest 20% of the events, and the time of a call (500 candidates, a history of
50), of the full network and of what is made of it: a student, the light scorer alone, the cascade of both at half the
full network's time, int8, bf16. Figures: benchmarks/ranker_forms.md. Invariant: all rows order the same lists, and
nothing of the test part is read in training.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from benchmarks.command import Command, data_folder
from benchmarks.evaluate import event_log
from candidate.encoder import UserEncoder
from core import bundle as names
from core.bundle import write_delimited
from core.errors import ArtifactError
from core.settings import Settings, load_settings
from core.telemetry import configure_logging
from features.catalog import Catalog, Floats, Rows
from features.vectors import RankerInput
from headrace.v1.events_pb2 import Item
from offline.data.dataset import split_by_time, times_of
from offline.evaluate import TRAIN_SHARE
from offline.export import FILES, write_form
from offline.logs import open_log, read_items
from offline.ndcg import ndcg
from offline.replay import read_entries
from offline.training.ranker import TrainedRanker, evenly, train_ranker
from offline.training.ranker_candidates import CandidateSources
from offline.training.ranker_questions import questions_of
from offline.training.ranker_rows import Row, RowMaker
from offline.training.towers import TrainedTowers, train_towers
from ranker.calibration import load_calibration
from ranker.forms import BF16, ONNX, ONNX_INT8, Bf16Network, OnnxNetwork
from ranker.model import CLICK, RankerModel, save_ranker
from ranker.scorer import Scorer

CANDIDATES = 500
_CPU = torch.device("cpu")
_QUICK = {"max_epochs": 3, "ranker_epochs": 2, "ranker_max_rows": 30_000, "refit_epochs": 1}
_LISTS, _QUICK_LISTS = 2000, 200
_ROUNDS, _QUICK_ROUNDS, _KEEP_ROUNDS = 400, 100, 60
_TURN = 20
_KEEPS = (250, 200, 175, 150, 125, 100, 75, 50, 25)
TEACHER, STUDENT, LIGHT = "full network (teacher)", "student", "light scorer alone"


class Way(NamedTuple):
    """One way to score lists."""

    scorer: Scorer
    keep: int | None = None

    def scores(self, one: RankerInput, vector: Floats | None) -> Floats:
        return self.scorer.score([one], [vector], self.keep)[0].score


@dataclass(frozen=True)
class Figures:
    """Of one way; times in milliseconds, p50."""

    name: str
    form: str
    ndcg_at_10: float
    # Of the teacher's NDCG, and the standard error of that over the lists.
    share: float
    share_error: float
    # Network, calibration and all else that a call does.
    call_ms: float
    # How many times as fast as the teacher.
    speed: float


def main() -> int:
    command = Command("ranker_forms", __doc__, "short training, few lists")
    command.add("--dataset", default="ml-100k", help="ml-100k, ml-latest-small, or a folder of such files")
    command.add("--seed", type=int, default=7)
    command.add("--lists", type=int, help=f"so many test lists, evenly spread; else {_LISTS}")
    command.add_data()
    command.add_work()
    return command.run(_measure, lambda figures, console: console.print(_table(figures)))


def _measure(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    configure_logging(load_settings().telemetry, "benchmarks")
    folder = data_folder(given.dataset, given.data)
    offline = {"seed": given.seed, "ranker_student": True, **(_QUICK if given.quick else {})}
    settings = load_settings(overrides={"offline": offline})
    log_root = event_log(folder, work)
    _, newer = split_by_time(open_log(log_root).events(columns=["event_time"]), TRAIN_SHARE)
    split_ms = int(times_of(newer)[0])
    older = open_log(log_root, split_ms)
    items = read_items(older)
    how: Mapping[str, Any] = {"device": "cpu", "before_ms": split_ms}
    towers = train_towers(older, items, settings, work / "towers", **how)
    home = work / "ranker"
    home.mkdir(parents=True, exist_ok=True)
    ranker = train_ranker(older, items, towers, settings, home, **how)
    lists = given.lists or (_QUICK_LISTS if given.quick else _LISTS)
    tested = test_lists(log_root, items, towers, settings, split_ms, lists)
    rounds = _QUICK_ROUNDS if given.quick else _ROUNDS
    return {"dataset": folder.name, **measure(ranker, towers.item_vectors, items, tested, settings, home, rounds)}


def test_lists(
    log_root: Path, items: Sequence[Item], towers: TrainedTowers, settings: Settings, split_ms: int, limit: int
) -> list[Row]:
    """Whole retrieved lists of about `limit` moments of the test part at which something new was chosen."""
    entries = list(read_entries(open_log(log_root)))
    asked = [one for one in questions_of(entries, settings) if one.time_ms >= split_ms and one.has_click()]
    questions = evenly(asked, limit)
    sources = CandidateSources(UserEncoder(towers.towers.eval(), settings.features), towers.item_vectors, settings)
    made = RowMaker(entries, items, sources, settings).make(questions, [True] * len(questions), lambda _: None)
    return [row for row in made if row is not None]


def measure(
    ranker: TrainedRanker,
    vectors: Floats,
    items: Sequence[Item],
    tested: Sequence[Row],
    settings: Settings,
    home: Path,
    rounds: int,
) -> dict[str, Any]:
    """The table. `home` is what training wrote: probe and calibration."""
    if ranker.teacher is None or ranker.light is None:
        raise ArtifactError("this training made no teacher; train with offline.ranker_student")
    catalog = Catalog.of_items(items, settings.features)
    maker = _Ways(vectors, catalog.column("categories"), items, settings, home)
    ways, refused = maker.of_teacher(ranker.teacher)
    ways[STUDENT] = Way(maker.exported(ranker.model, "student", ONNX))
    light = maker.scorer(ranker.light)
    light.network = OnnxNetwork(home / "student" / names.RANKER_LIGHT_ONNX, ONNX)
    ways[LIGHT] = Way(light)
    full = ways[TEACHER].scorer
    full.light = light.network
    one, vector = _timed_input(tested)
    half = {f"keep {keep}": Way(full, keep) for keep in _KEEPS}
    took = times_ms({TEACHER: ways[TEACHER], **half}, one, vector, _KEEP_ROUNDS)
    within = [keep for keep in _KEEPS if took[f"keep {keep}"] <= took[TEACHER] / 2]
    keep = within[0] if within else _KEEPS[-1]
    cascade = f"cascade, {keep} kept"
    ways[cascade] = Way(full, keep)
    ways[f"cascade, {settings.ranker.cascade_keep} kept (default)"] = Way(full, settings.ranker.cascade_keep)
    took = times_ms(ways, one, vector, rounds)
    quality = {name: _ndcgs(way, tested) for name, way in ways.items()}
    rows = [_figures(name, way, quality[name], quality[TEACHER], took) for name, way in ways.items()]
    return {
        "lists": len(tested),
        "candidates": CANDIDATES,
        "history": settings.features.history_length,
        "cascade_keep": keep,
        "rows": [asdict(row) for row in rows],
        "refused": refused,
    }


class _Ways:
    """Makes scorers of trained rankers, in the forms that the export gives them."""

    def __init__(
        self, vectors: Floats, categories: Rows, items: Sequence[Item], settings: Settings, home: Path
    ) -> None:
        self._vectors, self._categories, self._items = vectors, categories, items
        self._settings, self._home = settings, home
        self._calibration = load_calibration(home)

    def scorer(self, model: RankerModel) -> Scorer:
        return Scorer(model, self._vectors, self._categories, self._calibration)

    def exported(self, model: RankerModel, name: str, form: str) -> Scorer:
        """Raises ArtifactError where the form drifts too far to be served."""
        folder = self._home / name
        folder.mkdir(exist_ok=True)
        save_ranker(model, folder)
        write_delimited(folder / names.ITEMS, self._items)
        own = (names.RANKER_PROBE, names.RANKER_LIGHT, names.RANKER_LIGHT_CONFIG)
        for file, source in ((names.ITEM_VECTORS, self._home.parent / "towers"), *((one, self._home) for one in own)):
            shutil.copy2(source / file, folder / file)
        write_form(folder, form, self._settings)
        scorer = self.scorer(model)
        scorer.network = Bf16Network(model, _CPU) if form == BF16 else OnnxNetwork(folder / FILES[form], form)
        return scorer

    def of_teacher(self, model: RankerModel) -> tuple[dict[str, Way], dict[str, str]]:
        """The full network in all forms, and why some are refused."""
        ways, refused = {TEACHER: Way(self.exported(model, "teacher", ONNX))}, {}
        for form in (ONNX_INT8, BF16):
            try:
                ways[form] = Way(self.exported(model, "teacher", form))
            except ArtifactError as error:
                refused[form] = str(error)
        return ways, refused


def _timed_input(tested: Sequence[Row]) -> tuple[RankerInput, Floats | None]:
    """A real list, made 500 long, of a user whose history is full."""
    row = max(tested, key=lambda one: (int((one.features.history_rows >= 0).sum()), len(one.labels)))
    places = np.resize(np.arange(len(row.labels)), CANDIDATES)
    features = row.features
    candidates, rows = features.candidates[places], features.candidate_rows[places]
    return replace(features, candidates=candidates, candidate_rows=rows), row.user_vector


def times_ms(ways: Mapping[str, Way], one: RankerInput, vector: Floats | None, rounds: int) -> dict[str, float]:
    """p50 of a call; the ways take turns of some calls each, of which the first find other ways' data in the caches."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(1, rounds // _TURN)):
        for name, way in ways.items():
            took = [_timed(lambda way=way: way.scores(one, vector)) for _ in range(_TURN)]  # type: ignore[misc]
            times[name].extend(took[_TURN // 4 :])
    return {name: float(np.median(taken)) for name, taken in times.items()}


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def _ndcgs(way: Way, tested: Sequence[Row]) -> Floats:
    """NDCG@10 of each list."""
    return np.array(
        [
            ndcg(
                way.scores(row.features, row.user_vector),
                (row.labels[:, CLICK] > 0).astype(np.float32),
                row.missed_count,
            )
            for row in tested
        ],
        np.float32,
    )


def _figures(name: str, way: Way, own: Floats, teacher: Floats, took: Mapping[str, float]) -> Figures:
    whole = float(teacher.mean())
    error = float((own - teacher * (own.mean() / whole)).std() / len(own) ** 0.5 / whole)
    form = way.scorer.network.form
    return Figures(
        name, form, float(own.mean()), float(own.mean()) / whole, error, took[name], took[TEACHER] / took[name]
    )


def _table(figures: Mapping[str, Any]) -> Table:
    table = Table(title=f"{figures['dataset']}: {figures['lists']:,} lists; a call of {CANDIDATES} candidates, p50")
    for name in ("what", "form", "NDCG@10", "of the teacher's", "ms a call", "times as fast"):
        table.add_column(name, justify="left" if name in ("what", "form") else "right")
    for row in figures["rows"]:
        share = f"{row['share']:.1%} ± {row['share_error']:.1%}"
        table.add_row(
            row["name"], row["form"], f"{row['ndcg_at_10']:.4f}", share, f"{row['call_ms']:.3f}", f"{row['speed']:.2f}"
        )
    for form, reason in figures["refused"].items():
        table.add_row(form, "refused", reason)
    return table


if __name__ == "__main__":
    sys.exit(main())
