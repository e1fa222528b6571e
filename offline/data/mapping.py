"""Which column of a user's file is which field: said in a TOML file or by flags, else recognised by name.

The importer resolves a mapping against the columns that a file has. Invariant: every column becomes a field or a free
attribute, or is on the list of those left out; a required field that nothing fills is an error.

A mapping file; all parts are optional, and flags win over it:

    kind = "events"               # items, users or events
    delimiter = ";"               # CSV; else it is recognised
    encoding = "utf-8"
    columns = ["u", "i", "t"]     # CSV: the file has no line of column names, these are they
    list_separator = "|"          # between the categories of a cell
    time_unit = "s"               # s, ms, us or iso; else it is recognised
    time_format = "%d.%m.%Y"      # times of another shape, as in Python's strptime; UTC where it says no zone
    ignore = ["internal_note"]    # columns to leave out

    [fields]                      # field = column
    user_id = "customer"
    "numbers.weight" = "weight_kg"    # a free attribute: labels.x, numbers.x, vectors.x (items), tags.x (events)

    [constants]                   # field = value, for all rows
    kind = "rating"

    [kinds]                       # their word = kind of event; other words are only put in lower case
    "add to basket" = "cart"
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from core.errors import ConfigError
from features.stores.event_rows import EVENTS, ITEMS, USERS, LogTable
from offline.data.reading import did_you_mean, need_file

Kind = Literal["items", "users", "events"]
TimeUnit = Literal["s", "ms", "us", "iso"]
TABLES: dict[str, LogTable] = {"items": ITEMS, "users": USERS, "events": EVENTS}
# Parts of a message that take attributes of one's own, the first for text, the second (if any) for numbers.
FREE_PARTS = {"items": ("labels", "numbers", "vectors"), "users": ("labels", "numbers"), "events": ("tags",)}
_REQUIRED = {"items": ("item_id",), "users": ("user_id",), "events": ("user_id", "item_id", "kind", "event_time")}
# What people call these columns; compared without case, spaces, "_" and "-".
_ALIASES = {
    "user_id": "user uid customer customerid visitor visitorid member memberid account accountid",
    "item_id": "item product productid sku article articleid movie movieid content contentid song songid book bookid",
    "event_id": "eventuuid uuid",
    "event_time": "timestamp time ts date datetime eventtimestamp createdat occurredat unixtime",
    "kind": "event eventtype eventname type action actiontype interaction",
    "value": "rating score stars amount quantity",
    "session_id": "session visitid",
    "surface": "page channel placement",
    "device": "devicetype",
    "categories": "category genres genre topics",
    "title": "name productname itemname headline",
    "text": "description body abstract content summary",
    "image_uri": "image imageurl imageuri picture thumbnail",
    "publish_time": "published publishedat publishdate releasedate createdat",
    "year": "releaseyear",
    "segment": "usersegment cohort",
}
# `id` alone is the id of what the file lists.
_OWN_ID = {"items": "item_id", "users": "user_id", "events": "event_id"}


class ImportMapping(BaseModel):
    """What a mapping file (or the flags) says about a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind | None = None
    delimiter: str | None = None
    encoding: str = "utf-8"
    columns: tuple[str, ...] = ()
    list_separator: str = "|"
    time_unit: TimeUnit | None = None
    time_format: str | None = None
    ignore: tuple[str, ...] = ()
    fields: Mapping[str, str] = {}
    constants: Mapping[str, str | int | float | bool] = {}
    kinds: Mapping[str, str] = {}

    def updated(self, **values: Any) -> "ImportMapping":
        """A copy with the values that are not None; `fields` and `constants` are added to those there are."""
        given = {name: value for name, value in values.items() if value is not None}
        for name in ("fields", "constants"):
            given[name] = {**getattr(self, name), **given.get(name, {})}
        return _checked(self.model_dump() | given, "flags")


@dataclass(frozen=True)
class Target:
    """Where a column goes. `part` is set for a free attribute (labels.x), `field` is then the name in it."""

    column: str
    field: str
    part: str | None = None
    # mapped, recognised or free
    reason: str = "mapped"

    @property
    def path(self) -> str:
        return f"{self.part}.{self.field}" if self.part else self.field


@dataclass(frozen=True)
class Plan:
    """A mapping, resolved: what becomes of each column of one file."""

    table: LogTable
    targets: tuple[Target, ...]
    constants: tuple[tuple[Target, Any], ...]
    left_out: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)

    def column_of(self, path: str) -> str:
        """The column that fills a field, for messages; the field itself where none does."""
        root = path.split("[")[0]
        return next((target.column for target in self.targets if root in (target.path, target.field)), path)


