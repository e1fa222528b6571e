"""From what the supervisor has decided (ports, addresses) to what the processes read: environment and settings.

Pure: values by section and key in, environment variables, a Settings object or a TOML file out. Invariant: what the
stack decides wins over the user's file and environment, everything else stays the user's.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from core.errors import ConfigError
from core.settings import Settings

# section -> key -> value
Values = dict[str, dict[str, Any]]

_PREFIX = "HEADRACE_"


def to_environment(values: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """HEADRACE_<SECTION>__<KEY> for each value."""
    return {
        f"{_PREFIX}{section}__{key}".upper(): value if isinstance(value, str) else json.dumps(value)
        for section, keys in values.items()
        for key, value in keys.items()
    }


def with_values(
    settings: Settings, values: Mapping[str, Mapping[str, Any]], environment: Mapping[str, str]
) -> Settings:
    """`settings` with `values`, and above them those of `environment` (other variables are ignored).

    Raises:
        ConfigError: an unknown section or key, or a value out of range; names it.
    """
    changes: Values = {section: dict(keys) for section, keys in values.items()}
    for variable, text in environment.items():
        section, *path = variable.removeprefix(_PREFIX).lower().split("__")
        if variable.upper().startswith(_PREFIX) and path:
            _put(changes.setdefault(section, {}), path, text)
    sections = {}
    for section, keys in changes.items():
        present = getattr(settings, section, None)
        if present is None:
            raise ConfigError(f"{section}: no such section of the settings; see core/defaults.toml")
        try:
            sections[section] = type(present).model_validate(_merged(present.model_dump(), keys))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join((section, *map(str, first["loc"])))
            raise ConfigError(f"{where}: {first['msg']} (see core/defaults.toml for its meaning)") from error
    return settings.model_copy(update=sections)


def to_toml(values: Mapping[str, Mapping[str, Any]]) -> str:
    """A settings file, for clients that were started elsewhere (HEADRACE_CONFIG)."""
    lines = ["# Where the running stack is. Written by the supervisor, new at each start."]
    for section, keys in values.items():
        lines += ["", f"[{section}]"]
        # JSON strings, numbers and booleans are TOML too.
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def _put(table: dict[str, Any], path: list[str], text: str) -> None:
    *above, key = path
    for name in above:
        table = table.setdefault(name, {})
    table[key] = json.loads(text) if text[:1] in ("{", "[") else text


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
