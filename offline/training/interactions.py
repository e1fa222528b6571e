"""The positive interactions of an event log as steps per user, and their split by event time.

Read by tower training and by the baselines. Invariant: the steps are those that `candidate.history` would make of each
user's state, newest events beyond the state's length included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from candidate import history
from candidate.history import Ints, Sequences
from core.errors import ConfigError
from core.settings import FeaturesSettings
from features.stores.event_log import EventLog
from features.transforms import stable_hash
from headrace.v1.events_pb2 import Item


@dataclass(frozen=True, slots=True)
class Held:
    """Steps to be predicted from what the user did before them. All [n], indices into the steps."""

    begin: Ints
    # The user's steps before this one are known when the target is predicted.
    end: Ints
    target: Ints

    @classmethod
    def nothing(cls) -> "Held":
        return cls(*(np.zeros(0, np.int64) for _ in range(3)))


def load_steps(log: EventLog, items: Sequence[Item], settings: FeaturesSettings, before_ms: int | None) -> Sequences:
    """Steps of every user; rows are positions in `items`.

    Raises:
        ConfigError: the log holds no positive interaction with a known item.
    """
    events = log.events(end_ms=before_ms, columns=["user_id", "item_id", "kind", "event_time", "value", "event_id"])
    row_of = {item.item_id: row for row, item in enumerate(items)}
    users, user_names = _codes(events["user_id"])
    item_codes, item_names = _codes(events["item_id"])
    kind_codes, kind_names = _codes(events["kind"])
    rows = np.array([row_of.get(name, -1) for name in item_names], np.int64)[item_codes]
    number = {kind: index for index, kind in enumerate(history.kind_names(settings), 1)}
    kinds = np.array([number.get(name, 0) for name in kind_names], np.int64)[kind_codes]
    values = pc.fill_null(events["value"], 1.0).to_numpy()
    pairs, inverse = np.unique(np.stack([kind_codes.astype(np.float64), values], axis=1), axis=0, return_inverse=True)
    by_pair = [history.step_weight(kind_names[int(kind)], float(value), settings) for kind, value in pairs]
    weights = np.array(by_pair, np.float32)[inverse.reshape(-1)]
    times_ms = events["event_time"].cast(pa.int64()).to_numpy()
    # The order of the states: by time, ties by the hash of the event id.
    hashes = np.fromiter(map(stable_hash, events["event_id"].to_pylist()), np.uint64, events.num_rows)
    order = np.lexsort((hashes, times_ms, users))
    steps = history.sequences(users[order], len(user_names), rows[order], kinds[order], weights[order], times_ms[order])
    if not len(steps.rows):
        raise ConfigError(
            f"event log {log.root} has no event of features.positive_kinds on an item of its catalogue; "
            "import events and items, or make some with `headrace simulate`"
        )
    return steps


def owners(steps: Sequences) -> Ints:
    """The user of each step [n]."""
    return np.repeat(np.arange(len(steps.starts) - 1), np.diff(steps.starts))


def hold_out(steps: Sequences, share: float, limit: int, seed: int) -> tuple[Held, Ints]:
    """Splits by event time: the newest `share` of the steps is to be predicted, each from what came before it.

    Steps at one time are predicted from what came before all of them; a step on an item that the user had before is
    no target. Where the newest steps give too few targets, the last step of each user is held out instead.

    Returns:
        At most `limit` targets, and the indices of the steps to train on.
    """
    users = owners(steps)
    begin = steps.starts[users]
    index = np.arange(len(users))
    boundary = np.quantile(steps.times_ms, 1 - share) if share > 0 else np.inf
    newest = steps.times_ms >= boundary
    targets = newest & (_ends_before(steps, users) > begin) & new_to_their_users(steps)
    if targets.sum() < 50:
        newest = (index == steps.starts[users + 1] - 1) & (index > begin) & (share > 0)
        targets = newest & new_to_their_users(steps)
    chosen = np.flatnonzero(targets)
    if len(chosen) > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, limit, replace=False))
    ends = np.minimum(_ends_before(steps, users)[chosen], chosen)
    ends = np.where(ends > begin[chosen], ends, chosen)
    return Held(begin[chosen], ends, chosen), np.flatnonzero(~newest)


def _ends_before(steps: Sequences, users: Ints) -> Ints:
    """For each step, the first step of its user at the same time [n]."""
    fresh = np.ones(len(users), np.bool_)
    fresh[1:] = (users[1:] != users[:-1]) | (steps.times_ms[1:] != steps.times_ms[:-1])
    first = np.flatnonzero(fresh)
    at: Ints = first[np.cumsum(fresh) - 1]
    return at


def new_to_their_users(steps: Sequences) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Whether the user had the item never before, of each step [n]."""
    users = owners(steps)
    _, first = np.unique(users * (int(steps.rows.max()) + 1) + steps.rows, return_index=True)
    is_first = np.zeros(len(users), np.bool_)
    is_first[first] = True
    return is_first


def _codes(column: pa.ChunkedArray) -> tuple[Ints, list[str]]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()
