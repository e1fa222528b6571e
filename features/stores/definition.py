"""The feature definition that the rows of a project were made by, kept beside them.

Sums of other half-lives, or histories of another length, do not add up to what one pass over the log gives. Checked
before the stream reads, and by whoever else writes rows. Invariant: rows of one project are of one definition; another
one needs another project, which `headrace rebuild --project` makes.
"""

import json
from typing import Any

from core.errors import ConfigError
from core.settings import FeaturesSettings
from features import windows
from features.stores.online import OnlineStore

_NAME = "definition"
# What decides about a row's content; the rest of the section is for reading rows.
_DECIDING = frozenset(["history_length", "duplicate_horizon", "half_lives_seconds", "category_buckets", "kind_weights"])


class DefinitionChangedError(ConfigError):
    """The rows in the store are of another definition than the settings."""


def check_definition(store: OnlineStore, settings: FeaturesSettings) -> None:
    """Holds the settings against the store; a store without rows yet takes them as they are.

    Raises:
        DefinitionChangedError: says what has changed and what to run.
        StageError: the store does not answer.
    """
    ours = definition(settings)
    stored = store.put_text(_NAME, json.dumps(ours, sort_keys=True))
    try:
        theirs: dict[str, Any] = json.loads(stored)
    except ValueError:
        theirs = {}
    changed = [name for name in ours if ours[name] != theirs.get(name)]
    if changed:
        what = ", ".join(f"{name} was {json.dumps(theirs.get(name))}, is {json.dumps(ours[name])}" for name in changed)
        raise DefinitionChangedError(
            f"the rows of project {settings.project!r} are of another feature definition ({what}): make new ones with "
            "`headrace rebuild --project NEW` and set features.project to it, or set features back"
        )


def definition(settings: FeaturesSettings) -> dict[str, Any]:
    """The settings that rows depend on, and the version of the states' encoding."""
    return {"encoding": windows.ENCODING, **settings.model_dump(mode="json", include=set(_DECIDING))}
