"""The fuzzing test: `python -m benchmarks.fuzz [--messages N] [--seed S] [--quick] [--json]`.

Bad messages between good ones, on all inbound topics of a real Kafka, against one `python -m streams`: every source
position must come to rest in the event log or in the dead letters, the states must be those of one pass over the good
ones, and the worker must neither restart nor grow. Figures: benchmarks/fuzz.md. Invariant: exit code 0 only when
nothing is lost, doubled, damaged or out of place.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import stream_readings as readings
from benchmarks.command import Command
from benchmarks.fuzz_load import PROFILE_PREFIX, FuzzConfig, Fuzzed, FuzzLoad
from benchmarks.fuzz_messages import Expected
from benchmarks.fuzz_sender import ProcessWatch, Sender, allow_megabytes
from benchmarks.stream_cluster import Cluster, running_cluster
from benchmarks.stream_truth import Logged, Place, SinglePass
from core.codec import from_ms
from core.topics import dead_letter
from devstack.kafka_local import kafka_home, local_kafka_problem
from devstack.stack import EMBEDDED, LOCAL
from features.stores import event_rows
from features.stores.online import OnlineStore
from features.windows import UserState
from headrace.v1.events_pb2 import DeadLetter, Event, Item

WORKER = "streams-1"
MESSAGES, QUICK_MESSAGES = 200_000, 12_000
# Readings of the memory after these shares of the load. Before the first one the worker has had its largest batch
# (`streams.poll_max_events`), whose memory it keeps.
STAGES = (0.25, 0.6, 1.0)
# Small, so that the caches are full at the first reading.
_CACHED_USERS = 50
_ITEMS = 200
_SETTLE_SECONDS = 300.0
_POLL_SECONDS = 0.5
# From the first reading to the last: what an allocator needs to come to rest.
_GROWTH_MAX = 1.15
_SHOWN = 5
_TABLES = (
    event_rows.EVENTS,
    event_rows.FEEDBACK,
    event_rows.IMPRESSIONS,
    event_rows.ITEMS,
    event_rows.USERS,
)
_BEGIN = time.monotonic()


@dataclass
class Result:
    """What was sent and what came of it."""

    messages: int = 0
    dead_lettered: int = 0
    processed: int = 0
    # Positions that are nowhere, or in the log twice, or both in the log and in the dead letters.
    unaccounted: int = 0
    restarts: int = 0
    rss_mb: list[float] = field(default_factory=list)
    rss_mb_peak: float = 0.0
    refused_by_kafka: int = 0
    # Against what the contract says of the message.
    unexpected: int = 0
    # Letters that are not the original bytes.
    damaged_letters: int = 0
    user_state_mismatches: int = 0
    item_stat_mismatches: int = 0
    not_finite_states: int = 0
    back_to_marker: int = 0
    follow_ups: int = 0
    follow_ups_processed: int = 0
    seconds: float = 0.0

    @property
    def flat(self) -> bool:
        return self.rss_mb[-1] <= self.rss_mb[0] * _GROWTH_MAX

    @property
    def good(self) -> bool:
        wrong = (
            self.unaccounted
            + self.restarts
            + self.unexpected
            + self.damaged_letters
            + self.user_state_mismatches
            + self.item_stat_mismatches
            + self.not_finite_states
            + self.back_to_marker
        )
        return wrong == 0 and self.follow_ups_processed == self.follow_ups and self.flat

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        first, half, last = (round(rss, 1) for rss in values.pop("rss_mb"))
        values["rss_mb_peak"], values["seconds"] = round(self.rss_mb_peak, 1), round(self.seconds, 1)
        return {**values, "rss_mb_first": first, "rss_mb_half": half, "rss_mb_last": last}


def run(messages: int, seed: int, home: Path) -> Result:
    """The whole test below `home`."""
    begin, result = time.monotonic(), Result(messages)
    problem = local_kafka_problem(kafka_home())
    if problem:
        say(f"on the embedded broker, which is no real Kafka: {problem}")
    kafka = EMBEDDED if problem else LOCAL
    with running_cluster(home, (WORKER,), kafka, state_cache_users=_CACHED_USERS) as cluster:
        if kafka == LOCAL:
            allow_megabytes(cluster)
        items = [Item(item_id=f"item-{number}", categories=[f"c{number % 9}"]) for number in range(_ITEMS)]
        load = FuzzLoad(FuzzConfig(messages, seed=seed), cluster.topics, items)
        sender, store = Sender(cluster), cluster.store()
        with _watching(cluster) as watch:
            _feed(cluster, store, load, sender, watch, result)
            _follow_up(cluster, store, load, sender, result)
            result.restarts, result.rss_mb_peak = watch.restarts, watch.peak_mb
        metrics = cluster.metrics(WORKER)
        result.back_to_marker = int(metrics.get("headrace_streams_back_to_marker_total", 0))
        cluster.stop(WORKER)
        result.refused_by_kafka = sender.refused.total()
        for reason, count in sender.refused.items():
            say(f"{count} messages were refused before the worker could see them: {reason}")
        _account(cluster, store, sender, result)
        store.close()
    result.seconds = time.monotonic() - begin
    return result


def _feed(
    cluster: Cluster, store: OnlineStore, load: FuzzLoad, sender: Sender, watch: ProcessWatch, result: Result
) -> None:
    """Sends the load in stages; after each, when the worker is done with it, reads the memory."""
    messages, done = iter(load), 0
    for share in STAGES:
        wanted = int(result.messages * share)
        say(f"sending messages {done:,} to {wanted:,}")
        sender.send(islice(messages, wanted - done))
        done = wanted
        if not _settled(cluster, store, sender):
            say("not everything has come to rest in time")
        result.rss_mb.append(watch.rss_mb())
        say(f"at {share:.0%} the worker has {result.rss_mb[-1]:.0f} MB")


def _settled(cluster: Cluster, store: OnlineStore, sender: Sender) -> bool:
    """Waits until the markers are at the ends and every position is in the event log or in the dead letters."""
    limit = time.monotonic() + _SETTLE_SECONDS
    if not readings.wait_for_markers(cluster, store, _SETTLE_SECONDS):
        return False
    while time.monotonic() < limit:
        rested = set(readings.logged_places(cluster, _TABLES)) | _letters(cluster).keys()
        if sender.placed.keys() <= rested:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _follow_up(cluster: Cluster, store: OnlineStore, load: FuzzLoad, sender: Sender, result: Result) -> None:
    """One good event for each user; it counts when the user's row includes its position."""
    before, now_ms = set(sender.placed), time.time_ns() // 1_000_000
    events = (
        Event(event_id=f"after-{number}", user_id=user_id, item_id="item-1", kind="click", event_time=from_ms(now_ms))
        for number, user_id in enumerate(load.user_ids)
    )
    sender.send(
        Fuzzed(
            cluster.topics.events,
            event.user_id.encode(),
            event.SerializeToString(),
            (),
            "follow-up",
            Expected.PROCESSED,
        )
        for event in events
    )
    readings.wait_for_markers(cluster, store, _SETTLE_SECONDS)
    states = readings.stored_states(store)
    source = cluster.sources[cluster.topics.events]
    placed = {place: fuzzed for place, fuzzed in sender.placed.items() if place not in before}
    result.follow_ups, result.messages = len(load.user_ids), result.messages + len(load.user_ids)
    for place, fuzzed in placed.items():
        state = states.get((fuzzed.key or b"").decode(), UserState())
        result.follow_ups_processed += state.offsets.get((source, place.partition), -1) >= place.offset


