"""What re-ranking costs: `python -m benchmarks.rerank_cost [--quick] [--json]`.

500 candidates of a catalogue of 100,000 items through the re-ranker as serving calls it, on one thread: with nothing
but the blend, and with everything on (rules of every kind that hold, fatigue, diversity by each method, exploration).
Figures: benchmarks/rerank_cost.md. Invariant: every feature that is said to be on does something in every round.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import Command
from core.bundle import Manifest
from core.clock import SystemClock
from core.codec import from_ms
from core.deadline import Deadline
from core.settings import Settings, load_settings
from features import item_stats, windows
from features.catalog import Catalog
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import Item
from headrace.v1.recommender_service_pb2 import RecommendRequest
from serving.budget import Budget
from serving.popular import PopularLists
from serving.query import SOURCE_BIT, Candidates, Query, UserFeatures
from serving.release import Release
from serving.rerank.rules import Rules
from serving.shown import Shown
from serving.stages.rerank import BlendingReRanker
from serving.trace import Trace

_CANDIDATES, _CATEGORIES, _ROUNDS = 500, 40, 2000
_RULES = {
    "pin": [{"item_id": "item-3", "position": 2}, {"item_id": "item-7", "position": 9}],
    "boost": [{"category": "category-5", "amount": 0.1}, {"item_id": "item-11", "amount": 0.3}],
    "bury": [{"category": "category-6", "amount": 0.2}],
    "quota": [
        {"category": "category-1", "within": 20, "at_most": 2},
        {"category": "category-2", "within": 20, "at_least": 3},
    ],
}
_OFF = {"diversity": 0.0, "fatigue_weight": 0.0, "exploration_rate": 0.0}
_ON = {"diversity": 0.1, "fatigue_weight": 0.05, "exploration_rate": 0.5}


class Bench:
    """A release, a user and candidates, made once."""

    def __init__(self, items: int) -> None:
        self._settings = load_settings()
        self._now_ms = SystemClock().now_ms()
        self._catalog = _catalogue(items, self._now_ms, self._settings)
        self._user = UserFeatures("u", _state(self._now_ms, self._settings))
        draw = np.random.default_rng(7)
        self._rows = draw.permutation(items)[:_CANDIDATES].astype(np.int32)
        # Those that the rules and the fatigue speak of are among them.
        self._rows[:30] = np.arange(30)
        self._rows = np.unique(self._rows)
        scores = [draw.random(len(self._rows)).astype(np.float32) for _ in range(4)]
        bits = np.where(draw.random(len(self._rows)) < 0.1, SOURCE_BIT["new"], SOURCE_BIT["ann"]).astype(np.int32)
        self._candidates = Candidates(self._rows, scores[0], scores[1], scores[2], bits, scores[3])

    def times_ms(self, values: dict[str, Any], rules: dict[str, Any], rounds: int) -> list[float]:
        serving = self._settings.serving.model_copy(update=values)
        manifest = Manifest("v", "", "", "", "", 0, 0, 0, len(self._catalog))
        popular = PopularLists(self._catalog, {"all": [], "segments": {}})
        release = Release(manifest, self._catalog, popular, dict(serving.blend_weights), Rules.parse(rules))
        shown = Shown(10, 86_400)
        shown.note("u", [f"item-{number}" for number in range(25)], self._now_ms)
        reranker = BlendingReRanker(serving, self._settings.features, shown)
        times = []
        for number in range(rounds):
            query = self._query(release, serving, number)
            begin = time.perf_counter()
            ranking = reranker.rerank(query, self._user, self._candidates)
            times.append((time.perf_counter() - begin) * 1000)
            assert len(ranking.candidates) == len(self._rows)
            if rules:
                ids = [self._catalog.item_ids[row] for row in ranking.candidates.rows[:10].tolist()]
                assert (ids[2], ids[9]) == ("item-3", "item-7")
                assert {"rules", "fatigue", "diversity"} <= set(ranking.parts)
        return times

    def _query(self, release: Release, serving: Any, number: int) -> Query:
        clock = SystemClock()
        budget = Budget(Deadline.after_ms(250), serving.stage_budget_ms)
        request, trace = RecommendRequest(user_id="u"), Trace(clock)
        name = f"round-{number}"
        return Query(request, name, 20, self._now_ms, release, budget, trace, _CANDIDATES, serving.on(""))


def _catalogue(items: int, now_ms: int, settings: Settings) -> Catalog:
    catalog, draw = Catalog(settings.features), np.random.default_rng(3)
    for number, category in enumerate(draw.integers(0, _CATEGORIES, (items, 2)).tolist()):
        item = Item(item_id=f"item-{number}", categories=[f"category-{one}" for one in dict.fromkeys(category)])
        item.publish_time.CopyFrom(from_ms(now_ms - number * 60_000))
        catalog.upsert(item)
        if number < 2000:
            partial = item_stats.ItemPartial()
            event = UserEvent("x", number, item.item_id, "click", now_ms - number * 1000)
            item_stats.apply(partial, event, settings.features)
            catalog.put_partial(item.item_id, -1, partial)
    return catalog


def _state(now_ms: int, settings: Settings) -> UserState:
    state = UserState()
    events = [
        UserEvent("u", n, f"item-{n + 100}", "click", now_ms - n * 1000, categories=(f"category-{n % 7}",))
        for n in range(50)
    ]
    windows.apply(state, events, settings.features)
    return state


def run(items: int, rounds: int) -> dict[str, Any]:
    bench = Bench(items)
    loads: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "blend alone": (_OFF, {}),
        "all on, mmr": (_ON | {"diversity_method": "mmr"}, _RULES),
        "all on, dpp": (_ON | {"diversity_method": "dpp"}, _RULES),
    }
    found: dict[str, Any] = {"candidates": _CANDIDATES, "items": items, "rounds": rounds}
    for name, (values, rules) in loads.items():
        bench.times_ms(values, rules, rounds // 10)
        found[name] = _spread(bench.times_ms(values, rules, rounds))
    found["p50_ms"] = max(found["all on, mmr"]["p50"], found["all on, dpp"]["p50"])
    found["load_average"] = round(os.getloadavg()[0], 1)
    return found


def _spread(times: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    return {"p50": round(p50, 3), "p99": round(p99, 3)}


def main() -> int:
    command = Command("rerank_cost", __doc__, "5,000 items, 300 rounds")
    return command.run(lambda given, _: run(5000, 300) if given.quick else run(100_000, _ROUNDS), print_result)


def print_result(result: Mapping[str, Any], console: Console) -> None:
    table = Table("what", "p50 ms", "p99 ms", title=f"Re-ranking {_CANDIDATES} candidates", title_justify="left")
    for name in ("blend alone", "all on, mmr", "all on, dpp"):
        table.add_row(name, *map(str, result[name].values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
