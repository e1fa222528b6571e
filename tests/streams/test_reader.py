"""The reader's own decisions; what it does with a broker and a store is in tests/parity and test_process.py."""

import pytest

from streams.reader import _session_ms


@pytest.mark.parametrize(
    ("take_over_ms", "session_ms"), [(10_000, 8000), (45_000, 36_000), (7000, 6000), (6000, 6000), (2000, 2000)]
)
def test_the_session_leaves_time_to_take_over_but_is_no_shorter_than_brokers_allow(take_over_ms, session_ms) -> None:
    assert _session_ms(take_over_ms) == session_ms
