"""Two workers share the partitions, and one takes over from the other, by each group protocol that can be set."""

from typing import get_args

import pytest

from core.settings import StreamsSettings
from core.topics import Topics
from tests.conftest import wait_until
from tests.parity.test_state_parity import (
    PARTITIONS,
    assert_log_holds_each_position_once,
    assert_store_equals_single_pass,
    draw,
    send,
)

PROTOCOLS = get_args(StreamsSettings.model_fields["group_protocol"].annotation)


@pytest.mark.real_kafka
@pytest.mark.parametrize("group_protocol", PROTOCOLS)
def test_partitions_are_shared_handed_over_and_taken_over(
    group_protocol, shared_redis, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(shared_redis, group_protocol=group_protocol, poll_max_events=50)
    if settings.kafka.log_id:
        pytest.skip("the embedded broker says nothing about rebalances; set KAFKA_HOME")
    sent = draw(Topics(settings.kafka.topic_prefix), 1500, seed=31)
    third = len(sent.messages) // 3

    def owned(part) -> set[int]:
        return {partition for partition in PARTITIONS if part.reader.owns(partition)}

    first = start_reader(settings)
    written = send(kafka_producer, sent.messages[:third])
    wait_until(lambda: owned(first) == set(PARTITIONS), 60, "all partitions")
    second = start_reader(settings)
    written += send(kafka_producer, sent.messages[third : 2 * third])
    wait_until(lambda: owned(first) and owned(second), 60, "a share for each")
    wait_until(lambda: owned(first) | owned(second) == set(PARTITIONS), 60, "the rest")
    assert not owned(first) & owned(second)
    first.stop()
    written += send(kafka_producer, sent.messages[2 * third :])
    wait_until(lambda: owned(second) == set(PARTITIONS), 60, "what the first one had")
    second.wait_for(written, 60)
    second.stop()
    assert_store_equals_single_pass(settings, sent)
    assert_log_holds_each_position_once(settings, written, sent)
