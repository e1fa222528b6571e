"""A worker dies by kill -9 under load on a real Kafka: nothing is lost, and what it read goes on elsewhere."""

import pytest

from benchmarks import crash
from benchmarks.crash_schedule import Blow
from benchmarks.stream_cluster import SESSION_TIMEOUT_MS
from devstack.kafka_local import kafka_home, local_kafka_problem

pytestmark = [pytest.mark.e2e, pytest.mark.real_kafka]

# The group is told after the session is over; then the other worker reads its markers.
TAKE_OVER_SECONDS = 2.5


def test_the_partitions_of_the_others_keep_moving_and_the_dead_ones_move_within_the_session(tmp_path) -> None:
    if problem := local_kafka_problem(kafka_home()):
        pytest.skip(f"needs a real Kafka: {problem}")
    plan = crash.Plan(
        8000, kills=1, freezes=0, pause_seconds=(1.0, 1.0), load_seconds=25, also=(Blow.REDIS_OLDER,), closely=True
    )
    result = crash.run(plan, seed=3, home=tmp_path)
    assert result.differences.total == 0, result.differences
    assert result.events == plan.events
    still = result.blows.stand_still
    assert len(still.dead) == len(still.others) == 3
    assert max(still.others) < 1.5, still
    assert max(still.dead) < SESSION_TIMEOUT_MS / 1000 + TAKE_OVER_SECONDS, still