def _account(cluster: Cluster, store: OnlineStore, sender: Sender, result: Result) -> None:
    """Compares what was sent with what is in the log, the dead letters and the rows."""
    letters, logged = _letters(cluster), Counter(readings.logged_places(cluster, _TABLES))
    truth = SinglePass(
        cluster.settings.features, cluster.topics, cluster.sources, lambda logged: logged.place in letters
    )
    for topic in cluster.topics.inbound:
        for message in readings.read_topic(cluster, topic):
            if message.place in letters:
                result.damaged_letters += not _is_original(letters[message.place], message)
            if topic in cluster.topics.user_keyed:
                truth.add(message)
    truth.malformed.clear()
    result.dead_lettered, result.processed = len(letters), len(logged)
    for place in sender.placed.keys() | letters.keys() | logged.keys():
        result.unaccounted += (place in letters) + logged[place] != 1 or place not in sender.placed
    result.unexpected = _unexpected(sender.placed, letters)
    users, item_rows = readings.user_mismatches(store, truth), readings.item_mismatches(store, truth)
    # A tombstone leaves a row that holds nothing but how far it reached.
    users = {user_id: wrong for user_id, wrong in users.items() if not user_id.startswith(PROFILE_PREFIX)}
    result.user_state_mismatches, result.item_stat_mismatches = len(users), len(item_rows)
    for key, differences in [*sorted(users.items())[:_SHOWN], *sorted(item_rows.items())[:_SHOWN]]:
        say(f"{key!r}: {'; '.join(differences)}")
    result.not_finite_states = sum(not _is_finite(state) for state in readings.stored_states(store).values())


