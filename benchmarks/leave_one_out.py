"""Public sequence data in leave-one-out form: who is predicted what, from what, and what may be trained on.

Read by benchmarks/retrieval_quality.py. Two forms: the gSASRec split (folders train, val and test with `input.txt` and
`output.txt`, one user a line) and the S3-Rec file (a user and the user's items a line, in time order). Invariant: a
user's last item is the test, never trained on and never validated on; items and order are those of the files.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from candidate.history import Ints, Sequences
from core.errors import ConfigError
from headrace.v1.events_pb2 import Item
from offline.training.interactions import Held
from offline.training.trainer import TowersData

# The files hold an order, no times: steps lie so far apart.
_STEP_MS = 1000
# So many users are enough to choose an epoch by.
_VALIDATION_USERS = 4000


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """A data set. Both parts look at the same steps."""

    training: TowersData
    test: Held

    def part(self, share: int) -> "LeaveOneOut":
        """Every `share`-th user is validated and tested, and trained on."""
        steps, training = self.training.steps, self.training
        chosen = np.arange(len(steps.starts) - 1) % share == 0
        ends, refit_ends = (np.where(chosen, part, steps.starts[:-1]) for part in (training.ends, training.refit_ends))
        return LeaveOneOut(
            TowersData(training.items, steps, ends, _chosen(training.held, steps, chosen), refit_ends, training.ids),
            _chosen(self.test, steps, chosen),
        )


def read_gsasrec(folder: Path) -> LeaveOneOut:
    """The split of the gSASRec authors: the last item of each user tests, the one before validates.

    Nobody's second-last item may be trained on in this split, though only the 512 users in `val` are meant to validate
    by it: too few to tell two trainings apart. The third-last item of those 512 is not trained on either.

    Raises:
        ConfigError: files are missing or do not belong together.
    """
    train, inputs = _read(folder / "train" / "input.txt"), _read(folder / "test" / "input.txt")
    tests = _read(folder / "test" / "output.txt")
    if not (len(train) == len(inputs) == len(tests)):
        raise ConfigError(f"{folder}: train, test input and test output have different numbers of users")
    whole = [[*items, *test[:1]] for items, test in zip(inputs, tests, strict=True)]
    return _split(whole, [len(items) for items in train])


def read_s3rec(path: Path) -> LeaveOneOut:
    """A file of the form that S3-Rec uses: the last item of each user tests, the one before validates.

    Raises:
        ConfigError: no such file, or a user with fewer than three items.
    """
    whole = [line[1:] for line in _read(path)]
    if any(len(items) < 3 for items in whole):
        raise ConfigError(f"{path}: a user needs at least three items: one to train on, one to validate, one to test")
    return _split(whole, [len(items) - 2 for items in whole])


def _split(whole: Sequence[Sequence[int]], trained: Sequence[int]) -> LeaveOneOut:
    starts = np.concatenate([[0], np.cumsum([len(items) for items in whole])]).astype(np.int64)
    names, rows = np.unique(np.concatenate([np.asarray(items, np.int64) for items in whole]), return_inverse=True)
    index = np.arange(starts[-1], dtype=np.int64)
    steps = Sequences(
        starts,
        rows.astype(np.int64),
        np.zeros(len(rows), np.int64),
        np.ones(len(rows), np.float32),
        (index - np.repeat(starts[:-1], np.diff(starts))) * _STEP_MS,
    )
    items = [Item(item_id=str(name)) for name in names]
    last = starts[1:] - 1
    chosen = np.sort(np.random.default_rng(0).permutation(len(whole))[:_VALIDATION_USERS])
    held = _predicted(starts[:-1][chosen], last[chosen] - 1)
    ends = starts[:-1] + np.asarray(trained, np.int64)
    return LeaveOneOut(
        TowersData(items, steps, ends, held, refit_ends=last, ids=np.arange(len(items))),
        _predicted(starts[:-1], last),
    )


def _predicted(begin: Ints, target: Ints) -> Held:
    """Each target from all that came before it."""
    return Held(begin, target, target)


def _chosen(held: Held, steps: Sequences, users: "npt.NDArray[np.bool_]") -> Held:
    at = users[np.searchsorted(steps.starts, held.target, side="right") - 1]
    return Held(held.begin[at], held.end[at], held.target[at])


def _read(path: Path) -> list[list[int]]:
    """Whitespace-separated numbers, line by line; the file, or the same compressed as `.gz`."""
    packed = path.with_name(path.name + ".gz")
    try:
        text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else path.read_text("utf-8")
        return [[int(word) for word in line.split()] for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read as lines of item numbers ({error})") from error
