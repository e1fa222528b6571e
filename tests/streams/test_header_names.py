"""A header's name that is no text must not stop a topic."""

import pytest
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from streams.header_names import read_records


class Untext(str):
    """Lets a producer send a name that is not UTF-8, as clients in other languages can."""

    def encode(self, *_) -> bytes:
        return b"\xff\xfe\xc0"


def batch(headers, compression: int = 0) -> bytes:
    builder = _DefaultRecordBatchBuilderPy(
        2, compression, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=-1, batch_size=100_000
    )
    for offset, of_message in enumerate(headers):
        builder.append(offset, 1_700_000_000_000, b"key", b"value", of_message)
    return bytes(builder.build())


def read(data: bytes):
    records = read_records(data)
    found = []
    while records.has_next():
        one = records.next_batch()
        assert one.validate_crc()
        found += [(record.offset, record.key, record.value, list(record.headers)) for record in one]
    return found


@pytest.mark.parametrize("compression", [0, 1])
def test_an_unreadable_name_is_replaced_and_all_else_stays(compression) -> None:
    data = batch([[], [(Untext("x"), b"1"), ("content-type", b"\xff")], [("same", None)]], compression)
    assert read(data + data) == 2 * [
        (0, b"key", b"value", []),
        (1, b"key", b"value", [("\ufffd\ufffd\ufffd", b"1"), ("content-type", b"\xff")]),
        (2, b"key", b"value", [("same", None)]),
    ]


def test_what_is_readable_or_cut_is_left_to_the_client() -> None:
    data = batch([[("name", b"1")]])
    assert read(data) == [(0, b"key", b"value", [("name", b"1")])]
    assert read(data + data[:30]) == read(data)
