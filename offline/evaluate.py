"""How good the recommendations are, by event-time replay, beside popularity, recent popularity and Markov.

The first 80% of the events train, by time; then the rest is played, and each event predicted from the user's state
just before it, among all items known by then, without what the user had before. Invariant: nothing that is predicted
from has happened at, or after, the time of what is predicted; events of one user at one time are predicted together.
"""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from core.settings import Settings
from features.catalog import Catalog, Floats
from features.stores.event_log import EventLog
from features.windows import UserState
from headrace.v1.events_pb2 import Item
from offline.baselines import all_baselines
from offline.co_visitation import PairsTimeline
from offline.data.dataset import split_by_time, times_of
from offline.logs import open_log
from offline.models import Mask, Models
from offline.replay import Group, Replay, read_entries
from offline.reporting import Reporter
from offline.train import train
from offline.training import validation
from offline.training.ranker_candidates import Pool

TRAIN_SHARE = 0.8
# Users with at least this many training events are reported apart.
WARM_EVENTS = 5
RECALL_CUTOFF = 100
# Bundles of evaluations never mix with those that serve.
_REGISTRY = ".evaluation"
RETRIEVAL, RANKING = "retrieval (two towers)", "final ranking"


@dataclass(frozen=True)
class Quality:
    """Of one way to recommend, over all predicted events and over those of warm users."""

    name: str
    hr_at_10: float
    ndcg_at_10: float
    recall_at_100: float
    warm_hr_at_10: float
    warm_ndcg_at_10: float
    warm_recall_at_100: float


@dataclass(frozen=True)
class Evaluation:
    """What was predicted, and how well."""

    dataset: str
    events: int
    train_events: int
    predicted_events: int
    warm_predicted_events: int
    # Predicted events whose item nobody had heard of before: a miss for everyone.
    unknown_item_events: int
    rows: list[Quality]
    bundle_version: str
    seconds: float
    train_seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    log_root: str | Path,
    registry: Path,
    settings: Settings,
    *,
    device: str = "auto",
    limit: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Trains on the older part of a log and predicts the newer one.

    Args:
        log_root: folder or URL of the event log.
        registry: where bundles live; that of the evaluation is kept beside them, and never serves.
        settings: of features, candidates and training.
        device: where to train and rank: auto, cpu or cuda.
        limit: predict about this many moments, evenly spread over the test part; None = all.
        progress: say on stderr what is going on.

    Raises:
        ConfigError: no log, or too few events to split.
    """
    started = time.monotonic()
    log = open_log(log_root)
    times = log.events(columns=["event_time"])
    older, newer = split_by_time(times, TRAIN_SHARE)
    split_ms = int(times_of(newer)[0])
    bundle = train(
        log_root, registry / _REGISTRY, settings, device=device, before_ms=split_ms, promote=False, progress=progress
    )
    trained = time.monotonic()
    predictor = _Predictor(log, list(bundle.items()), split_ms, settings)
    models = Models.load(bundle.path, predictor.replay.catalog, settings, device)
    rows = predictor.predict(models, limit, Reporter(shown=progress))
    return Evaluation(
        dataset=Path(str(log_root)).name,
        events=times.num_rows,
        train_events=older.num_rows,
        predicted_events=predictor.total,
        warm_predicted_events=predictor.warm_total,
        unknown_item_events=predictor.unknown_items,
        rows=rows,
        bundle_version=bundle.version,
        seconds=time.monotonic() - started,
        train_seconds=trained - started,
    )


class _Tally:
    """Ranks that one way to recommend gave to what was then chosen."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._ranks: list[npt.NDArray[np.int64]] = []
        self._warm: list[bool] = []

    def add(self, ranks: npt.NDArray[np.int64], *, warm: bool) -> None:
        """Ranks, 0 = first, of the items of one group."""
        self._ranks.append(ranks)
        self._warm.extend([warm] * len(ranks))

    def quality(self) -> Quality:
        ranks = np.concatenate(self._ranks) if self._ranks else np.zeros(0, np.int64)
        warm = np.array(self._warm, np.bool_)
        return Quality(self._name, *_figures(ranks), *_figures(ranks[warm]))


