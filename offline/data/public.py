"""Public data sets by name, and how to tell from a folder which one lies in it.

Invariant: a name here is what `headrace import --kind` and `headrace demo --data` take.
"""

from collections.abc import Callable
from pathlib import Path

from core.errors import ConfigError
from offline.data import movielens, trivago
from offline.data.dataset import DatasetSummary, Progress, no_progress
from offline.data.reading import did_you_mean, opened

LOADERS: dict[str, Callable[[Path, Path | str, Progress], DatasetSummary]] = {
    "movielens": movielens.load,
    "trivago": trivago.load,
}


def recognise(path: Path) -> str | None:
    """Which public data set lies in the folder, by the names of its files; None = none of them."""
    if movielens.find(path) is not None:
        return "movielens"
    events = trivago.find(path) if path.is_dir() else None
    if events is None:
        return None
    with opened(events) as file:
        return "trivago" if "action_type" in file.readline() else None


def load(kind: str, path: Path, out: Path | str, progress: Progress = no_progress) -> DatasetSummary:
    """Reads one's own copy of a public data set into the log `out`.

    Raises:
        ConfigError: no such data set, or nothing of it at `path`.
        MalformedEventError: a broken row; names file, line and column.
    """
    if kind not in LOADERS:
        raise ConfigError(f"no data set {kind!r}; there are {', '.join(LOADERS)}")
    if not path.exists():
        names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such folder{did_you_mean(path.name, names) or '; check the path'}")
    return LOADERS[kind](path, out, progress)
