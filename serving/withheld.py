"""What may not be recommended, on this machine's disk: for a start while Kafka is away.

The bundle knows what was available when it was made; what was taken from sale since comes over the items topic, which
a process that starts with everything down cannot read. Invariant: the file only ever takes items out; a bundle made
after it was written knows better, and then it is ignored.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from core.bundle import Manifest
from core.telemetry import get_logger
from features.catalog import Catalog

_log = get_logger("withheld")
_FILE = "withheld.json"
_FORMAT = 1


class Withheld:
    """Keeps the items that became unavailable since the bundle was made, in a file.

    Args:
        folder: where the file lies; None = nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / _FILE
        self._kept: tuple[str, frozenset[str]] | None = None

    def apply(self, catalog: Catalog, manifest: Manifest) -> None:
        """Takes out of a catalogue just loaded what the file names; the topic has the last word once it is read."""
        self._at_load = catalog.column("available").copy()
        found = self._read()
        if found is None or int(found["written_time_ms"]) < manifest.created_time_ms:
            return
        for item_id in found["item_ids"]:
            catalog.remove(str(item_id))

    def keep(self, catalog: Catalog, manifest: Manifest, now_ms: int) -> None:
        """Writes the file where something has changed. For a thread beside the requests."""
        if self._file is None:
            return
        before = self._at_load
        # Items that came after the bundle are not in it, and so not shown where the topic is not read.
        gone = np.flatnonzero(before & ~catalog.column("available")[: len(before)])
        kept = (manifest.bundle_version, frozenset(catalog.item_ids[row] for row in gone.tolist()))
        if kept == self._kept:
            return
        content = {"format": _FORMAT, "written_time_ms": now_ms, "item_ids": sorted(kept[1])}
        unfinished = self._file.with_name(f".{self._file.name}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(content), "utf-8")
            unfinished.replace(self._file)
        except OSError as error:
            _log.warning("cannot be kept on disk", file=str(self._file), problem=str(error))
        # Also where the disk refused: the next change tries again.
        self._kept = kept

    def _read(self) -> Any:
        if self._file is None:
            return None
        try:
            found = json.loads(self._file.read_text("utf-8"))
            return found if found["format"] == _FORMAT and isinstance(found["item_ids"], list) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("cannot be read, left out", file=str(self._file), problem=str(error))
            return None