def _unexpected(placed: dict[Place, Fuzzed], letters: dict[Place, DeadLetter]) -> int:
    """Counts, and tells, messages that came to rest in the other place than the contract says."""
    wrong: Counter[str] = Counter()
    for place, fuzzed in placed.items():
        found = Expected.DEAD_LETTER if place in letters else Expected.PROCESSED
        if fuzzed.expected not in (Expected.EITHER, found):
            reason = f": {letters[place].reason}" if place in letters else ""
            if wrong[fuzzed.what] < _SHOWN:
                say(f"{fuzzed.what} at {place}: {found}, not {fuzzed.expected}{reason}")
            wrong[fuzzed.what] += 1
    return wrong.total()


def _letters(cluster: Cluster) -> dict[Place, DeadLetter]:
    letters = {}
    for topic in cluster.topics.inbound:
        for logged in readings.read_topic(cluster, dead_letter(topic)):
            letter = DeadLetter.FromString(logged.value or b"")
            letters[Place(letter.topic, letter.partition, letter.offset)] = letter
    return letters


def _is_original(letter: DeadLetter, original: Logged) -> bool:
    """True for the original bytes, or for their beginning where the letter says that it was cut."""
    key, value = original.key or b"", original.value or b""
    same_key = letter.key == key or ("key cut" in letter.reason and key.startswith(letter.key))
    same_value = letter.value == value or ("value cut" in letter.reason and value.startswith(letter.value))
    return same_key and same_value


def _is_finite(state: UserState) -> bool:
    sums = [state.dwell_seconds, *(total for _, total in state.kinds.values())]
    sums += [total for _, buckets in state.affinity for total in buckets.values()]
    return bool(np.isfinite(sums).all())


@contextmanager
def _watching(cluster: Cluster) -> Iterator[ProcessWatch]:
    watch = ProcessWatch(cluster, WORKER)
    try:
        yield watch
    finally:
        watch.stop()


def say(text: str) -> None:
    print(f"{'fuzz':>10}  {time.monotonic() - _BEGIN:5.1f} s  {text}", file=sys.stderr, flush=True)


def print_result(result: Result, console: Console) -> None:
    table = Table(title="Fuzzing test", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.as_dict().items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)


def main() -> int:
    command = Command("fuzz", __doc__, f"{QUICK_MESSAGES:,} messages")
    command.add("--messages", type=int, help=f"messages to send; else {MESSAGES:,}")
    command.add("--seed", type=int, default=7, help="of the load")
    command.add_work()
    return command.run(_measure, print_result, Result.as_dict, lambda result: result.good)


def _measure(given: argparse.Namespace, work: Path) -> Result:
    return run(given.messages or (QUICK_MESSAGES if given.quick else MESSAGES), given.seed, work)


if __name__ == "__main__":
    sys.exit(main())
