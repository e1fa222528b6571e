"""How well the towers retrieve, beside published tables: `python -m benchmarks.retrieval_quality --dataset NAME`.

Leave-one-out, full ranking, items that the user had left out; a large tower and the one that serves (distilled from
it), by the trainer and the model that `headrace train` uses. Figures and protocol: benchmarks/retrieval_quality.md.
Invariant: epochs are chosen by validation; the test is looked at once, when a training is over.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command, data_folder
from benchmarks.leave_one_out import LeaveOneOut, read_gsasrec, read_s3rec
from candidate.encoder import UserEncoder, encode_items
from candidate.history import Floats
from candidate.towers import Towers, load_towers, save_towers
from core.errors import ConfigError
from core.settings import Settings, load_settings
from core.telemetry import configure_logging
from offline.baselines import Baseline, Markov, Popularity
from offline.training.distil import Ensemble
from offline.training.towers import TrainedTowers, fit_teacher, fit_towers
from offline.training.validation import Quality, StepsEncoder, ranks_of_scores, target_ranks

_FILES = {"ml-1m-gsasrec": "ml-1m-gsasrec", "amazon-beauty": "amazon-beauty/Beauty.txt"}
_LARGE, _SERVING = "large", "serving"
# Large towers together, which the serving one learns from; and that before it learnt from the validation items, too.
_TEACHERS, _VALIDATED = "teachers", "validated"
# Long, dense histories; and short, sparse ones.
_DENSE: dict[str, dict[str, Any]] = {
    "features": {"history_length": 50},
    "offline": {
        "dimension": 128,
        "blocks": 1,
        "heads": 2,
        "dropout": 0.2,
        "teacher_blocks": 2,
        "teacher_history_length": 200,
        "teacher_dropout": 0.3,
        "teachers": 2,
        "teacher_share": 0.5,
        "learning_rate": 1.5e-3,
        "batch_size": 128,
        "max_epochs": 10,
        "patience_epochs": 10,
        "refit_epochs": 2,
    },
}
_SPARSE: dict[str, dict[str, Any]] = {
    "features": {"history_length": 50},
    "offline": {
        "dimension": 128,
        "blocks": 1,
        "heads": 2,
        "dropout": 0.5,
        "teacher_blocks": 0,
        "learning_rate": 2e-3,
        "batch_size": 128,
        "max_epochs": 14,
        "patience_epochs": 6,
        "refit_epochs": 4,
    },
}
_SPEED_SECONDS = 3.0


@dataclass(frozen=True)
class Measured:
    """A tower on the test."""

    ndcg_at_10: float
    hr_at_10: float
    # Of the items that chose the epoch; a refit has learnt them, and says nothing by it.
    validation_ndcg_at_10: float
    # Of one core.
    users_per_second: float
    users_per_second_single: float


def main() -> int:
    command = Command("retrieval_quality", __doc__, "one seed, one epoch on a tenth of the users")
    command.add("--dataset", choices=sorted(_FILES), help="a data set in --data")
    command.add("--format", choices=["s3rec", "gsasrec"], help="form of the file or folder that --path names")
    command.add("--path", type=Path, help="data of your own")
    command.add("--seeds", type=int, default=3, help="trainings, seeds 0, 1, ...")
    command.add("--seed", type=int, help="one training, of this seed")
    command.add("--checkpoint", type=Path, help="a --work of before: test its towers, train nothing")
    command.add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    command.add("--threads", type=int, help="of torch, while training; else all cores")
    command.add_data()
    command.add_work()
    return command.run(lambda given, work: run(given, given.checkpoint or work), print_result)


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    data, overrides = _data(arguments)
    seeds = [arguments.seed] if arguments.seed is not None else list(range(arguments.seeds))
    if arguments.quick:
        data, seeds = data.part(10), seeds[:1]
        overrides = {**overrides, "offline": {**overrides["offline"], "max_epochs": 1}}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    for seed in seeds:
        settings = load_settings(overrides={**overrides, "offline": {**overrides["offline"], "seed": seed}})
        configure_logging(settings.telemetry, "benchmarks")
        # Teachers are shared: a seed learns from its own large tower and the next ones.
        learns_from = [(seed + more) % max(arguments.seeds, seed + 1) for more in range(settings.offline.teachers)]
        learns_from = list(dict.fromkeys(learns_from)) if settings.offline.teacher_blocks else []
        folder, large = work / f"seed-{seed}", [work / f"seed-{teacher}" / _LARGE for teacher in learns_from]
        if not arguments.checkpoint:
            _train(data, settings, folder, large, arguments.device)
        rows.append({"seed": seed, **_judge(data, settings, folder, large)})
    mean = {
        name: {key: statistics.fmean(row[name][key] for row in rows) for key in rows[0][name]}
        for name in (_LARGE, _TEACHERS, _VALIDATED, _SERVING)
        if name in rows[0]
    }
    best = _TEACHERS if _TEACHERS in mean else _SERVING
    return {
        "dataset": arguments.dataset or str(arguments.path),
        "quick": arguments.quick,
        "ndcg_at_10": round(mean[best]["ndcg_at_10"], 4),
        "hr_at_10": round(mean[best]["hr_at_10"], 4),
        "serving_ndcg_share": round(mean[_SERVING]["ndcg_at_10"] / mean[best]["ndcg_at_10"], 4),
        "serving_users_per_second": round(mean[_SERVING]["users_per_second"]),
        "mean": mean,
        "seeds": rows,
        "baselines": {name: asdict(quality) for name, quality in _baselines(data).items()},
    }


def _data(arguments: argparse.Namespace) -> tuple[LeaveOneOut, dict[str, dict[str, Any]]]:
    if (arguments.dataset is None) == (arguments.path is None):
        raise ConfigError("give --dataset NAME, or --format and --path of data of your own")
    if arguments.path is not None:
        if arguments.format is None:
            raise ConfigError("--path needs --format: s3rec for a file, gsasrec for a folder")
        return (read_s3rec if arguments.format == "s3rec" else read_gsasrec)(arguments.path), _SPARSE
    path = data_folder(_FILES[arguments.dataset], arguments.data)
    return (read_s3rec(path), _SPARSE) if path.is_file() else (read_gsasrec(path), _DENSE)


def _train(data: LeaveOneOut, settings: Settings, folder: Path, large: Sequence[Path], device: str) -> None:
    teachers = [_teacher(data, settings, one, device) for one in large]
    if (folder / _SERVING).is_dir():
        return
    started = time.monotonic()
    trained = fit_towers(data.training, settings, folder / "work", device=device, teachers=teachers)
    for name, one in ((_VALIDATED, trained.validated), (_SERVING, trained)):
        if one is not None:
            _save(one, folder / name, time.monotonic() - started)


def _teacher(data: LeaveOneOut, settings: Settings, folder: Path, device: str) -> TrainedTowers:
    """The large tower in `folder`, trained where it is not there yet."""
    if not folder.is_dir():
        seed, started = int(folder.parent.name.removeprefix("seed-")), time.monotonic()
        work = folder.parent / "work" / _LARGE
        _save(fit_teacher(data.training, settings, work, seed, device=device), folder, time.monotonic() - started)
    towers = load_towers(folder)
    return TrainedTowers(towers, encode_items(towers, data.training.items), {})


def _save(one: TrainedTowers, folder: Path, wall_seconds: float) -> None:
    folder.mkdir(parents=True)
    save_towers(one.towers, folder)
    figures = {**one.metrics, "wall_seconds": round(wall_seconds, 1)}
    (folder / "training.json").write_text(json.dumps(figures) + "\n", "utf-8")


def _judge(data: LeaveOneOut, settings: Settings, folder: Path, large: Sequence[Path]) -> dict[str, Any]:
    found = [name for name in (_LARGE, _VALIDATED, _SERVING) if (folder / name).is_dir()]
    if _SERVING not in found:
        raise ConfigError(f"{folder} holds no trained towers; train with --work {folder.parent} first")
    result: dict[str, Any] = {}
    for name in found:
        training = json.loads((folder / name / "training.json").read_text("utf-8"))
        towers = load_towers(folder / name)
        result[name] = {
            **asdict(_measure(*_alone(towers, data, settings), data)),
            "epochs": training["towers_epochs"],
            "train_seconds": training["towers_seconds"],
        }
    if large:
        towers_together = [load_towers(one) for one in large]
        vectors = [encode_items(one, data.training.items) for one in towers_together]
        together = Ensemble(towers_together, vectors, settings.features)
        result[_TEACHERS] = asdict(_measure(together, together.item_vectors, data))
    return result


def _alone(towers: Towers, data: LeaveOneOut, settings: Settings) -> tuple[UserEncoder, Floats]:
    low = settings.candidate.bfloat16_from_users
    return UserEncoder(towers, settings.features, low), encode_items(towers, data.training.items)


def _measure(encoder: StepsEncoder, vectors: Floats, data: LeaveOneOut) -> Measured:
    steps = data.training.steps
    validated, tested = (
        Quality.of(target_ranks(encoder, vectors, steps, held)) for held in (data.training.held, data.test)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Measured(
            tested.ndcg_at_10,
            tested.hr_at_10,
            validated.ndcg_at_10,
            _users_per_second(encoder, vectors, data, at_once=64),
            _users_per_second(encoder, vectors, data, at_once=1),
        )
    finally:
        torch.set_num_threads(threads)


def _users_per_second(encoder: StepsEncoder, vectors: Floats, data: LeaveOneOut, at_once: int) -> float:
    """Of one core, from steps to vectors, the making of the model's input included."""
    draw = np.random.default_rng(0)
    done, spent = 0, 0.0
    while spent < _SPEED_SECONDS:
        users = draw.integers(len(data.test.target), size=at_once)
        begin, end = data.test.begin[users], data.test.end[users]
        started = time.process_time()
        encoder.encode_steps(data.training.steps, begin, end, vectors)
        spent += time.process_time() - started
        done += at_once
    return round(done / spent, 1)


