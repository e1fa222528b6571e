"""What the simulated users do: lists are shown, items are looked at, clicked, put into the cart, bought.

All visits of a block go on in step, as arrays. In each step a user either sees a list, drawn by a mediocre
recommender (popularity, long-term interest and likeness to the last item, with noise), or goes on from the last item
to one like it. Invariant: whether a shown item is clicked depends only on the user's intent, the item and its
position: P(click) = examination(position) * sigmoid(ATTRACTION * cos(intent, item) + LIKING * quality - RELUCTANCE).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from offline.data.simulator_world import NEIGHBOURS, SLOTS, Catalogue, Ints, Sessions, pick, unit

LIST_LENGTH = 10
ATTRACTION, LIKING, RELUCTANCE = 8.0, 0.5, 6.8
KINDS = ("click", "view", "dwell", "cart", "purchase")
CLICK, VIEW, DWELL, CART, PURCHASE = range(len(KINDS))
SOURCES = ("trending", "batch", "item_to_item")
_POOL_PER_SOURCE = 20
_MAX_STEPS, _GO_ON_CHANCE = 14, 0.82
# Items remembered in a visit: they are neither shown again nor gone to again.
_SEEN = 2 * _MAX_STEPS
_BROWSE_CHANCE = 0.4
# After a list without a click the user leaves more often.
_BORED_CHANCE = 0.25
# How much of the intent a clicked item takes over: the next one depends strongly on the last one.
_PULL = 0.55
_DWELL_CHANCE = 0.6

Bools = npt.NDArray[np.bool_]
Times = npt.NDArray[np.int64]


@dataclass
class Trace:
    """What happened, as columns that grow step by step. `shown` of an event is the number of its list, or -1."""

    session: list[Ints] = field(default_factory=list)
    kind: list[Ints] = field(default_factory=list)
    item: list[Ints] = field(default_factory=list)
    time_ms: list[Times] = field(default_factory=list)
    value: list[npt.NDArray[np.float64]] = field(default_factory=list)
    shown: list[Ints] = field(default_factory=list)
    list_session: list[Ints] = field(default_factory=list)
    list_time_ms: list[Times] = field(default_factory=list)
    list_items: list[Ints] = field(default_factory=list)  # [lists, LIST_LENGTH], -1 = shorter list
    list_propensity: list[npt.NDArray[np.float64]] = field(default_factory=list)
    list_score: list[npt.NDArray[np.float64]] = field(default_factory=list)
    list_source: list[Ints] = field(default_factory=list)
    lists: int = 0

    def add(self, kind: int, session: Ints, item: Ints, time_ms: Times, value: npt.ArrayLike, shown: Ints) -> None:
        self.session.append(session)
        self.kind.append(np.full(len(session), kind))
        self.item.append(item)
        self.time_ms.append(time_ms)
        self.value.append(np.broadcast_to(np.asarray(value, np.float64), len(session)))
        self.shown.append(shown)


def examination() -> npt.NDArray[np.float64]:
    """Chance that a position is looked at. Shape [LIST_LENGTH]."""
    chance: npt.NDArray[np.float64] = 1.0 / np.sqrt(1.0 + np.arange(LIST_LENGTH))
    return chance


def click_chance(cosine: npt.NDArray[np.floating], quality: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Chance of a click on an item that is looked at."""
    chance: npt.NDArray[np.float64] = 1.0 / (1.0 + np.exp(RELUCTANCE - ATTRACTION * cosine - LIKING * quality))
    return chance


