"""Item attributes turned round: from a category, label or number range to the rows that have it.

Turns the filter of a request into masks, for the search to apply inside. Invariant: a mask has one entry per
catalogue row; an attribute name that no item has is the caller's mistake, a value that no item has is an empty answer.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.errors import InvalidRequestError
from features.catalog import Catalog
from headrace.v1.events_pb2 import Item
from headrace.v1.types_pb2 import ItemFilter, NumberRange

MAX_EXCLUDED_ITEMS = 10_000
MAX_FILTER_PARTS = 256

Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


class Mask(NamedTuple):
    """One part of a filter: which rows it lets pass, and its name for explanations."""

    name: str
    passing: Bools


class _Members:
    """The rows that have a value; as an array, too, once somebody has asked for it since the last change."""

    __slots__ = ("_array", "_rows")

    def __init__(self) -> None:
        self._rows: set[int] = set()
        self._array: Rows | None = None

    def add(self, row: int) -> None:
        self._rows.add(row)
        self._array = None

    def discard(self, row: int) -> None:
        self._rows.discard(row)
        self._array = None

    def array(self) -> Rows:
        if self._array is None:
            self._array = np.fromiter(self._rows, np.int64, len(self._rows))
        return self._array


_ByValue = defaultdict[str, _Members]


class Attributes:
    """One writer; readers may run beside it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._categories: _ByValue = defaultdict(_Members)
        self._labels: defaultdict[str, _ByValue] = defaultdict(lambda: defaultdict(_Members))
        self._numbers: dict[str, npt.NDArray[np.float64]] = {}

    def put(self, row: int, item: Item, before: Item | None = None) -> None:
        """Takes in an item, and forgets what its row had before."""
        with self._lock:
            if before is not None:
                for category in before.categories:
                    self._categories[category].discard(row)
                for name, value in before.labels.items():
                    self._labels[name][value].discard(row)
                for name, _ in _numbers(before):
                    self._numbers[name][row] = math.nan
            for category in item.categories:
                self._categories[category].add(row)
            for name, value in item.labels.items():
                self._labels[name][value].add(row)
            for name, number in _numbers(item):
                self._column(name, row)[row] = number

    def masks(self, item_filter: ItemFilter, catalog: Catalog, count: int) -> Iterator[Mask]:
        """The parts of a filter over the first `count` rows; all must pass.

        Raises:
            InvalidRequestError: an attribute that no item has, or a range that cannot be; names the field.
        """
        _check_sizes(item_filter)
        if item_filter.categories_any:
            yield Mask("filter.categories_any", self._any(self._categories, item_filter.categories_any, count))
        if item_filter.categories_none:
            yield Mask("filter.categories_none", ~self._any(self._categories, item_filter.categories_none, count))
        if item_filter.exclude_item_ids:
            yield Mask("filter.exclude_item_ids", ~rows_mask(catalog.rows(item_filter.exclude_item_ids), count))
        for index, limits in enumerate(item_filter.ranges):
            yield Mask(f"filter.ranges[{index}]", self._within(limits, f"filter.ranges[{index}]", count))
        for index, match in enumerate(item_filter.labels):
            field = f"filter.labels[{index}]"
            if match.name not in self._labels:
                raise InvalidRequestError(f"{field}.name", f"no item has the label {match.name[:64]!r}")
            yield Mask(field, self._any(self._labels[match.name], match.values, count))

    def _any(self, rows_of: _ByValue, names: Iterable[str], count: int) -> Bools:
        with self._lock:
            rows = [rows_of[name].array() for name in names if name in rows_of]
        return rows_mask(np.concatenate(rows), count) if rows else np.zeros(count, np.bool_)

    def _within(self, limits: NumberRange, field: str, count: int) -> Bools:
        column = self._numbers.get(limits.name)
        if column is None:
            raise InvalidRequestError(f"{field}.name", f"no item has the number {limits.name[:64]!r}")
        least = limits.min if limits.HasField("min") else -math.inf
        most = limits.max if limits.HasField("max") else math.inf
        if not least <= most:
            raise InvalidRequestError(field, "min must not be above max, and both must be numbers")
        passing = np.zeros(count, np.bool_)
        values = column[:count]
        # Items without the number are NaN, which is within nothing.
        passing[: len(values)] = (values >= least) & (values <= most)
        return passing

    def _column(self, name: str, row: int) -> npt.NDArray[np.float64]:
        column = self._numbers.get(name)
        if column is None or row >= len(column):
            grown = np.full(max(1024, 2 * row), math.nan)
            if column is not None:
                grown[: len(column)] = column
            self._numbers[name] = column = grown
        return column


def rows_mask(rows: npt.NDArray[np.integer], count: int) -> Bools:
    """True at `rows`; those outside 0..count - 1 are left out."""
    mask = np.zeros(count, np.bool_)
    mask[rows[(rows >= 0) & (rows < count)]] = True
    return mask


def _numbers(item: Item) -> Iterator[tuple[str, float]]:
    yield from item.numbers.items()
    if item.HasField("year"):
        yield "year", float(item.year)
    if item.HasField("price"):
        yield "price", item.price


def _check_sizes(item_filter: ItemFilter) -> None:
    for field in ("categories_any", "categories_none", "ranges", "labels"):
        if len(getattr(item_filter, field)) > MAX_FILTER_PARTS:
            raise InvalidRequestError(f"filter.{field}", f"at most {MAX_FILTER_PARTS}")
    if len(item_filter.exclude_item_ids) > MAX_EXCLUDED_ITEMS:
        raise InvalidRequestError("filter.exclude_item_ids", f"at most {MAX_EXCLUDED_ITEMS}")
