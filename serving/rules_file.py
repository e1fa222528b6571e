"""The editors' rules file, read again whenever it changes, without a release.

Beside the requests; `serving.release` asks it every second. Invariant: rules that do not pass the check never serve:
those before them stay, and the log says once what is wrong and where.
"""

import json
from pathlib import Path

from core.errors import ArtifactError
from core.telemetry import get_logger
from serving.rerank.rules import Rules

_log = get_logger("rules")
_MAX_BYTES = 4 * 1024 * 1024


class RulesFile:
    """Rules from `path`; an empty path means that there is no such file, and the bundle's own rules hold.

    Raises:
        ArtifactError: the file is there at the start, and does not pass.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._stamp: tuple[int, int, int] | None = None
        self.current: Rules | None = None
        if self._path is not None:
            self._stamp = self._stamp_now()
            if self._stamp is not None:
                self.current = _parse(self._path)

    def read_again(self) -> Rules | None:
        """The file's rules where they have changed and pass the check, else None."""
        if self._path is None or (stamp := self._stamp_now()) == self._stamp:
            return None
        self._stamp = stamp
        if stamp is None:
            _log.warning("the rules file is gone, its last rules hold", file=str(self._path))
            return None
        try:
            self.current = _parse(self._path)
        except ArtifactError as error:
            _log.warning("the new rules are refused, the old ones hold", problem=str(error))
            return None
        _log.info("new rules", file=str(self._path))
        return self.current

    def _stamp_now(self) -> tuple[int, int, int] | None:
        assert self._path is not None  # noqa: S101 - checked by the callers
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _parse(path: Path) -> Rules:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; make it readable") from error
    if len(raw) > _MAX_BYTES:
        raise ArtifactError(f"{path}: more than {_MAX_BYTES} bytes; split the rules by surface")
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}; correct it") from error
    try:
        return Rules.parse(content)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
