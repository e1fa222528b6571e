"""Item vectors as towers make them, and users as they ask: for the figures of the index, at any size.

Pure: the same arguments give the same vectors. Items: topics within fields (`sqrt(n)` topics, 16 to a field), of Zipf
sizes (exponent 0.8), each item at its topic's centre plus noise of nine tenths of a centre's length. Users: the
decayed sum (0.8 a step) of ten items out of one to three topics, plus noise: near items, never one. Invariant: all
have length 1, and no user is asked twice.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_TOPICS_PER_FIELD, _ZIPF = 16, 0.8
# Lengths of: field in a topic's centre, own part of a centre, noise of an item, noise of a user.
_FIELD, _OWN, _ITEM_NOISE, _USER_NOISE = 0.9, 0.7, 0.9, 0.4
_HISTORY, _DECAY = 10, 0.8


class VectorWorld(NamedTuple):
    """Who may be found, and who asks."""

    items: Floats  # [n, d]
    users: Floats  # [u, d]


def vector_world(items: int, users: int, dimension: int = 64, seed: int = 0) -> VectorWorld:
    """So many items, and so many users of theirs."""
    rng = np.random.default_rng(seed)
    topics = max(20, int(np.sqrt(items)))
    fields = rng.normal(size=(max(4, topics // _TOPICS_PER_FIELD), dimension))
    centres = _FIELD * fields[rng.integers(len(fields), size=topics)] + _OWN * rng.normal(size=(topics, dimension))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    shares = np.arange(1, topics + 1) ** -_ZIPF
    topic_of = np.sort(rng.choice(topics, items, p=shares / shares.sum()))
    vectors = rng.standard_normal((items, dimension), np.float32) * np.float32(_ITEM_NOISE / np.sqrt(dimension))
    vectors += centres[topic_of].astype(np.float32)
    # Rows say nothing about topics.
    order = rng.permutation(items)
    vectors = _unit(vectors[order])
    members = np.argsort(topic_of[order], kind="stable")
    bounds = np.searchsorted(topic_of, np.arange(topics + 1))
    asked = np.stack([_user(rng, vectors, members, bounds, topic_of) for _ in range(users)])
    return VectorWorld(vectors, _unit(asked))


def _user(
    rng: np.random.Generator,
    vectors: Floats,
    members: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    topic_of: npt.NDArray[np.int64],
) -> Floats:
    # Topics in proportion to their sizes: those of items drawn at random.
    liked = topic_of[rng.integers(len(topic_of), size=rng.integers(1, 4))]
    history = [members[rng.integers(bounds[topic], bounds[topic + 1])] for topic in rng.choice(liked, _HISTORY)]
    weights = _DECAY ** np.arange(_HISTORY)
    mixed = _unit((weights @ vectors[history])[None, :])[0]
    return np.asarray(mixed + rng.normal(size=len(mixed)) * (_USER_NOISE / np.sqrt(len(mixed))), np.float32)


def _unit(vectors: npt.NDArray[np.floating]) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