class Block:
    """Some visits, played together. Visit n of the block is `numbers[n]` of all; `rows` are visits of the block."""

    def __init__(
        self, numbers: Ints, sessions: Sessions, catalogue: Catalogue, trace: Trace, rng: np.random.Generator
    ) -> None:
        self.numbers = numbers
        self.sessions = sessions
        self.catalogue = catalogue
        self.trace = trace
        self.rng = rng
        self.intent = sessions.intent[numbers].copy()
        self.now_ms = sessions.start_ms[numbers].copy()
        self.last = np.full(len(numbers), -1)
        # The newest items of each visit, [n, _SEEN], -1 = none, and how many there were.
        self.seen = np.full((len(numbers), _SEEN), -1)
        self.seen_count = np.zeros(len(numbers), np.int64)

    def play(self) -> Iterator[int]:
        """Plays the visits to their end, yielding after each step how many go on."""
        going = np.arange(len(self.numbers))
        for _ in range(_MAX_STEPS):
            browsing = (self.last[going] >= 0) & (self.rng.random(len(going)) < _BROWSE_CHANCE)
            bored = self.look_at_lists(going[~browsing])
            self.browse(going[browsing])
            going = np.setdiff1d(going, bored)
            going = going[self.rng.random(len(going)) < _GO_ON_CHANCE]
            yield len(going)
            if not len(going):
                return

    def look_at_lists(self, rows: Ints) -> Ints:
        """Shows a list to each; returns those who leave because nothing in it was for them."""
        if not len(rows):
            return rows
        items, listed = self._draw_lists(rows)
        cosine = np.einsum("nd,nld->nl", self.intent[rows], self.catalogue.vectors[items])
        chance = examination() * click_chance(cosine, self.catalogue.quality[items])
        clicked = (self.rng.random(items.shape) < chance) & (self.trace.list_items[-1] >= 0)
        dwell_ms = self._dwell_ms(cosine)
        # One after the other, from the top; an item is read before the next one is clicked.
        spent = np.cumsum(np.where(clicked, dwell_ms + 2000, 0), axis=1)
        reading_ms = 1500 * (1 + np.arange(LIST_LENGTH))
        time_ms = self.now_ms[rows][:, None] + reading_ms + np.where(clicked, spent - dwell_ms - 2000, spent)
        row, column = np.nonzero(clicked)
        self.trace.add(CLICK, self.numbers[rows[row]], items[row, column], time_ms[row, column], np.nan, listed[row])
        self._after(rows[row], items[row, column], time_ms[row, column], dwell_ms[row, column], listed[row])
        self._move_on(rows[row], items[row, column])
        self.now_ms[rows] += spent[:, -1] + 1500 * LIST_LENGTH
        bored = ~clicked.any(axis=1) & (self.rng.random(len(rows)) < _BORED_CHANCE)
        return rows[bored]

    def browse(self, rows: Ints) -> None:
        """Goes on from the last item to one of its neighbours, by intent."""
        if not len(rows):
            return
        nearby = self.catalogue.neighbours[self.last[rows]]
        liking = 8.0 * np.einsum("nd,nkd->nk", self.intent[rows], self.catalogue.vectors[nearby])
        # The first neighbours are the likeliest, whoever comes by: what a Markov chain can learn.
        liking = liking - 0.35 * np.arange(NEIGHBOURS) + self.rng.gumbel(size=liking.shape)
        liking[self._out_of_reach(rows, nearby)] = -np.inf
        best = np.argmax(liking, axis=1)
        there = np.isfinite(liking[np.arange(len(rows)), best])
        rows, items = rows[there], nearby[np.arange(len(nearby)), best][there]
        nothing = np.full(len(rows), -1)
        self.trace.add(VIEW, self.numbers[rows], items, self.now_ms[rows].copy(), np.nan, nothing)
        dwell_ms = self._dwell_ms(np.einsum("nd,nd->n", self.intent[rows], self.catalogue.vectors[items]))
        self._after(rows, items, self.now_ms[rows].copy(), dwell_ms, nothing)
        self._move_on(rows, items)
        self.now_ms[rows] += dwell_ms + 3000

    def _draw_lists(self, rows: Ints) -> tuple[Ints, Ints]:
        """Draws and records a list for each; returns items (n, LIST_LENGTH) and the numbers of the lists."""
        pool, source = self._pool(rows)
        score = self._recommender_score(rows, pool)
        order = np.argsort(-(score + self.rng.gumbel(size=score.shape)), axis=1)
        score = np.take_along_axis(score, order, axis=1)
        # Gumbel noise makes a Plackett-Luce draw: each place goes to one of what is left, by exp(score).
        peak = score.max(axis=1, keepdims=True)
        weight = np.exp(score - np.where(np.isfinite(peak), peak, 0.0))
        left = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1]
        top = order[:, :LIST_LENGTH]
        items = np.take_along_axis(pool, top, axis=1)
        shown = np.isfinite(score[:, :LIST_LENGTH])
        trace = self.trace
        trace.list_session.append(self.numbers[rows])
        trace.list_time_ms.append(self.now_ms[rows].copy())
        trace.list_items.append(np.where(shown, items, -1))
        trace.list_propensity.append((weight / np.maximum(left, 1e-300))[:, :LIST_LENGTH])
        trace.list_score.append(score[:, :LIST_LENGTH])
        trace.list_source.append(np.take_along_axis(source, top, axis=1))
        listed = trace.lists + np.arange(len(rows))
        trace.lists += len(rows)
        return items, listed

    def _pool(self, rows: Ints) -> tuple[Ints, Ints]:
        """Candidates of each list: popular ones, ones of the user's interests, ones like the last item."""
        shape = (len(rows), _POOL_PER_SOURCE)
        cumulated = np.cumsum(self.catalogue.popularity)
        popular = np.searchsorted(cumulated, self.rng.random(shape) * cumulated[-1])
        liked = self._of_interests(rows)
        near = self.catalogue.neighbours[self.last[rows][:, None], self.rng.integers(0, NEIGHBOURS, shape)]
        related = np.where(self.last[rows][:, None] >= 0, near, self._of_interests(rows))
        pool = np.concatenate([popular, liked, related], axis=1)
        source = np.broadcast_to(np.repeat(np.arange(len(SOURCES)), _POOL_PER_SOURCE), pool.shape)
        order = np.argsort(pool, axis=1, kind="stable")
        return np.take_along_axis(pool, order, axis=1), np.take_along_axis(source, order, axis=1)

    def _of_interests(self, rows: Ints) -> Ints:
        numbers = np.repeat(self.numbers[rows], _POOL_PER_SOURCE)
        slot = pick(self.sessions.weights[numbers], self.rng.random(len(numbers)))
        category = self.sessions.slots[numbers, slot % SLOTS]
        catalogue = self.catalogue
        low, high = (catalogue.category_weights[catalogue.category_bounds[category + end]] for end in (0, 1))
        place = np.searchsorted(catalogue.category_weights, low + self.rng.random(len(numbers)) * (high - low), "right")
        return catalogue.by_category[np.minimum(place - 1, len(catalogue.by_category) - 1)].reshape(len(rows), -1)

    def _recommender_score(self, rows: Ints, pool: Ints) -> npt.NDArray[np.float64]:
        """Higher = more likely shown; -inf = out of reach, or twice in the (sorted) pool."""
        vectors = self.catalogue.vectors[pool]
        interest = self.sessions.interest[self.numbers[rows]]
        known = (self.last[rows] >= 0)[:, None]
        liked = np.einsum("nd,npd->np", interest, vectors)
        alike = np.einsum("nd,npd->np", self.catalogue.vectors[self.last[rows]], vectors)
        score = 0.5 * self.catalogue.quality[pool] + 2.5 * liked + np.where(known, 2.0 * alike, 0.0)
        score[self._out_of_reach(rows, pool)] = -np.inf
        score[:, 1:][pool[:, 1:] == pool[:, :-1]] = -np.inf
        scores: npt.NDArray[np.float64] = score.astype(np.float64)
        return scores

    def _out_of_reach(self, rows: Ints, items: Ints) -> Bools:
        """Items [n, m] that are not published yet, or that the visitor has just seen."""
        seen = (items[:, :, None] == self.seen[rows][:, None, :]).any(axis=2)
        out: Bools = seen | (self.catalogue.publish_ms[items] > self.now_ms[rows][:, None])
        return out

    def _after(self, rows: Ints, items: Ints, time_ms: Times, dwell_ms: Times, shown: Ints) -> None:
        """What follows a look at an item: its dwell, perhaps the cart, perhaps the purchase."""
        numbers, rng = self.numbers[rows], self.rng
        stays = rng.random(len(rows)) < _DWELL_CHANCE
        done_ms = time_ms + dwell_ms
        self.trace.add(DWELL, numbers[stays], items[stays], done_ms[stays], dwell_ms[stays] / 1000, shown[stays])
        cosine = np.einsum("nd,nd->n", self.intent[rows], self.catalogue.vectors[items])
        carts = rng.random(len(rows)) < 0.3 * click_chance(cosine, self.catalogue.quality[items])
        self.trace.add(CART, numbers[carts], items[carts], done_ms[carts] + 500, np.nan, shown[carts])
        buys = carts & (rng.random(len(rows)) < 0.4)
        self.trace.add(
            PURCHASE, numbers[buys], items[buys], done_ms[buys] + 1500, self.catalogue.price[items[buys]], shown[buys]
        )

    def _move_on(self, rows: Ints, items: Ints) -> None:
        # Of several clicks in a row (rows repeat) the last one stays: assignment goes in order.
        self.last[rows] = items
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        self.seen[rows, (self.seen_count[rows] + place) % _SEEN] = items
        np.add.at(self.seen_count, rows, 1)
        final = self.last[rows]
        self.intent[rows] = unit((1 - _PULL) * self.intent[rows] + _PULL * self.catalogue.vectors[final])

    def _dwell_ms(self, cosine: npt.NDArray[np.floating]) -> Times:
        """Time spent with an item: longer where it fits the intent."""
        seconds = np.exp(1.8 + 1.6 * cosine + 0.5 * self.rng.normal(size=cosine.shape))
        milliseconds: Times = (np.clip(seconds, 1, 600) * 1000).astype(np.int64)
        return milliseconds