def _baselines(data: LeaveOneOut) -> dict[str, Quality]:
    """Popularity and first-order Markov of what may be trained on."""
    steps, test = data.training.steps, data.test
    count = len(data.training.items)
    baselines: list[Baseline] = [Popularity(count), Markov(count)]
    result = {}
    for baseline in baselines:
        for user, (start, end) in enumerate(zip(steps.starts[:-1], data.training.ends, strict=True)):
            for at in range(start, end):
                baseline.observe(str(user), int(steps.rows[at]), int(steps.times_ms[at]))
        ranks = []
        for user in range(len(test.target)):
            # Somebody new who has just had the user's last item: nothing follows nothing, no count of a pair changes.
            baseline.observe(f"test-{user}", int(steps.rows[test.end[user] - 1]), 0)
            scores = baseline.scores(f"test-{user}", 0).astype(np.float32)
            part = slice(user, user + 1)
            ranks.append(
                ranks_of_scores(scores[None], steps, test.begin[part], test.end[part], steps.rows[test.target[part]])
            )
        result[baseline.name] = Quality.of(np.concatenate(ranks))
    return result


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['dataset']}: test, mean of {len(result['seeds'])} seeds")
    for column in ("", "NDCG@10", "HR@10", "validation NDCG@10", "users/s a core", "one by one", "train s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, quality in result["baselines"].items():
        table.add_row(name, f"{quality['ndcg_at_10']:.4f}", f"{quality['hr_at_10']:.4f}", "", "", "", "")
    for name, mean in result["mean"].items():
        table.add_row(
            f"{name} tower",
            f"{mean['ndcg_at_10']:.4f}",
            f"{mean['hr_at_10']:.4f}",
            f"{mean['validation_ndcg_at_10']:.4f}",
            f"{mean['users_per_second']:,.0f}",
            f"{mean['users_per_second_single']:,.0f}",
            f"{mean['train_seconds']:,.0f}" if "train_seconds" in mean else "",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
