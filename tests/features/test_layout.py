"""Keys and cells that are put together by hand are what protobuf and Feast make of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.definitions import ColumnType
from features.stores.layout import decode_cell, encode_cell, row_key
from headrace.v1.store_pb2 import FeatureValue


@given(st.integers(-(2**63), 2**63 - 1))
def test_an_integer_cell_is_a_feature_value(number) -> None:
    assert encode_cell(ColumnType.INT64, number) == FeatureValue(int64_val=number).SerializeToString()


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 100_000])
def test_a_bytes_cell_is_a_feature_value(size) -> None:
    value = bytes(size)
    cell = encode_cell(ColumnType.BYTES, value)
    assert cell == FeatureValue(bytes_val=value).SerializeToString()
    assert decode_cell(ColumnType.BYTES, cell) == value


def test_join_keys_are_sorted_by_name_with_their_values() -> None:
    assert row_key("p", ("user_id", "item_id"), ("ü", "i")) == row_key("p", ("item_id", "user_id"), ("i", "ü"))
    assert row_key("p", ("user_id",), ("ü",)) == (
        b"\x01\0\0\0\x02\0\0\0\x07\0\0\0user_id\x02\0\0\0\x02\0\0\0" + "ü".encode() + b"p"
    )
