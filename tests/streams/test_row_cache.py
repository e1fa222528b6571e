"""Rows in memory."""

from streams.row_cache import Entry, RowCache


def cache_of(*keys: str, capacity: int = 3) -> RowCache[str, int]:
    cache: RowCache[str, int] = RowCache(capacity)
    for number, key in enumerate(keys):
        cache[key] = Entry(number, b"", number % 2)
    return cache


def test_what_was_used_least_recently_leaves_and_only_when_it_is_told_to() -> None:
    cache = cache_of("a", "b", "c", "d", "e")
    assert cache.missing(["a", "x", "b"]) == ["x"]
    assert list(cache) == ["c", "d", "e", "a", "b"]
    cache.shrink()
    assert list(cache) == ["e", "a", "b"]
    cache.shrink()
    assert len(cache) == 3


def test_partitions_that_are_given_up_leave() -> None:
    cache = cache_of("a", "b", "c", "d", "e")
    cache.drop({1})
    assert list(cache) == ["a", "c", "e"]
    cache.drop({1, 7})
    assert list(cache) == ["a", "c", "e"]
