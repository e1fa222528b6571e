"""The simulated world: a catalogue with latent vectors, and users whose interests drift from session to session.

First half of the simulator; offline/data/simulator_sessions.py lets the users act in it. Invariant: a world is a
function of its configuration (seed and end time included); all vectors have length 1, so an affinity is a cosine.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from offline.data.simulator_words import ADJECTIVES, PLAIN_TEXT, SERIES, SHOP

DIMENSION = 16
NEIGHBOURS = 12
SLOTS = 3
DAY_MS = 86_400_000
CATEGORIES = tuple(f"{top}/{name}" for top, names in SHOP.items() for name in names)
# How far items lie from the centre of their category, and categories from that of their top level.
_ITEM_SPREAD, _CATEGORY_SPREAD = 0.75, 0.9
# Items that appear while the users are there.
_NEW_SHARE = 0.15
# Per session: width of the step of an interest's weight, and chance that an interest gives way to another one.
_DRIFT, _JUMP_CHANCE = 0.25, 0.03

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SimulatorConfig:
    """What to simulate."""

    users: int = 2000
    items: int = 1000
    days: int = 14
    seed: int = 7
    # Roughly how many events come out (some per cent more or less); None = 30 per user.
    events: int | None = None
    # Everything happens before this time; None = now, rounded down to the hour. Give it for a repeatable result.
    end_time_ms: int | None = None

    def check(self) -> None:
        for name, least, most in (("users", 1, 10_000_000), ("items", 20, 10_000_000), ("days", 1, 3650)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: {getattr(self, name)} is not in {least}..{most}")
        if self.events is not None and self.events < self.users:
            raise ConfigError(f"events: at least one per user ({self.users}) is needed, not {self.events}")


@dataclass(frozen=True)
class Catalogue:
    """Items by number."""

    centres: Floats  # [categories, dimension]
    vectors: Floats  # [items, dimension]
    category: Ints  # [items]
    # Standard normal: what all users like about it.
    quality: Floats  # [items]
    price: npt.NDArray[np.float64]  # [items]
    publish_ms: Ints  # [items]
    # Items that people go to next from each item: alike, but not the same both ways.
    neighbours: Ints  # [items, NEIGHBOURS]

    @cached_property
    def popularity(self) -> npt.NDArray[np.float64]:
        """Weights by which items are found, not normalised. Shape [items]."""
        return np.exp(1.1 * self.quality.astype(np.float64))

    @cached_property
    def by_category(self) -> Ints:
        """Item numbers, category by category."""
        return np.argsort(self.category, kind="stable")

    @cached_property
    def category_weights(self) -> npt.NDArray[np.float64]:
        """Running sum of popularity over `by_category`, with a zero in front. Shape [items + 1]."""
        return np.append(0.0, np.cumsum(self.popularity[self.by_category]))

    @cached_property
    def category_bounds(self) -> Ints:
        """Where each category begins in `by_category`, and the end. Shape [categories + 1]."""
        return np.searchsorted(self.category[self.by_category], np.arange(len(self.centres) + 1))


@dataclass(frozen=True)
class Sessions:
    """All visits, ordered by user, then by time. Lists of n sessions and u users."""

    user: Ints  # [n]
    start_ms: Ints  # [n]
    # The user's interests at that time: categories, their weights (sum 1), and the vector that they make.
    slots: Ints  # [n, SLOTS]
    weights: Floats  # [n, SLOTS]
    interest: Floats  # [n, dimension]
    # What the user is after in this visit; the first of the interests by chance.
    intent: Floats  # [n, dimension]
    interest_start: Floats  # [u, dimension]
    interest_end: Floats  # [u, dimension]


def make_catalogue(config: SimulatorConfig, end_ms: int, rng: np.random.Generator) -> Catalogue:
    tops = unit(rng.normal(size=(len(SHOP), DIMENSION)))
    top_of = np.repeat(np.arange(len(SHOP)), [len(names) for names in SHOP.values()])
    centres = unit(tops[top_of] + _CATEGORY_SPREAD * unit(rng.normal(size=(len(CATEGORIES), DIMENSION))))
    shares = rng.dirichlet(np.full(len(CATEGORIES), 4.0))
    category = rng.choice(len(CATEGORIES), config.items, p=shares)
    # No category is empty.
    category[: len(CATEGORIES)] = np.arange(len(CATEGORIES))
    vectors = unit(centres[category] + _ITEM_SPREAD * unit(rng.normal(size=(config.items, DIMENSION))))
    start_ms = end_ms - config.days * DAY_MS
    old = start_ms - rng.integers(0, 700 * DAY_MS, config.items)
    new = start_ms + (rng.random(config.items) * (end_ms - start_ms)).astype(np.int64)
    is_new = rng.random(config.items) < _NEW_SHARE
    is_new[: len(CATEGORIES)] = False
    level = rng.uniform(2.0, 5.0, len(CATEGORIES))
    return Catalogue(
        centres=centres,
        vectors=vectors,
        category=category,
        quality=rng.normal(size=config.items).astype(np.float32),
        price=np.exp(level[category] + 0.5 * rng.normal(size=config.items)).round(2).astype(np.float64),
        publish_ms=np.where(is_new, new, old) // 1000 * 1000,
        neighbours=_neighbours(vectors, category, rng),
    )


def _neighbours(vectors: Floats, category: Ints, rng: np.random.Generator) -> Ints:
    """For each item the next ones of its category, by likeness and by chance (so the way back differs)."""
    neighbours = np.empty((len(vectors), NEIGHBOURS), np.int64)
    for number in range(len(CATEGORIES)):
        members = np.flatnonzero(category == number)
        for part in np.array_split(members, 1 + len(members) // 2000):
            likeness = vectors[part] @ vectors[members].T + rng.gumbel(scale=0.15, size=(len(part), len(members)))
            likeness[part[:, None] == members[None, :]] = -np.inf
            best = np.argsort(-likeness, axis=1)[:, :NEIGHBOURS]
            # A category smaller than the list repeats itself.
            neighbours[part] = np.resize(members[best].T, (NEIGHBOURS, len(part))).T
    return neighbours


def make_sessions(
    config: SimulatorConfig, catalogue: Catalogue, count: int, end_ms: int, rng: np.random.Generator
) -> Sessions:
    """About `count` visits of all users, at least one each."""
    activity = rng.lognormal(sigma=0.8, size=config.users)
    visits = 1 + rng.poisson(activity / activity.sum() * max(0, count - config.users))
    user = np.repeat(np.arange(config.users), visits)
    start_ms = _start_times(user, config, end_ms, rng)
    first = np.append(0, np.cumsum(visits)[:-1])
    slots, weights, interest = _drift(visits, first, catalogue, rng)
    taste = unit(rng.normal(size=(config.users, DIMENSION)))
    interest = unit(interest + 0.4 * taste[user])
    chosen = pick(weights, rng.random(len(user)))
    topic = catalogue.centres[slots[np.arange(len(user)), chosen]]
    intent = unit(topic + 0.4 * taste[user] + 0.3 * unit(rng.normal(size=topic.shape)))
    last = first + visits - 1
    return Sessions(user, start_ms, slots, weights, interest, intent, interest[first], interest[last])


def _start_times(user: Ints, config: SimulatorConfig, end_ms: int, rng: np.random.Generator) -> Ints:
    """Visits through the days, few at night; sorted within each user."""
    hours = np.arange(24)
    by_hour = 0.15 + np.exp(-(((hours - 20) / 3.5) ** 2)) + 0.6 * np.exp(-(((hours - 12) / 3.0) ** 2))
    hour = rng.choice(24, len(user), p=by_hour / by_hour.sum())
    day = rng.integers(0, config.days, len(user))
    first_day = end_ms - config.days * DAY_MS
    # Hours of the day are UTC; the window may begin at any hour, so they wrap around in it.
    offset = (hour * 3_600_000 - first_day) % DAY_MS + rng.integers(0, 3_600_000, len(user))
    start_ms = first_day + day * DAY_MS + offset % DAY_MS
    return start_ms[np.lexsort((start_ms, user))]


def _drift(visits: Ints, first: Ints, catalogue: Catalogue, rng: np.random.Generator) -> tuple[Ints, Floats, Floats]:
    """Interests of every visit: weights walk a little each time, and now and then one interest is replaced."""
    users = len(visits)
    slots = np.argsort(rng.random((users, len(CATEGORIES))), axis=1)[:, :SLOTS]
    logits = rng.normal(scale=0.8, size=(users, SLOTS))
    all_slots = np.empty((visits.sum(), SLOTS), np.int64)
    all_weights = np.empty((visits.sum(), SLOTS), np.float32)
    for visit in range(visits.max()):
        there = np.flatnonzero(visits > visit)
        if visit:
            logits[there] += _DRIFT * rng.normal(size=(len(there), SLOTS))
            jumping = there[rng.random(len(there)) < _JUMP_CHANCE]
            slots[jumping, rng.integers(0, SLOTS, len(jumping))] = rng.integers(0, len(CATEGORIES), len(jumping))
        weights = np.exp(logits[there] - logits[there].max(axis=1, keepdims=True))
        all_slots[first[there] + visit] = slots[there]
        all_weights[first[there] + visit] = weights / weights.sum(axis=1, keepdims=True)
    interest = unit(np.einsum("nk,nkd->nd", all_weights, catalogue.centres[all_slots]))
    return all_slots, all_weights, interest


def make_titles(catalogue: Catalogue, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """A title and a text for each item, mostly of words of its category."""
    words = [parts for names in SHOP.values() for parts in names.values()]
    nouns, typical = [parts[0].split() for parts in words], [parts[1].split() for parts in words]
    plain_words = PLAIN_TEXT.split()
    titles, texts = [], []
    draws = rng.integers(0, 1 << 30, (len(catalogue.category), 18))
    for category, draw in zip(catalogue.category.tolist(), draws.tolist(), strict=True):
        noun = nouns[category][draw[0] % len(nouns[category])].replace("-", " ")
        series = f"{SERIES[draw[1] % len(SERIES)]} {10 + draw[2] % 90}"
        titles.append(f"{ADJECTIVES[draw[3] % len(ADJECTIVES)]} {noun.capitalize()} {series}")
        own = [typical[category][number % len(typical[category])] for number in draw[4:12]]
        plain = [plain_words[number % len(plain_words)] for number in draw[12:]]
        texts.append(" ".join([noun.lower(), *own, *plain]))
    return titles, texts


def pick(weights: Floats, uniform: npt.NDArray[np.float64]) -> Ints:
    """A column of each row, by the row's weights (sum 1) and a uniform number. Shape [n]."""
    below: Ints = (np.cumsum(weights, axis=1) < uniform[:, None]).sum(axis=1)
    columns: Ints = np.minimum(below, weights.shape[1] - 1)
    return columns


def unit(vectors: npt.NDArray[np.floating]) -> Floats:
    """Rows scaled to length 1."""
    scaled: Floats = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return scaled
