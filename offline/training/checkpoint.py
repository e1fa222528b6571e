"""Checkpoints of a training: weights, their average, the best, optimiser and progress in one safetensors file.

Invariant: one file, replaced by one rename, so a training that is killed goes on from a whole epoch.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.telemetry import get_logger

_log = get_logger("training")


@dataclass
class Progress:
    """How far a training is."""

    # Hash of data and settings: a checkpoint of others is not gone on from.
    fingerprint: str
    epoch: int = 0
    steps: int = 0
    best_epoch: int = 0
    best_score: float = -1.0
    finished: bool = False
    seconds: float = 0.0
    # One entry per epoch.
    curve: list[dict[str, float]] = field(default_factory=list)


class Checkpoint:
    """One training's file. `best` holds the best weights so far."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self.progress = Progress(fingerprint)
        self.best: dict[str, Tensor] = {}

    def keep_best(self, weights: dict[str, Tensor]) -> None:
        self.best = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}

    def save(self, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"model.{name}": tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        tensors |= {f"average.{name}": tensor.cpu() for name, tensor in average.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value.detach().cpu() for key, value in values.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"progress": json.dumps(asdict(self.progress))})
        temporary.replace(self._path)

    def resume(self, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> bool:
        """Takes up an earlier run of the same data and settings; False where there is none.

        The weights of `average` are overwritten in place.
        """
        try:
            with safe_open(self._path, framework="pt") as file:
                progress = Progress(**json.loads(file.metadata()["progress"]))
                if progress.fingerprint != self.progress.fingerprint:
                    return False
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except FileNotFoundError:
            return False
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            _log.warning("checkpoint cannot be read, starting anew", path=str(self._path), error=str(error)[:200])
            return False
        model.load_state_dict(_below("model.", tensors))
        for name, tensor in _below("average.", tensors).items():
            average[name].copy_(tensor)
        self.best = _below("best.", tensors)
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.progress = progress
        return True


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
