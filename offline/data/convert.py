"""From a row of a user's file to a checked message.

Second part of the importer. Invariant: what comes out has passed core.codec's checks, as if it had come by Kafka; what
cannot be converted raises MalformedEventError that names file, line and column.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import orjson
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from core.codec import CHECKS, from_ms
from core.errors import ConfigError, MalformedEventError
from headrace.v1.events_pb2 import Preference, Vector
from offline.data.mapping import ImportMapping, Plan, Target
from offline.data.reading import broken_row

_UNIT_MS = {"s": 1000.0, "ms": 1.0, "us": 0.001}
_YES, _NO = frozenset({"true", "1", "yes", "y", "t"}), frozenset({"false", "0", "no", "n", "f"})


class Converter:
    """Makes messages of the rows of one file."""

    def __init__(self, plan: Plan, mapping: ImportMapping, path: Path, time_units: Mapping[str, str]) -> None:
        self.plan = plan
        self._path = path
        self._separator = mapping.list_separator
        self._time_format = mapping.time_format
        self._check = CHECKS[plan.table.message]
        self._setters = [(target, self._setter(target, time_units)) for target in plan.targets]
        self._constants = [
            (self._setter(target, {"": mapping.time_unit or "iso"}), value) for target, value in plan.constants
        ]
        self._try_constants()

    def message(self, line: int, row: Mapping[str, Any]) -> Any:
        """The message of a row, not checked yet.

        Raises:
            MalformedEventError: names file, line and column.
        """
        message: Any = self.plan.table.message()
        for target, set_value in self._setters:
            value = row.get(target.column)
            if is_absent(value):
                continue
            try:
                set_value(message, value)
            except (ValueError, TypeError, OverflowError) as error:
                raise broken_row(self._path, line, target.column, str(error)) from error
        for set_value, value in self._constants:
            set_value(message, value)
        if self.plan.table.name == "events":
            message.kind = self.plan.kinds.get(message.kind, message.kind.lower())
        return message

    def _try_constants(self) -> None:
        for (set_value, value), (target, _) in zip(self._constants, self.plan.constants, strict=True):
            try:
                set_value(self.plan.table.message(), value)
            except (ValueError, TypeError, OverflowError) as error:
                raise ConfigError(f"constant {target.path}: {error}; mend it in the mapping") from error

    def check(self, line: int, message: Message) -> None:
        try:
            self._check(message)
        except MalformedEventError as error:
            column = self.plan.column_of(error.field)
            problem = str(error).removeprefix(f"{error.field}: ")
            raise broken_row(self._path, line, column, f"{error.field} {problem}") from error

    def _setter(self, target: Target, time_units: Mapping[str, str]) -> Callable[[Message, Any], None]:
        if target.part:
            return self._part_setter(target.part, target.field)
        name, descriptor = target.field, self.plan.table.fields[target.field]
        if name == "preferences":
            return lambda message, value: getattr(message, name).extend(self._preferences(value))
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            return self._whole_part_setter(name)
        if descriptor.is_repeated:
            return lambda message, value: getattr(message, name).extend(self._texts(value))
        if descriptor.message_type is not None:
            unit = time_units.get(target.column, "iso")
            return lambda message, value: getattr(message, name).CopyFrom(from_ms(self._time_ms(value, unit)))
        convert = _CONVERTERS[descriptor.type]
        return lambda message, value: setattr(message, name, convert(value))

    def _part_setter(self, part: str, name: str) -> Callable[[Message, Any], None]:
        if part == "vectors":
            return lambda message, value: getattr(message, part)[name].CopyFrom(Vector(values=self._numbers(value)))
        convert = number if part == "numbers" else text

        def set_attribute(message: Message, value: Any) -> None:
            try:
                getattr(message, part)[name] = convert(value)
            except ValueError as error:
                raise ValueError(f"{error}; say --map labels.{name}=COLUMN to keep the column as text") from error

        return set_attribute

    def _whole_part_setter(self, part: str) -> Callable[[Message, Any], None]:
        """A column that is a whole map (JSON lines, Parquet, or JSON in a cell)."""

        def set_all(message: Message, value: Any) -> None:
            mapping = orjson.loads(value) if isinstance(value, str) else value
            if not isinstance(mapping, Mapping):
                raise TypeError(f"{value!r} is not an object of names and values")
            for name, element in mapping.items():
                inner = element.get("values") if part == "vectors" and isinstance(element, Mapping) else element
                if not is_absent(inner):
                    self._part_setter(part, str(name))(message, inner)

        return set_all

    def _texts(self, value: Any) -> list[str]:
        parts: Iterable[Any] = value.split(self._separator) if isinstance(value, str) else _as_list(value)
        return [stripped for part in parts if not is_absent(part) and (stripped := text(part))]

    def _numbers(self, value: Any) -> list[float]:
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = orjson.loads(value)
        parts = value.replace(self._separator, " ").replace(",", " ").split() if isinstance(value, str) else value
        return [number(part) for part in _as_list(parts)]

    def _preferences(self, value: Any) -> list[Preference]:
        """Objects with category and weight, or text as in `drama:0.5|horror:-1`."""
        if not isinstance(value, str):
            return [Preference(category=text(p["category"]), weight=number(p["weight"])) for p in _as_list(value)]
        pairs = [part.rpartition(":") for part in value.split(self._separator) if part.strip()]
        if not all(colon for _, colon, _ in pairs):
            raise ValueError(f"{value!r} is not of the form category:weight{self._separator}category:weight")
        return [Preference(category=category.strip(), weight=number(weight)) for category, _, weight in pairs]

    def _time_ms(self, value: Any, unit: str) -> int:
        if isinstance(value, datetime | date):
            return _datetime_ms(value)
        if self._time_format is not None:
            try:
                return _datetime_ms(datetime.strptime(str(value).strip(), self._time_format))
            except ValueError as error:
                raise ValueError(f"{value!r} is not a time of the form {self._time_format}") from error
        if unit in _UNIT_MS:
            try:
                return round(number(value) * _UNIT_MS[unit])
            except ValueError as error:
                raise ValueError(f"{value!r} is not a time in {unit}; say --time-unit s, ms, us or iso") from error
        try:
            return _datetime_ms(datetime.fromisoformat(str(value).strip()))
        except ValueError as error:
            raise ValueError(
                f"{value!r} is not a time like 2026-05-01T12:00:00Z; say --time-unit or time_format"
            ) from error


def recognise_time_unit(values: Iterable[Any]) -> str:
    """s, ms or us by the size of the numbers; iso where they are none. Years 1973..5138 are told apart by that."""
    unit = "iso"
    for value in values:
        try:
            size = abs(number(value))
        except (ValueError, TypeError):
            return "iso"
        unit = "s" if size < 1e11 else "ms" if size < 1e14 else "us"
    return unit


def is_numeric(value: Any) -> bool:
    """Whether a cell is a number, and not a code that looks like one (00501)."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return True
    if not isinstance(value, str) or not value.strip():
        return False
    digits = value.strip().lstrip("+-")
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return False
    try:
        return math.isfinite(float(value)) and "_" not in value
    except ValueError:
        return False


def is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    # Whole numbers that went through a column with gaps come as 12.0.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | tuple | dict):
        return orjson.dumps(value).decode()
    return value.isoformat() if isinstance(value, datetime | date) else str(value)


def number(value: Any) -> float:
    if isinstance(value, bool):
        return float(value)
    try:
        converted = float(value)
    except (ValueError, TypeError):
        raise ValueError(f"{value!r} is not a number") from None
    return converted


def _whole_number(value: Any) -> int:
    converted = number(value)
    if not converted.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return int(converted)


def _truth(value: Any) -> bool:
    word = text(value).lower()
    if word not in _YES | _NO:
        raise ValueError(f"{value!r} is neither yes nor no (true, false, 1, 0)")
    return word in _YES


def _datetime_ms(value: datetime | date) -> int:
    moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day, tzinfo=UTC)
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r} is not a list")
    return list(value)


_CONVERTERS: dict[int, Callable[[Any], Any]] = {
    FieldDescriptor.TYPE_STRING: text,
    FieldDescriptor.TYPE_DOUBLE: number,
    FieldDescriptor.TYPE_INT32: _whole_number,
    FieldDescriptor.TYPE_BOOL: _truth,
}