def _figures(ranks: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """HR@10, NDCG@10, recall@100."""
    if not len(ranks):
        return 0.0, 0.0, 0.0
    first_ten = validation.Quality.of(ranks)
    return first_ten.hr_at_10, first_ten.ndcg_at_10, float((ranks < RECALL_CUTOFF).mean())


def ranks_of(targets: npt.NDArray[np.int64], scores: npt.NDArray[Any], allowed: Mask) -> npt.NDArray[np.int64]:
    """Place of each target among the allowed items, 0 = first. A tie counts as a loss; what is not allowed comes last.

    Args:
        targets: rows of items. [t]
        scores: higher is better. [n]
        allowed: which items may be recommended. [n]
    """
    among = scores[allowed]
    places = np.array([np.count_nonzero(among >= scores[target]) - 1 for target in targets], np.int64)
    return np.where(allowed[targets], places, len(scores))


class _Predictor:
    """Plays the test part of a log and predicts its events in every way."""

    def __init__(self, log: EventLog, items: Sequence[Item], split_ms: int, settings: Settings) -> None:
        self.replay = Replay(items, settings.features)
        self.total = self.warm_total = self.unknown_items = 0
        self._count = len(items)
        self._row_of = {item.item_id: row for row, item in enumerate(items)}
        self._settings = settings
        self._log, self._split_ms = log, split_ms
        self._positive = frozenset(settings.features.positive_kinds)
        self._seen: dict[str, set[int]] = {}
        self._baselines = all_baselines(self._count)
        self._tallies = [_Tally(name) for name in (*(b.name for b in self._baselines), RETRIEVAL, RANKING)]
        entries = list(read_entries(log))
        split = bisect_left(entries, split_ms, key=attrgetter("time_ms"))
        self._newer = entries[split:]
        self._pairs = PairsTimeline(entries, settings)
        for group in self.replay.groups(entries[:split]):
            self._observe(group)
        self._warm = {user for user, state in self.replay.states.items() if state.revision >= WARM_EVENTS}

    def predict(self, models: Models, limit: int | None, reporter: Reporter) -> list[Quality]:
        """Predicts about `limit` moments, all where it is None."""
        moments, number = self._moments(), 0
        every = max(1, round(moments / limit)) if limit else 1
        waiting: list[Group] = []
        with reporter.bar("predicting", moments) as advance:
            for group in self.replay.groups(self._newer):
                if waiting and waiting[0].time_ms < group.time_ms:
                    for earlier in waiting:
                        self._observe(earlier)
                    waiting.clear()
                waiting.append(group)
                targets = self._targets(group)
                if not len(targets):
                    continue
                if number % every == 0:
                    self._predict_group(group, targets, models)
                number += 1
                advance(1)
        return [tally.quality() for tally in self._tallies]

    def _predict_group(self, group: Group, targets: npt.NDArray[np.int64], models: Models) -> None:
        catalog, seen = self.replay.catalog, self._seen.get(group.user_id, set())
        now_ms, state = group.time_ms, self.replay.state(group.user_id)
        known = (self.replay.known_items(now_ms) & catalog.servable(now_ms))[: self._count]
        warm = group.user_id in self._warm
        self.total += len(targets)
        self.warm_total += warm * len(targets)
        self.unknown_items += int((~known[targets]).sum())
        allowed = known.copy()
        allowed[list(seen)] = False
        found = [ranks_of(targets, baseline.scores(group.user_id, now_ms), allowed) for baseline in self._baselines]
        pool, ranked = self._recommend(models, state, catalog, known, seen, now_ms)
        # A user without a vector gets what is popular: so does serving.
        retrieval: npt.NDArray[Any] = catalog.column("log2_popularity")[: self._count, -1]
        if pool.user_vector is not None:
            retrieval = models.item_vectors @ pool.user_vector
        found.append(ranks_of(targets, retrieval, allowed))
        offered = np.zeros(self._count, np.bool_)
        offered[pool.rows] = True
        scores = np.zeros(self._count, np.float32)
        scores[pool.rows] = ranked
        found.append(ranks_of(targets, scores, offered))
        for tally, ranks in zip(self._tallies, found, strict=True):
            tally.add(ranks, warm=warm)

    def _recommend(
        self, models: Models, state: UserState, catalog: Catalog, known: Mask, seen: set[int], now_ms: int
    ) -> tuple[Pool, Floats]:
        # What goes together is learnt from the stream, too: as of now.
        moment = models.moment(catalog, known, now_ms)._replace(pairs=self._pairs.before(now_ms))
        (pool,) = models.pools([state], catalog, moment, [np.fromiter(seen, np.int32, len(seen))])
        (scores,) = models.rank([state], catalog, [pool], now_ms)
        return pool, scores

    def _targets(self, group: Group) -> npt.NDArray[np.int64]:
        """What the user chose at that time for the first time."""
        seen = self._seen.get(group.user_id, set())
        chosen = dict.fromkeys(event.item_id for event in group.events if event.kind in self._positive)
        rows = (self._row_of.get(item_id, -1) for item_id in chosen)
        return np.array([row for row in rows if row >= 0 and row not in seen], np.int64)

    def _observe(self, group: Group) -> None:
        seen = self._seen.setdefault(group.user_id, set())
        for event in group.events:
            row = self._row_of.get(event.item_id, -1)
            if event.kind in self._positive and row >= 0:
                for baseline in self._baselines:
                    baseline.observe(group.user_id, row, group.time_ms)
                seen.add(row)

    def _moments(self) -> int:
        """How many groups have something to predict."""
        events = self._log.events(columns=["user_id", "item_id", "kind", "event_time"])
        chosen = events.filter(pc.is_in(events["kind"].cast(pa.string()), pa.array(sorted(self._positive))))
        first = chosen.group_by(["user_id", "item_id"]).aggregate([("event_time", "min")])
        tested = first.filter(pc.greater_equal(first["event_time_min"].cast(pa.int64()), self._split_ms))
        return int(tested.group_by(["user_id", "event_time_min"]).aggregate([]).num_rows)
