"""ML-1M as click prediction: `python -m benchmarks.click_prediction [--data FOLDER] [--json]`.

AutoInt's protocol: ratings above 3 are clicks, below 3 are none, 3 is left out; random 8:1:1. The ranker's own network,
with vectors of users and items that it learns beside its weights. It checks the network's code and claims nothing of
serving: a random split lets the future into training. Figures: benchmarks/click_prediction.md. Invariant: the epoch is
chosen, and the calibration fitted, on the validation part; the test part is read once.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, dropout

from benchmarks.command import Command, data_folder
from benchmarks.evaluate import event_log
from core.settings import load_settings
from features.catalog import Catalog
from features.stores.event_log import EventLog
from features.vectors import CANDIDATE_FEATURES, USER_FEATURES
from offline.training.ranker_quality import auc
from ranker.calibration import expected_calibration_error, fit_platt
from ranker.model import CLICK, RankerBatch, RankerConfig, RankerModel

_DIMENSION = 32
_ATTRIBUTES = ("gender", "age_group", "occupation", "zip")
_BATCH, _EPOCHS = 4096, 5
_RATE, _DECAY, _VECTOR_DECAY, _VECTOR_DROPOUT = 5e-3, 1e-3, 1e-1, 0.2


class Rows(NamedTuple):
    """Rows of users and items, and whether it was a click; [n] each."""

    users: Tensor
    items: Tensor
    clicks: Tensor

    def take(self, at: Tensor) -> "Rows":
        return Rows(self.users[at], self.items[at], self.clicks[at])


@dataclass(frozen=True)
class Figures:
    """Of the test part, after calibration on the validation part."""

    auc: float
    ece: float
    validation_auc: float
    rows: int
    epochs: int
    parameters: int
    seconds: float


class _Items(NamedTuple):
    """Tables of the network."""

    vectors: Tensor
    categories: Tensor


class Predictor(nn.Module):
    """The ranker's network for one candidate a row, with learnt vectors in place of the towers'."""

    def __init__(self, attributes: npt.NDArray[np.int64], categories: npt.NDArray[np.int32]) -> None:
        super().__init__()
        self.ranker = RankerModel(RankerConfig(_DIMENSION, dropout=0.2))
        self.attributes = torch.from_numpy(attributes)
        self.categories = torch.cat([torch.zeros(1, 4, dtype=torch.int32), torch.from_numpy(categories)])
        self.users = _embedding(len(attributes))
        self.items = _embedding(len(categories) + 1)
        self.parts = nn.ModuleList(_embedding(int(column.max()) + 1) for column in attributes.T)

    def forward(self, rows: Rows) -> Tensor:
        """Logits [n]."""
        own = self.attributes[rows.users]
        users = self.users(rows.users) + sum(part(own[:, at]) for at, part in enumerate(self.parts))
        count, nothing = len(users), torch.zeros
        batch = RankerBatch(
            dropout(users, _VECTOR_DROPOUT, self.training),
            torch.ones(count, 1),
            torch.full((count, 1), -1),
            nothing(count, 1),
            nothing(count, 1),
            nothing(count, len(USER_FEATURES)),
            rows.items[:, None],
            nothing(count, 1, len(CANDIDATE_FEATURES)),
        )
        tables = _Items(dropout(self.items.weight, _VECTOR_DROPOUT, self.training), self.categories)
        logits: Tensor = self.ranker(batch, tables)[:, 0, CLICK]
        return logits


def _embedding(count: int) -> nn.Embedding:
    made = nn.Embedding(count, _DIMENSION)
    nn.init.normal_(made.weight, std=0.05)
    return made


def main() -> int:
    command = Command("click_prediction", __doc__, "a tenth of the rows, three epochs")
    command.add("--dataset", default="ml-1m", help="ml-1m, or a folder of its files")
    command.add("--seed", type=int, default=7)
    command.add_data()
    return command.run(_measure, print_result, asdict)


def _measure(given: argparse.Namespace, work: Path) -> Figures:
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    log = event_log(data_folder(given.dataset, given.data), work)
    return measure(EventLog(log), given.seed, quick=given.quick)


def print_result(figures: Figures, console: Console) -> None:
    table = Table("what", "value")
    for name, value in asdict(figures).items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)


def measure(log: EventLog, seed: int, *, quick: bool) -> Figures:
    started = time.monotonic()
    model, rows = _read(log)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows.clicks)))
    if quick:
        order = order[: len(order) // 10]
    tenth = len(order) // 10
    train, validation, test = order[2 * tenth :], rows.take(order[:tenth]), rows.take(order[tenth : 2 * tenth])
    epochs = _fit(model, rows.take(train), validation, 3 if quick else _EPOCHS)
    (fit, labels), (logits, answers) = (_predict(model, part) for part in (validation, test))
    return Figures(
        auc(logits, answers),
        expected_calibration_error(fit_platt(fit, labels)(logits), answers),
        auc(fit, labels),
        len(order),
        epochs,
        sum(parameter.numel() for parameter in model.parameters()),
        time.monotonic() - started,
    )


def _fit(model: Predictor, train: Rows, validation: Rows, epochs: int) -> int:
    """Keeps the epoch of the best validation AUC; returns its number."""
    vectors = [weight for name, weight in model.named_parameters() if not name.startswith("ranker")]
    groups = [
        {"params": list(model.ranker.parameters()), "weight_decay": _DECAY},
        {"params": vectors, "weight_decay": _VECTOR_DECAY},
    ]
    optimiser = torch.optim.AdamW(groups, _RATE)
    steps = epochs * -(-len(train.clicks) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps, pct_start=0.2)
    best, kept, state = 0.0, 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, epochs + 1):
        model.train()
        for at in _batches(torch.randperm(len(train.clicks))):
            batch = train.take(at)
            optimiser.zero_grad()
            torch.autograd.backward(binary_cross_entropy_with_logits(model(batch), batch.clicks))
            optimiser.step()
            schedule.step()
        found = auc(*_predict(model, validation))
        print(f"epoch {epoch}: validation AUC {found:.4f}", file=sys.stderr)
        if found > best:
            best, kept, state = found, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return kept


def _predict(model: Predictor, rows: Rows) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Logits and clicks."""
    model.eval()
    with torch.inference_mode():
        parts = [model(rows.take(at)) for at in _batches(torch.arange(len(rows.clicks)))]
    return torch.cat(parts).numpy(), rows.clicks.numpy()


def _batches(order: Tensor) -> Iterator[Tensor]:
    return (order[start : start + _BATCH] for start in range(0, len(order), _BATCH))


def _read(log: EventLog) -> tuple[Predictor, Rows]:
    catalog = Catalog.of_items(log.items(), load_settings().features)
    people = list(log.users())
    row_of = {user.user_id: row for row, user in enumerate(people)}
    columns = [np.unique([user.labels[name] for user in people], return_inverse=True)[1] for name in _ATTRIBUTES]
    events = log.events(columns=["user_id", "item_id", "event_time", "value"])
    events = events.filter(pc.not_equal(events["value"], 3.0))
    rows = Rows(
        torch.tensor([row_of[user_id] for user_id in events["user_id"].to_pylist()]),
        torch.from_numpy(catalog.rows(events["item_id"].to_pylist()).astype(np.int64)),
        torch.from_numpy((events["value"].to_numpy() > 3).astype(np.float32)),
    )
    return Predictor(np.stack(columns, 1), catalog.column("categories")), rows


if __name__ == "__main__":
    sys.exit(main())
