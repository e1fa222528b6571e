"""Forward decay: exponentially decayed sums that do not care about the order of arrival.

Used by user states and item statistics. A sum over events (t_i, w_i) with half-life h is kept as
`total = sum(w_i * 2^(t_i/h - landmark))`, the landmark being a whole number of half-lives; the value at time t is
`total * 2^(landmark - t/h)`. Source: Cormode et al., "Forward Decay: A Practical Time Decay Model for Streaming
Systems", ICDE 2009. Invariant: moving the landmark is a multiplication by a power of two, hence exact, so sums of
the same events differ by rounding of additions only, whatever their order.
"""

import math
from functools import lru_cache

# Nobody asks for a time so many half-lives before an event, except by a mistaken clock or unit.
MAX_DOUBLINGS = 100


def landmark_weight(time_ms: int, half_life_ms: int) -> tuple[int, float]:
    """Landmark of an event and the growth of its weight since then, in 1..2."""
    landmark, rest_ms = divmod(time_ms, half_life_ms)
    return landmark, 2.0 ** (rest_ms / half_life_ms)


@lru_cache(maxsize=16_384)
def landmark_weights(time_ms: int, half_lives_seconds: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    """`landmark_weight` of each half-life. Kept: an event counts for its user and for its item, a batch later."""
    return tuple(landmark_weight(time_ms, seconds * 1000) for seconds in half_lives_seconds)


def value_at(landmark: int, total: float, half_life_ms: int, time_ms: int) -> float:
    """The decayed sum as of `time_ms`. Before the events a sum is larger; decades before, it stays a number."""
    whole, growth = landmark_weight(time_ms, half_life_ms)
    return math.ldexp(total, min(max(landmark - whole, -2000), MAX_DOUBLINGS)) / growth


def add(landmark: int, total: float, other_landmark: int, other_total: float) -> tuple[int, float]:
    """Sum of two forward-decayed sums of one half-life, at the later landmark."""
    if other_landmark == landmark:
        return landmark, total + other_total
    if other_landmark > landmark:
        return other_landmark, other_total + math.ldexp(total, max(landmark - other_landmark, -2000))
    return landmark, total + math.ldexp(other_total, max(other_landmark - landmark, -2000))
