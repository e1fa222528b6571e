"""The releases that are loaded: the one that serves, the one before it, experiments and a shadow; each kept fresh.

Follows the registry: CURRENT and ROLES. Invariant: each release has one writer, its own follower's thread; a bundle
that does not load leaves what serves in place; Kafka being away delays news and never ends the service.
"""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

from core import bundle as bundles
from core.clock import Clock
from core.codec import MAX_ID_CHARS
from core.errors import ArtifactError, NotFoundError
from core.pace import beside_calls
from core.registry import Roles, read_roles
from core.settings import Settings
from core.telemetry import get_logger
from features.catalog_feed import CatalogFeed
from ranker import metrics
from ranker.forms import TRITON
from ranker.release import Release, load_release

_log = get_logger("ranker")
# A new bundle's release waits so long for the topics before it serves with what it has.
_SWAP_WAIT_SECONDS = 30.0
# Whether another server has by now what a bundle needs there.
_ELSEWHERE_AGAIN_SECONDS = 30.0


class _Loaded(NamedTuple):
    release: Release
    feed: CatalogFeed


class Releases:
    """The release that serves, its predecessor and successors, and what is loaded beside it."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        """Loads the registry's current bundle. Raises ArtifactError where there is none, or it is broken."""
        self._settings = settings
        self._clock = clock
        self._registry = settings.registry.path
        # Version -> what its manifest looked like when it was refused, and the turn: another one is tried again.
        self._refused: dict[str, tuple[int, int, int]] = {}
        self._roles, self._previous = Roles(), ""
        first = self._open(bundles.current_version(self._registry))
        # Replaced, never changed: readers take the whole of it.
        self._loaded = {first.release.version: first}
        self._current = first

    @property
    def current(self) -> Release:
        return self._current.release

    @property
    def feed(self) -> CatalogFeed:
        """What keeps the current release fresh."""
        return self._current.feed

    @property
    def shadow(self) -> tuple[Release, float] | None:
        """The release to try beside the one that serves, and on which share of the traffic."""
        loaded = self._loaded.get(self._roles.shadow)
        return (loaded.release, self._roles.shadow_share) if loaded else None

    def versions(self) -> list[str]:
        """What may be asked for by name, the current one first."""
        current = self.current.version
        return [current, *sorted(version for version in self._loaded if version != current)]

    def named(self, bundle_version: str, model_version: str) -> Release:
        """The loaded release of these versions, the current one where none is given.

        Raises:
            NotFoundError: it is not loaded.
        """
        current = self.current
        if not bundle_version:
            candidates = [current, *(one.release for one in self._loaded.values())]
        elif bundle_version in self._loaded:
            candidates = [self._loaded[bundle_version].release]
        else:
            candidates = []
        for release in candidates:
            if model_version in ("", release.model_version):
                return release
        loaded = ", ".join(
            f"{one.release.version} (model {one.release.model_version})" for one in self._loaded.values()
        )
        asked = f"bundle {bundle_version[:MAX_ID_CHARS]!r}" if bundle_version else ""
        asked += f"{', ' if asked else ''}model {model_version[:MAX_ID_CHARS]!r}" if model_version else ""
        raise NotFoundError(
            f"{asked} is not loaded, but {loaded}; leave the version out to get the current one, or load it with "
            "`headrace release experiment`"
        )

    def close(self) -> None:
        stopping = [threading.Thread(target=_stop, args=(one,), name="ranker-drop") for one in self._loaded.values()]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()

    async def watch(self) -> None:
        """Follows the registry, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.registry.watch_interval_ms / 1000)
            await self.look()

    async def look(self) -> bool:
        """Loads and drops what the registry says; whether another bundle serves now."""
        before = self.current
        try:
            await asyncio.to_thread(self._follow)
        except ArtifactError as error:
            # The registry itself: no CURRENT, or broken roles.
            metrics.loads.labels("refused").inc()
            _log.warning("the registry cannot be followed, the old bundle serves on", problem=str(error))
        return self.current is not before

    def _follow(self) -> None:
        wanted = bundles.current_version(self._registry)
        if wanted != self.current.version and (loaded := self._ensure(wanted)) is not None:
            self._previous = self.current.version
            self._current = loaded
            _tell_current(loaded.release)
        self._roles = read_roles(self._registry)
        for version in self._roles.named():
            self._ensure(version)
        kept = {self.current.version, *self._roles.named()}
        if self._settings.ranker.keep_previous:
            kept.add(self._previous)
        dropped = [one for version, one in self._loaded.items() if version not in kept]
        self._loaded = {version: one for version, one in self._loaded.items() if version in kept}
        for one in dropped:
            # A feed that waits for Kafka takes seconds to stop; what it writes to must live until then.
            threading.Thread(target=_stop, args=(one,), name="ranker-drop", daemon=True).start()
        metrics.loaded_bundles.set(len(self._loaded))

    def _ensure(self, version: str) -> _Loaded | None:
        """The version, loaded if it is not yet; None where it is refused, which is said once."""
        if version in self._loaded:
            return self._loaded[version]
        seen = (*_look_of(self._registry, version), self._turn())
        if self._refused.get(version) == seen:
            return None
        try:
            with beside_calls():
                loaded = self._open(version)
        except ArtifactError as error:
            self._refused[version] = seen
            metrics.loads.labels("refused").inc()
            _log.warning("a bundle is refused, what serves serves on", bundle=version, problem=str(error))
            return None
        self._refused.pop(version, None)
        loaded.feed.start()
        # Where Kafka was away before, it is not waited for again.
        if self.feed.has_caught_up and not loaded.feed.wait(_SWAP_WAIT_SECONDS):
            _log.warning("kafka is away: the new bundle serves without what came since it was made", bundle=version)
        metrics.loads.labels("loaded").inc()
        self._loaded = {**self._loaded, version: loaded}
        return loaded

    def _turn(self) -> int:
        """What is refused is refused for good, but for what a server elsewhere lacked: it may have it by now."""
        is_elsewhere = self._settings.ranker.form == TRITON
        return int(self._clock.monotonic() / _ELSEWHERE_AGAIN_SECONDS) if is_elsewhere else 0

    def _open(self, version: str) -> _Loaded:
        with _no_cyclic_collection():
            bundle = bundles.open_bundle(self._registry / version)
            release = load_release(bundle, self._settings, self._clock)
        # Weak: feed and follower know each other, and a cycle that is frozen would hold the release for ever.
        target = cast(Release, weakref.proxy(release))
        return _Loaded(release, CatalogFeed(target, release.manifest, self._settings, _count_malformed))


def tell_first(release: Release) -> None:
    """Metrics of the release that the process begins with."""
    metrics.loads.labels("loaded").inc()
    metrics.loaded_bundles.set(1)
    metrics.load_time.set(release.load_time_ms / 1000)


def _stop(loaded: _Loaded) -> None:
    loaded.feed.stop()


def _tell_current(release: Release) -> None:
    metrics.load_time.set(release.load_time_ms / 1000)
    _log.info("bundle swapped", bundle=release.version, model=release.model_version, items=len(release.catalog))


@contextmanager
def _no_cyclic_collection() -> Iterator[None]:
    """For loading beside traffic: a catalogue has many objects and no cycles; a look at them all stops every thread."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def _look_of(registry: Path, version: str) -> tuple[int, int]:
    try:
        stat = (registry / version / bundles.MANIFEST).stat()
    except OSError:
        return (0, 0)
    return stat.st_mtime_ns, stat.st_size


def _count_malformed(topic: str) -> None:
    metrics.malformed.labels(topic).inc()
