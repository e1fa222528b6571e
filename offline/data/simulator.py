"""A shop with known ground truth: users with drifting interests, sessions, lists shown, clicks, carts, purchases.

For the demo, the tests and for trying things out. Invariant: the same configuration with the same `end_time_ms`
gives the same files; everything happens before `end_time_ms`; the truth lies beside the log and not in it.

    OUT/truth.json           the configuration, the categories, the click model
    OUT/truth.safetensors    item_vectors, item_quality, item_category, category_centres,
                             user_interest_start, user_interest_mean, user_interest_end
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from core.clock import Clock, SystemClock
from features.stores.event_rows import EVENTS, IMPRESSIONS, ITEMS, TIME, USERS, from_columns
from offline.data import simulator_sessions as play
from offline.data.dataset import DatasetSummary, Progress, categories_of, no_progress, write_dataset
from offline.data.simulator_sessions import KINDS, SOURCES, Trace
from offline.data.simulator_world import (
    CATEGORIES,
    Catalogue,
    Ints,
    Sessions,
    SimulatorConfig,
    make_catalogue,
    make_sessions,
    make_titles,
)

NAME = "simulated"
_HOUR_MS = 3_600_000
_BLOCK_SESSIONS = 8192
_EVENTS_PER_USER = 30
_TRIAL_USERS, _TRIAL_VISITS = 300, 1200
_COUNTRIES, _DEVICES = ("SE", "DE", "FR", "ES", "PL", "NL"), ("mobile", "desktop", "tablet")
_AGES = ("18-24", "25-34", "35-44", "45-54", "55+")

__all__ = ["NAME", "SimulatorConfig", "simulate"]


def simulate(
    config: SimulatorConfig, out: Path | str, progress: Progress = no_progress, clock: Clock | None = None
) -> DatasetSummary:
    """Simulates a shop and writes its log and its truth to `out`.

    Raises:
        ConfigError: a number out of range.
    """
    started = time.monotonic()
    config.check()
    if config.end_time_ms is None:
        config = replace(config, end_time_ms=(clock or SystemClock()).now_ms() // _HOUR_MS * _HOUR_MS)
    end_ms = config.end_time_ms or 0
    world_rng, people_rng, action_rng, trial_rng = np.random.default_rng(config.seed).spawn(4)
    progress("making items and users", 0.0)
    catalogue = make_catalogue(config, end_ms, world_rng)
    visits = round((config.events or _EVENTS_PER_USER * config.users) / _events_per_visit(config, catalogue, trial_rng))
    sessions = make_sessions(config, catalogue, visits, end_ms, people_rng)
    trace = _play(sessions, catalogue, action_rng, progress)
    progress("writing", 0.8)
    items = _items(catalogue, world_rng)
    devices = people_rng.integers(0, len(_DEVICES), len(sessions.user))
    numbers, list_names, impressions = _impressions(config, trace, sessions, devices, end_ms)
    tables = {
        EVENTS.name: _events(config, trace, sessions, devices, items, list_names[numbers], end_ms),
        IMPRESSIONS.name: impressions,
        ITEMS.name: items,
        USERS.name: _users(config, sessions, people_rng),
    }
    summary = write_dataset(out, NAME, tables, started=started)
    _write_truth(config, catalogue, sessions, out)
    progress("done", 1.0)
    return replace(summary, seconds=time.monotonic() - started)


def _play(sessions: Sessions, catalogue: Catalogue, rng: np.random.Generator, progress: Progress) -> Trace:
    trace = Trace()
    everyone = np.arange(len(sessions.user))
    for begin in range(0, len(everyone), _BLOCK_SESSIONS):
        block = everyone[begin : begin + _BLOCK_SESSIONS]
        for going in play.Block(block, sessions, catalogue, trace, rng).play():
            progress("letting users act", 0.05 + 0.75 * (begin + len(block) - going) / len(everyone))
    return trace


def _events_per_visit(config: SimulatorConfig, catalogue: Catalogue, rng: np.random.Generator) -> float:
    """How much people do in this shop, from a few trial visits: it depends on how much there is to see."""
    end_ms = config.end_time_ms or 0
    some = replace(config, users=min(config.users, _TRIAL_USERS))
    sessions = make_sessions(some, catalogue, _TRIAL_VISITS, end_ms, rng)
    trace = _play(sessions, catalogue, rng, no_progress)
    return max(1.0, float((np.concatenate(trace.time_ms) < end_ms).sum()) / len(sessions.user))


def _items(catalogue: Catalogue, rng: np.random.Generator) -> pa.Table:
    titles, texts = make_titles(catalogue, rng)
    categories = [CATEGORIES[number] for number in catalogue.category.tolist()]
    published = pa.array(catalogue.publish_ms).cast(TIME)
    years = catalogue.publish_ms.astype("datetime64[ms]").astype("datetime64[Y]").astype(int) + 1970
    return from_columns(
        ITEMS,
        {
            "item_id": _names("i", len(categories)),
            "title": titles,
            "categories": [[name.split("/")[0], name] for name in categories],
            "text": texts,
            "year": years.astype(np.int32),
            "price": catalogue.price,
            "publish_time": published,
            "update_time": published,
        },
    )


def _users(config: SimulatorConfig, sessions: Sessions, rng: np.random.Generator) -> pa.Table:
    """Profiles; the segment is the part of the shop that a user liked best at the beginning."""
    first = np.searchsorted(sessions.user, np.arange(config.users))
    favourite = sessions.slots[first, sessions.weights[first].argmax(axis=1)].tolist()
    countries, ages = (rng.integers(0, len(names), config.users).tolist() for names in (_COUNTRIES, _AGES))
    # One in four says what they like, one in twenty what they never want to see.
    stated, refused = rng.random(config.users) < 0.25, rng.random(config.users) < 0.05
    unwanted = rng.integers(0, len(CATEGORIES), config.users)
    preferences = [
        [{"category": CATEGORIES[liked], "weight": 0.8}] * bool(says)
        + [{"category": CATEGORIES[not_liked], "weight": -1.0}] * bool(refuses and not_liked != liked)
        for liked, says, refuses, not_liked in zip(favourite, stated, refused, unwanted.tolist(), strict=True)
    ]
    return from_columns(
        USERS,
        {
            "user_id": _names("u", config.users),
            "labels": [
                [("age_group", _AGES[age]), ("country", _COUNTRIES[country])]
                for age, country in zip(ages, countries, strict=True)
            ],
            "preferences": preferences,
            "segment": [CATEGORIES[number].split("/")[0] for number in favourite],
        },
    )


def _events(
    config: SimulatorConfig,
    trace: Trace,
    sessions: Sessions,
    devices: Ints,
    items: pa.Table,
    list_names: Any,
    end_ms: int,
) -> pa.Table:
    """Events in time order, numbered in it; those of a list carry its recommendation_id as a tag."""
    session, kind, item, times = (
        np.concatenate(part) for part in (trace.session, trace.kind, trace.item, trace.time_ms)
    )
    order = np.argsort(times, kind="stable")
    order = order[times[order] < end_ms]
    session, kind, item, names = session[order], kind[order], item[order], list_names[order]
    listed = names != ""
    item_ids = _take(_names("i", items.num_rows), item)
    tags = pa.MapArray.from_arrays(
        np.append(0, np.cumsum(listed)).astype(np.int32),
        pa.array(["recommendation_id"] * int(listed.sum()), pa.string()),
        pa.array(names[listed].tolist(), pa.string()),
    )
    return from_columns(
        EVENTS,
        _who_and_when(config, sessions, devices, session, times[order])
        | {
            "event_id": [f"sim{config.seed}-{number:09d}" for number in range(len(order))],
            "item_id": item_ids,
            "kind": _take(list(KINDS), kind),
            "value": pa.array(np.concatenate(trace.value)[order], from_pandas=True),
            "surface": _take(["item_page", "home"], listed.astype(np.int64)),
            "tags": tags,
            "categories": categories_of(items, item_ids),
        },
    )


def _impressions(
    config: SimulatorConfig, trace: Trace, sessions: Sessions, devices: Ints, end_ms: int
) -> tuple[Ints, Any, pa.Table]:
    """Lists in time order; also the list number of each event, and the names of the lists by number (last: none)."""
    session, times, items, propensity, score, source = (
        np.concatenate(part)
        for part in (
            trace.list_session,
            trace.list_time_ms,
            trace.list_items,
            trace.list_propensity,
            trace.list_score,
            trace.list_source,
        )
    )
    order = np.argsort(times, kind="stable")
    names = np.full(len(order) + 1, "", dtype=object)
    names[order] = [f"sim{config.seed}-list-{number:08d}" for number in range(len(order))]
    order = order[(times[order] < end_ms) & (items[order, 0] >= 0)]
    shown = items[order] >= 0
    offsets = np.append(0, np.cumsum(shown.sum(axis=1))).astype(np.int32)
    positions = np.broadcast_to(np.arange(shown.shape[1], dtype=np.int32), shown.shape)[shown]
    sources = _take([[name] for name in SOURCES], source[order][shown], pa.list_(pa.string()))
    nested = pa.StructArray.from_arrays(
        [
            _take(_names("i", config.items), items[order][shown]),
            pa.array(positions),
            pa.array(propensity[order][shown]),
            pa.array(score[order][shown]),
            sources,
        ],
        ["item_id", "position", "propensity", "score", "sources"],
    )
    list_names = names[order].tolist()
    columns = _who_and_when(config, sessions, devices, session[order], times[order]) | {
        "event_id": list_names,
        "recommendation_id": list_names,
        "surface": ["home"] * len(order),
        "impressions": pa.ListArray.from_arrays(offsets, nested),
    }
    return np.concatenate(trace.shown), names, from_columns(IMPRESSIONS, columns)


def _who_and_when(
    config: SimulatorConfig, sessions: Sessions, devices: Ints, session: Ints, times: Ints
) -> dict[str, Any]:
    return {
        "user_id": _take(_names("u", config.users), sessions.user[session]),
        "event_time": pa.array(times).cast(TIME),
        "device": _take(list(_DEVICES), devices[session]),
        "session_id": _take(_names("s", len(sessions.user)), session),
    }


def _write_truth(config: SimulatorConfig, catalogue: Catalogue, sessions: Sessions, out: Path | str) -> None:
    mean = np.zeros((config.users, sessions.interest.shape[1]), np.float32)
    np.add.at(mean, sessions.user, sessions.interest)
    mean /= np.bincount(sessions.user, minlength=config.users)[:, None]
    arrays = {
        "item_vectors": catalogue.vectors,
        "item_quality": catalogue.quality,
        "item_category": catalogue.category,
        "category_centres": catalogue.centres,
        "user_interest_start": sessions.interest_start,
        "user_interest_mean": mean,
        "user_interest_end": sessions.interest_end,
    }
    model = {"attraction": play.ATTRACTION, "liking": play.LIKING, "reluctance": play.RELUCTANCE}
    truth = {
        "config": asdict(config),
        "categories": CATEGORIES,
        "click_model": model | {"examination": play.examination().round(6).tolist()},
        "rows": "row n is item i<n> or user u<n>, as numbered in their ids",
    }
    with fsspec.open(f"{out}/truth.safetensors", "wb") as file:
        file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    with fsspec.open(f"{out}/truth.json", "wb") as file:
        file.write(json.dumps(truth, indent=1).encode())


def _names(letter: str, count: int) -> list[str]:
    """Ids in the order of their numbers: i00000, i00001, ..."""
    return [f"{letter}{number:05d}" for number in range(count)]


def _take(names: list[Any], numbers: Ints, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(names, kind or pa.string()).take(pa.array(numbers))
