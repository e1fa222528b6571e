"""Shadow scoring: a share of the traffic is scored by another release as well, for its metrics alone.

After the gRPC adapter's answer. Invariant: an answer never waits for the shadow and never changes by it; the shadow's
queue is bounded and its thread yields to those that answer.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from core.errors import RecommenderError
from core.telemetry import get_logger
from features.catalog import Floats
from features.transforms import stable_hash
from ranker import metrics
from ranker.release import Release, UserJob
from ranker.scorer import Scores

_log = get_logger("ranker")
_TOP = 10
_NICE = 10
_HASHES = 1 << 32

Score = Callable[[Sequence[UserJob]], Sequence[Scores]]


class Shadow:
    """Scores jobs again. For one event loop.

    Args:
        score: from jobs to scores; runs on the shadow's own thread.
        queue_max: calls waiting; more are left out.
    """

    def __init__(self, score: Score, queue_max: int) -> None:
        self._score, self._queue_max = score, queue_max
        self._pool = ThreadPoolExecutor(1, "ranker-shadow", initializer=_yield_to_others)
        self._waiting: set[asyncio.Future[None]] = set()

    def offer(self, target: tuple[Release, float] | None, jobs: Sequence[UserJob], served: Sequence[Scores]) -> None:
        """Scores those of the users that fall into the share; returns at once."""
        if target is None:
            return
        release, share = target
        chosen = [(job, scores) for job, scores in zip(jobs, served, strict=True) if is_chosen(job, share)]
        # A list that was cut would differ by that alone.
        chosen = [one for one in chosen if one[0].release is not release and one[1].cut is None]
        if not chosen:
            return
        if len(self._waiting) >= self._queue_max:
            metrics.shadow_users.labels("left_out").inc(len(chosen))
            return
        task = asyncio.get_running_loop().run_in_executor(self._pool, self._compare, release, chosen)
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def drain(self) -> None:
        """Waits for what was taken up."""
        await asyncio.gather(*self._waiting)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _compare(self, release: Release, chosen: Sequence[tuple[UserJob, Scores]]) -> None:
        jobs = [for_release(job, release) for job, _ in chosen]
        try:
            made = self._score(jobs)
        except RecommenderError as error:
            metrics.shadow_users.labels("failed").inc(len(jobs))
            _log.warning("the shadow failed", bundle=release.version, problem=str(error))
            return
        except Exception as error:  # noqa: BLE001 - whatever a candidate release does, it must not show
            metrics.shadow_users.labels("failed").inc(len(jobs))
            _log.error("the shadow failed", bundle=release.version, error=repr(error))
            return
        metrics.shadow_users.labels("scored").inc(len(jobs))
        for (_, served), other in zip(chosen, made, strict=True):
            if len(served.score):
                metrics.shadow_difference.observe(float(np.abs(served.score - other.score).mean()))
                metrics.shadow_overlap.observe(top_overlap(served.score, other.score))


def is_chosen(job: UserJob, share: float) -> bool:
    """Whether a user falls into the share; by what the state holds, so that one moment is chosen or not as a whole."""
    return stable_hash(f"{job.now_ms}/{job.state.watermark_ms}/{job.state.revision}") % _HASHES < share * _HASHES


def for_release(job: UserJob, release: Release) -> UserJob:
    """The same question to another release, without hurry; without a vector that is of another embedding."""
    same = job.release.manifest.embedding_version == release.manifest.embedding_version
    return replace(
        job, release=release, user_vector=job.user_vector if same else None, log_features_of=0, deadline=None
    )


def top_overlap(scores: Floats, others: Floats) -> float:
    """Share of the best ten by one score that are among the best ten by the other."""
    count = min(_TOP, len(scores))
    best, other = (set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (scores, others))
    return len(best & other) / count


def _yield_to_others() -> None:
    # On Linux a priority is a thread's own; elsewhere the shadow competes as an equal.
    if hasattr(os, "setpriority") and hasattr(threading, "get_native_id"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        except OSError:
            _log.debug("the shadow runs at the usual priority")
