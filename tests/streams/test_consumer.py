"""What the consumer is told; what the reader does with it is in tests/parity and test_process.py."""

import pytest

from streams.consumer import session_ms


@pytest.mark.parametrize(
    ("take_over_ms", "expected_ms"), [(10_000, 8000), (45_000, 36_000), (7000, 6000), (6000, 6000), (2000, 2000)]
)
def test_the_session_leaves_time_to_take_over_but_is_no_shorter_than_brokers_allow(take_over_ms, expected_ms) -> None:
    assert session_ms(take_over_ms) == expected_ms