def read_mapping(path: Path) -> ImportMapping:
    """Reads a mapping file.

    Raises:
        ConfigError: no such file, not TOML, or a key that there is not.
    """
    try:
        values = tomllib.loads(need_file(path).read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"mapping file {path}: not valid TOML: {error}") from error
    return _checked(values, f"mapping file {path}")


def parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """`field=column` of the flag --map."""
    parsed = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not name or not column:
            raise ConfigError(f"--map {pair}: say it as field=column, as in --map user_id=customer")
        parsed[name.strip()] = column.strip()
    return parsed


def resolve(mapping: ImportMapping, columns: Sequence[str], numeric: frozenset[str], where: str) -> Plan:
    """Decides what becomes of each column.

    Args:
        mapping: as said; its `kind` is set.
        columns: those that the file has.
        numeric: columns that hold numbers only.
        where: the file, for messages.

    Raises:
        ConfigError: a mapped column or field that does not exist, or a required field that nothing fills.
    """
    kind = mapping.kind
    if kind is None:
        raise ConfigError(f"{where}: are these items, users or events? Say --kind")
    for column in (*mapping.fields.values(), *mapping.ignore):
        if column not in columns:
            near = did_you_mean(column, columns)
            raise ConfigError(f"{where}: no column {column!r} among {', '.join(columns)}{near}")
    targets = [_target(kind, name, column, where) for name, column in mapping.fields.items()]
    constants = tuple((_target(kind, name, "", where), value) for name, value in mapping.constants.items())
    filled = {target.path for target in targets} | {target.path for target, _ in constants}
    taken = {target.column for target in targets} | set(mapping.ignore)
    targets += _recognised(kind, [column for column in columns if column not in taken], filled)
    taken |= {target.column for target in targets}
    filled |= {target.path for target in targets}
    _demand_required(kind, filled, columns, where)
    text_part, *number_part = FREE_PARTS[kind]
    for column in columns:
        if column not in taken:
            part = number_part[0] if number_part and column in numeric else text_part
            targets.append(Target(column, column, part, "free"))
    in_order = sorted(targets, key=lambda target: list(columns).index(target.column))
    return Plan(TABLES[kind], tuple(in_order), constants, mapping.ignore, mapping.kinds)


def _recognised(kind: str, columns: Sequence[str], filled: set[str]) -> list[Target]:
    """Columns that bear the name of a field, or one that people use for it; the first such column gets it."""
    names = {name: [_plain(name), *_ALIASES.get(name, "").split()] for name in TABLES[kind].fields}
    names[_OWN_ID[kind]].append("id")
    free, found = list(columns), []
    # A field's own name before any other name for it, and the other names in the order of their list.
    for rank in range(max(map(len, names.values()))):
        for name, known in names.items():
            match = next((column for column in free if known[rank : rank + 1] == [_plain(column)]), None)
            if match is not None and name not in filled:
                found.append(Target(match, name, reason="recognised"))
                filled = filled | {name}
                free.remove(match)
    return found


def _target(kind: str, path: str, column: str, where: str) -> Target:
    """The field `path` of a mapping, checked."""
    part, dot, name = path.partition(".")
    if dot and name and part in FREE_PARTS[kind]:
        return Target(column, name, part)
    fields = TABLES[kind].fields
    if path not in fields:
        free = " or ".join(f"{part}.NAME" for part in FREE_PARTS[kind])
        hint = did_you_mean(path, fields) or f"; there are {', '.join(fields)}, and {free}"
        raise ConfigError(f"{where}: {kind} have no field {path!r}{hint}")
    return Target(column, path)


def _demand_required(kind: str, filled: set[str], columns: Sequence[str], where: str) -> None:
    for name in _REQUIRED[kind]:
        if name in filled:
            continue
        if name == "kind":
            problem = "nothing says what kind of event the rows are"
            raise ConfigError(f"{where}: {problem}; say --event-kind click (or rating, purchase, ...)")
        near = did_you_mean(name, columns)
        raise ConfigError(f"{where}: no column for {name} among {', '.join(columns)}{near}; say --map {name}=COLUMN")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in " _-")


def _checked(values: Mapping[str, Any], where: str) -> ImportMapping:
    try:
        return ImportMapping(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        near = did_you_mean(key, ImportMapping.model_fields) if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{where}: {key}: {first['msg']}{near}") from error
