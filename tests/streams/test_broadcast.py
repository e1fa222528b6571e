"""The broadcast sends the newest row of each item, and slows down when thousands change at once."""

from core.clock import ManualClock
from streams.broadcast import StatsBroadcast


class Kafka:
    """Takes everything."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, bytes]] = []

    def post(self, topic: str, key: bytes, value: bytes) -> bool:
        self.sent.append((key, value))
        return True


def test_only_the_newest_row_of_an_item_is_sent() -> None:
    kafka, clock = Kafka(), ManualClock()
    broadcast = StatsBroadcast(kafka, "stats", 50, clock)
    broadcast.put({("a", 0): b"1", ("b", 0): b"1"})
    broadcast.put({("a", 0): b"2"})
    broadcast.tick()
    assert kafka.sent == [(b"a\x000", b"2"), (b"b\x000", b"1")]
    broadcast.put({("a", 0): b"3"})
    broadcast.tick()
    assert len(kafka.sent) == 2
    clock.advance(60)
    broadcast.tick()
    assert kafka.sent[2:] == [(b"a\x000", b"3")]


def test_it_says_when_everything_was_told_and_forgets_what_is_another_workers() -> None:
    kafka, clock = Kafka(), ManualClock()
    broadcast = StatsBroadcast(kafka, "stats", 50, clock)
    broadcast.put({("a", 0): b"1"})
    assert broadcast.tick()
    broadcast.put({("a", 0): b"2", ("a", 1): b"2"})
    assert not broadcast.tick()
    broadcast.forget({0})
    clock.advance(60)
    assert broadcast.tick()
    assert kafka.sent == [(b"a\x000", b"1"), (b"a\x001", b"2")]


def test_many_rows_at_once_are_followed_by_a_longer_pause() -> None:
    kafka, clock = Kafka(), ManualClock()
    broadcast = StatsBroadcast(kafka, "stats", 50, clock)
    broadcast.put({(f"item {number}", 0): b"" for number in range(1000)})
    broadcast.tick()
    broadcast.put({("a", 0): b"1"})
    clock.advance(800)
    broadcast.tick()
    assert len(kafka.sent) == 1000
    clock.advance(400)
    broadcast.tick()
    assert len(kafka.sent) == 1001
    broadcast.put({("a", 0): b"2"})
    broadcast.tick(now=True)
    assert len(kafka.sent) == 1002
