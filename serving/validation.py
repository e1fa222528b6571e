"""Requests checked before anything else: what cannot be served as it is, and which field is to blame.

Called at the door of every RPC. Invariant: a request that passes can be answered; one that does not raises
InvalidRequestError naming the field, never anything else.
"""

import math
from collections.abc import Callable
from typing import TypeVar

from core.codec import MAX_ID_CHARS, MAX_TAGS, MAX_TIME_MS, MIN_TIME_MS, check_event, check_id, to_ms
from core.errors import InvalidRequestError, MalformedEventError
from headrace.v1.events_pb2 import Event
from headrace.v1.recommender_service_pb2 import (
    ExplainRequest,
    RecommendBatchRequest,
    RecommendRequest,
    ReplayRecommendationRequest,
)
from headrace.v1.types_pb2 import Context, IngestToken, ItemFilter

MAX_NUM_ITEMS = 500
MAX_EXCLUSIONS = 10_000
MAX_FILTER_VALUES = 200
MAX_FILTERS = 20
MAX_SESSION_EVENTS = 100
MAX_TOKENS = 100
MAX_TAG_CHARS = 256
MAX_BATCH = 1000
MAX_CURSOR_CHARS = 1_000_000

T = TypeVar("T")


def check_recommend(request: RecommendRequest, now_ms: int, prefix: str = "") -> None:
    """Raises InvalidRequestError where the request cannot be served.

    Args:
        request: as received. Session events without a user_id get the request's.
        now_ms: the time of the request; session events may not lie far ahead of it.
        prefix: of the field names in errors, for requests inside others.
    """
    _identifier(f"{prefix}user_id", request.user_id)
    if not 0 <= request.num_items <= MAX_NUM_ITEMS:
        raise InvalidRequestError(f"{prefix}num_items", f"must be in 1..{MAX_NUM_ITEMS}, or 0 for the default")
    if len(request.cursor) > MAX_CURSOR_CHARS:
        raise InvalidRequestError(f"{prefix}cursor", f"more than {MAX_CURSOR_CHARS} characters; it is not one of ours")
    if request.HasField("min_score") and not 0.0 <= request.min_score <= 1.0:
        raise InvalidRequestError(f"{prefix}min_score", "must be a number in 0..1")
    _short(f"{prefix}bundle_version", request.bundle_version)
    _short(f"{prefix}experiment_arm", request.experiment_arm)
    _check_context(f"{prefix}context", request.context)
    _check_filter(f"{prefix}filter", request.filter)
    _at_most(f"{prefix}tokens", len(request.tokens), MAX_TOKENS)
    for index, token in enumerate(request.tokens):
        _check_token(f"{prefix}tokens[{index}]", token)
    _at_most(f"{prefix}session_events", len(request.session_events), MAX_SESSION_EVENTS)
    for index, event in enumerate(request.session_events):
        _check_session_event(f"{prefix}session_events[{index}]", event, request.user_id, now_ms)


def check_batch(request: RecommendBatchRequest) -> None:
    """Checks what concerns the batch as a whole; its entries fail one by one."""
    if not 1 <= len(request.requests) <= MAX_BATCH:
        raise InvalidRequestError("requests", f"1..{MAX_BATCH} are needed")
    first: dict[str, int] = {}
    for index, entry in enumerate(request.requests):
        before = first.setdefault(entry.user_id, index)
        if before != index and entry.user_id:
            raise InvalidRequestError(f"requests[{index}].user_id", f"is also that of requests[{before}]")


def check_explain(request: ExplainRequest, now_ms: int) -> None:
    _identifier("item_id", request.item_id)
    check_recommend(request.request, now_ms, "request.")


def check_replay(request: ReplayRecommendationRequest) -> None:
    _identifier("recommendation_id", request.recommendation_id)
    _short("user_id", request.user_id)


def _check_context(field: str, context: Context) -> None:
    for name in ("surface", "device", "session_id"):
        _short(f"{field}.{name}", getattr(context, name))
    _at_most(f"{field}.tags", len(context.tags), MAX_TAGS)
    for name, value in context.tags.items():
        if len(name) > MAX_TAG_CHARS or len(value) > MAX_TAG_CHARS:
            raise InvalidRequestError(f"{field}.tags", f"names and values have at most {MAX_TAG_CHARS} characters")
    if context.HasField("as_of_time"):
        as_of_ms = to_ms(context.as_of_time)
        if not MIN_TIME_MS <= as_of_ms <= MAX_TIME_MS:
            raise InvalidRequestError(f"{field}.as_of_time", "is not between 1971 and 2100; is the unit right?")


def _check_filter(field: str, item_filter: ItemFilter) -> None:
    _at_most(f"{field}.exclude_item_ids", len(item_filter.exclude_item_ids), MAX_EXCLUSIONS)
    if any(len(item_id) > MAX_ID_CHARS for item_id in item_filter.exclude_item_ids):
        raise InvalidRequestError(f"{field}.exclude_item_ids", f"an id has at most {MAX_ID_CHARS} characters")
    for name in ("categories_any", "categories_none"):
        values = getattr(item_filter, name)
        _at_most(f"{field}.{name}", len(values), MAX_FILTER_VALUES)
        for index, value in enumerate(values):
            _identifier(f"{field}.{name}[{index}]", value)
    _at_most(f"{field}.ranges", len(item_filter.ranges), MAX_FILTERS)
    for index, bounds in enumerate(item_filter.ranges):
        where = f"{field}.ranges[{index}]"
        _identifier(f"{where}.name", bounds.name)
        if math.isnan(bounds.min) or math.isnan(bounds.max):
            raise InvalidRequestError(where, "min and max must be numbers")
        if bounds.HasField("min") and bounds.HasField("max") and bounds.min > bounds.max:
            raise InvalidRequestError(where, "min is above max")
    _at_most(f"{field}.labels", len(item_filter.labels), MAX_FILTERS)
    for index, match in enumerate(item_filter.labels):
        where = f"{field}.labels[{index}]"
        _identifier(f"{where}.name", match.name)
        if not 1 <= len(match.values) <= MAX_FILTER_VALUES:
            raise InvalidRequestError(f"{where}.values", f"1..{MAX_FILTER_VALUES} are needed")


def _check_token(field: str, token: IngestToken) -> None:
    if not token.source:
        raise InvalidRequestError(f"{field}.source", "is missing; pass the token as ingestion returned it")
    if token.partition < 0 or token.offset < 0:
        raise InvalidRequestError(field, "partition and offset must not be negative")


def _check_session_event(field: str, event: Event, user_id: str, now_ms: int) -> None:
    event.user_id = event.user_id or user_id
    if event.user_id != user_id:
        raise InvalidRequestError(f"{field}.user_id", "is another user's; session events are the request's own user's")
    named(lambda: check_event(event, now_ms), field)


def named(check: Callable[[], T], field: str) -> T:
    """Runs a check of core.codec; its error names the field inside `field`."""
    try:
        return check()
    except MalformedEventError as error:
        inner = f"{field}.{error.field}" if error.field else field
        problem = str(error).removeprefix(f"{error.field}: ")
        raise InvalidRequestError(inner, problem) from error


def _identifier(field: str, text: str) -> None:
    try:
        check_id("", text)
    except MalformedEventError as error:
        raise InvalidRequestError(field, str(error)) from error


def _short(field: str, text: str) -> None:
    if len(text) > MAX_ID_CHARS:
        raise InvalidRequestError(field, f"{len(text)} characters, the limit is {MAX_ID_CHARS}")


def _at_most(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequestError(field, f"{count} entries, the limit is {limit}")
