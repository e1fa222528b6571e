"""Co-visitation: items that the same users meet within a short time, learnt from the events as they come.

Begins with what training learnt from the event log (part of the bundle), goes on with the stream's topics
(candidate/feed.py) and is asked by its source. Two interactions of one user on two items, at most `window_seconds`
apart, make a pair (as in Davidson et al., "The YouTube Video Recommendation System", RecSys 2010); it weighs as much
as the weaker of the two interactions and decays. Pairs are made within one partition of one topic, since between them
there is no order. Invariant: what it holds depends on the log alone: any batching, any repetition and any interleaving
of partitions gives the same pairs, and a position that the bundle includes is not counted again. (Where a bound is
reached, the lightest pairs go, and there the interleaving tells.)
"""

import json
from bisect import insort
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from candidate.history import step_weight
from candidate.pair_counts import Doubles, PairCounts
from core.bundle import CO_VISITATION, CO_VISITATION_FACTS
from core.errors import ArtifactError
from core.settings import CoVisitationSettings, FeaturesSettings
from features.positions import Offsets
from features.transforms import stable_hash
from features.windows import UserEvent

FORMAT = 1
# Messages before the bundle's positions are read again, so many of each partition, to know what the users whose next
# event comes did just before. They are not counted again.
LEAD_IN_MESSAGES = 5_000

# Where events come from that no topic had.
IMPORTED = (0, -1)

# An interaction in a user's window: time (ms), hash of the event, item, weight. Ordered by time, then by hash.
_Visit = tuple[int, int, str, float]


@dataclass(frozen=True, slots=True)
class PairRule:
    """What makes a pair. Sums of two rules cannot be added, so a bundle's own rule holds until the next training."""

    window_seconds: int
    window_events: int
    half_life_seconds: int


class CoVisitation:
    """Learns from events, and says what goes with an item. One writer; `similar` may run beside it."""

    def __init__(
        self, settings: CoVisitationSettings, features: FeaturesSettings, rule: PairRule | None = None
    ) -> None:
        self._settings, self._features = settings, features
        self.rule = rule or PairRule(settings.window_seconds, settings.window_events, settings.half_life_seconds)
        self._counts = PairCounts(self.rule.half_life_seconds * 1000, settings.neighbours_max, settings.pairs_max)
        # Newest offset by (source, partition): what training counted, and what came to us since.
        self.included: Offsets = {}
        self._applied: Offsets = {}
        # By source and partition, whose order the log gives: hash of the user -> the newest visits, oldest first. The
        # user whose last event is longest ago comes first.
        self._windows: defaultdict[tuple[int, int], OrderedDict[int, list[_Visit]]] = defaultdict(OrderedDict)

    @property
    def pair_count(self) -> int:
        return self._counts.pair_count

    @property
    def user_count(self) -> int:
        """Users whose last visits are kept."""
        return sum(map(len, self._windows.values()))

    def similar(self, item_ids: Sequence[str], now_ms: int) -> tuple[list[str], Doubles]:
        """Items that go with any of `item_ids`, in no order, and how well they do, in 0..1."""
        return self._counts.similar(item_ids, now_ms)

    def apply(self, events: Iterable[UserEvent], where: tuple[int, int] = IMPORTED) -> None:
        """Counts events, in the order of the log. What was applied before changes nothing.

        Args:
            events: of any users.
            where: source and partition of those that do not say their position.
        """
        for event in events:
            self._apply(event, where)

    def _apply(self, event: UserEvent, where: tuple[int, int]) -> None:
        is_counted = True
        if event.position is not None:
            where, offset = event.position[:2], event.position.offset
            if offset <= self._applied.get(where, -1):
                return
            self._applied[where] = offset
            is_counted = offset > self.included.get(where, -1)
        weight = step_weight(event.kind, event.value, self._features) * event.confidence
        if weight <= 0:
            return
        window = self._window(where, event.user_id)
        if any(visit[1] == event.event_hash for visit in window):
            return
        if is_counted:
            self._counts.add(event.item_id, event.time_ms, self._pairs(event, weight, window))
        insort(window, (event.time_ms, event.event_hash, event.item_id, weight))
        if len(window) > self.rule.window_events:
            window.pop(0)

    def _window(self, where: tuple[int, int], user_id: str) -> list[_Visit]:
        windows, user = self._windows[where], stable_hash(user_id)
        window = windows.get(user)
        if window is not None:
            windows.move_to_end(user)
            return window
        if len(windows) >= self._settings.users_max:
            windows.popitem(last=False)
        window = windows[user] = []
        return window

    def _pairs(self, event: UserEvent, weight: float, window: list[_Visit]) -> list[tuple[str, int, float]]:
        span_ms = self.rule.window_seconds * 1000
        return [
            (item_id, time_ms, min(weight, other_weight))
            for time_ms, _, item_id, other_weight in window
            if item_id != event.item_id and abs(event.time_ms - time_ms) <= span_ms
        ]

    def save(self, folder: Path) -> None:
        """Writes the pairs and the positions that they include; no user is in them."""
        arrays, facts = self._counts.arrays()
        positions = [[*where, offset] for where, offset in sorted({**self.included, **self._applied}.items())]
        facts = {**facts, "format": FORMAT, "rule": asdict(self.rule), "positions": positions}
        save_file(arrays, folder / CO_VISITATION)
        (folder / CO_VISITATION_FACTS).write_text(json.dumps(facts, sort_keys=True) + "\n", "utf-8")


def load_co_visitation(folder: Path, settings: CoVisitationSettings, features: FeaturesSettings) -> CoVisitation:
    """Reads what `save` wrote.

    Raises:
        ArtifactError: missing, cut short, or the two files are not of each other.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / CO_VISITATION_FACTS).read_text("utf-8"))
        if facts["format"] != FORMAT:
            raise ArtifactError(
                f"{folder / CO_VISITATION_FACTS}: format {facts['format']}, this version reads {FORMAT}"
            )
        loaded = CoVisitation(settings, features, PairRule(**facts["rule"]))
        loaded._counts.load(load_file(folder / CO_VISITATION), facts)
        loaded.included = {(int(source), int(partition)): int(last) for source, partition, last in facts["positions"]}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"co-visitation in {folder} cannot be read ({reason}); train again with `headrace train`"
        ) from error
    return loaded
