"""What is killed when: a seeded list of blows, and the doing of them.

Second half of the crash test; the load runs beside it. Invariant: every blow is followed by what an operator or
Kubernetes would do (start it again) and by nothing else: recovery is the system's own business.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from benchmarks.stream_cluster import PARTITIONS, SESSION_TIMEOUT_MS, WORKERS, Cluster, MarkerWatch
from core.errors import StageTimeoutError

# After the session is over: time for the other worker to be given the partitions, and to get ahead.
_TAKE_OVER_SECONDS = 3.0
# What Redis loses: more than `appendfsync everysec` would.
_LOST_SECONDS = 2.0
_SHARED_SECONDS = 60.0
# Partitions that have just changed hands are read up to their ends.
_AT_REST_SECONDS = 1.0
_BROKER_DOWN_SECONDS = 2.0
_REDIS_DOWN_SECONDS = 1.5


class Blow(StrEnum):
    """One kind of misfortune."""

    KILL = "kill -9 of a worker"
    FREEZE = "freeze of a worker past its session, then awake"
    BROKER = "kill -9 of the broker"
    REDIS = "kill -9 of Redis"
    REDIS_OLDER = "kill -9 of Redis, end of its file cut off"


@dataclass
class StandStill:
    """How long partitions stood still after the kill of one worker, seconds."""

    dead: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)


@dataclass
class Blows:
    """What was done, and what was seen of it."""

    done: list[Blow] = field(default_factory=list)
    stand_still: StandStill = field(default_factory=StandStill)

    def count(self, *blows: Blow) -> int:
        return sum(blow in blows for blow in self.done)

    @property
    def worker_kills(self) -> int:
        """Kills and freezes."""
        return self.count(Blow.KILL, Blow.FREEZE)


def schedule(kills: int, freezes: int, seed: int, also: tuple[Blow, ...]) -> list[Blow]:
    """The blows in a random order, the same for the same seed; the first one is a kill."""
    blows = [Blow.KILL] * (kills - 1) + [Blow.FREEZE] * freezes + list(also)
    random.Random(seed).shuffle(blows)
    return [Blow.KILL, *blows]


class Striker:
    """Carries out a schedule against a cluster under load."""

    def __init__(
        self, cluster: Cluster, watch: MarkerWatch, seed: int, say: Callable[[str], None], *, closely: bool
    ) -> None:
        self._cluster, self._watch, self._say, self._closely = cluster, watch, say, closely
        self._random = random.Random(seed)
        self.result = Blows()

    def run(self, blows: list[Blow], pause_seconds: tuple[float, float]) -> Blows:
        """Every blow after a random pause in these limits."""
        for number, blow in enumerate(blows, start=1):
            time.sleep(self._random.uniform(*pause_seconds))
            worker = self._random.choice(WORKERS)
            about = f" ({worker})" if blow in (Blow.KILL, Blow.FREEZE) else ""
            self._say(f"{number}/{len(blows)} {blow}{about}")
            {
                Blow.KILL: self._kill,
                Blow.FREEZE: self._freeze,
                Blow.BROKER: self._broker,
                Blow.REDIS: self._redis,
                Blow.REDIS_OLDER: self._redis_older,
            }[blow](worker)
            self.result.done.append(blow)
        return self.result

    def _kill(self, worker: str) -> None:
        # Every other kill is looked at closely, which takes its time; the others come as they come.
        if not self._closely or self.result.count(Blow.KILL) % 2:
            self._cluster.kill(worker)
            self._cluster.start(worker)
            return
        self._wait_until_shared()
        owned = self._cluster.partitions_of(worker)
        begin = time.monotonic()
        self._cluster.kill(worker)
        self._cluster.start(worker)
        time.sleep(SESSION_TIMEOUT_MS / 1000 + _TAKE_OVER_SECONDS)
        end = time.monotonic()
        for partition in range(PARTITIONS):
            gaps = self.result.stand_still.dead if partition in owned else self.result.stand_still.others
            gaps.append(self._watch.longest_gap(partition, begin, end))
        dead, others = self.result.stand_still.dead, self.result.stand_still.others
        seen = [", ".join(f"{gap:.2f}" for gap in gaps[-PARTITIONS // 2 :]) for gaps in (dead, others)]
        self._say(f"seconds that partitions stood still: of the dead {seen[0]}; of the other {seen[1]}")

    def _wait_until_shared(self) -> None:
        """Returns when the group is at rest: every partition with one of the two, and both have some."""
        limit = time.monotonic() + _SHARED_SECONDS
        while time.monotonic() < limit:
            shares = [self._cluster.partitions_of(name) for name in WORKERS]
            if all(shares) and len(set.union(*shares)) == PARTITIONS and all(map(self._cluster.is_ready, WORKERS)):
                time.sleep(_AT_REST_SECONDS)
                return
            time.sleep(0.2)
        raise StageTimeoutError("kafka", f"the workers do not share the partitions after {_SHARED_SECONDS:.0f} s")

    def _freeze(self, worker: str) -> None:
        self._cluster.freeze(worker)
        time.sleep(SESSION_TIMEOUT_MS / 1000 + self._random.uniform(1.0, _TAKE_OVER_SECONDS))
        self._cluster.thaw(worker)

    def _broker(self, _worker: str) -> None:
        self._cluster.kill("kafka")
        time.sleep(_BROKER_DOWN_SECONDS)
        self._cluster.start("kafka")
        self._cluster.wait_ready("kafka")

    def _redis(self, _worker: str) -> None:
        self._cluster.kill("redis")
        time.sleep(_REDIS_DOWN_SECONDS)
        self._cluster.start("redis")
        self._cluster.wait_ready("redis")

    def _redis_older(self, _worker: str) -> None:
        lost = self._cluster.kill_redis_losing(_LOST_SECONDS)
        self._say(f"Redis lost the last {lost:,} bytes of its file")
        self._cluster.start("redis")
        self._cluster.wait_ready("redis")
