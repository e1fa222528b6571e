"""One tree, one table."""

import pytest
from grpc import StatusCode

from core import errors


def test_the_most_specific_row_of_the_table_wins() -> None:
    assert errors.grpc_status(errors.StageTimeoutError("redis", "late")) is StatusCode.DEADLINE_EXCEEDED
    assert errors.grpc_status(errors.StageError("redis", "gone")) is StatusCode.UNAVAILABLE
    assert errors.http_status(errors.InvalidRequestError("user_id", "empty")) == 400


def every_error(base: type[errors.RecommenderError] = errors.RecommenderError) -> list[type]:
    return [base, *(found for kind in base.__subclasses__() for found in every_error(kind))]


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_row_and_a_name_that_ends_in_error(kind) -> None:
    assert kind.__name__.endswith("Error")
    assert any(issubclass(kind, row[0]) for row in errors._STATUS)


def test_an_invalid_request_names_its_field() -> None:
    error = errors.InvalidRequestError("num_items", "must be in 1..500")
    assert str(error) == "num_items: must be in 1..500"
    assert error.field == "num_items"
