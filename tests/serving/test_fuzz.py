"""Whatever a request holds, it is answered or refused by name; nothing else comes back."""

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import SystemClock
from core.errors import InvalidRequestError
from headrace.v1.events_pb2 import Event
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.types_pb2 import Context, IngestToken, ItemFilter, LabelMatch, NumberRange
from serving.validation import check_recommend

from .test_tiers import ask

text = st.one_of(st.just(""), st.sampled_from(["item-001", "tea", "price", "year"]), st.text(max_size=140))
number = st.one_of(st.floats(), st.integers(-5, 5).map(float))
int32 = st.one_of(st.integers(-2, 30), st.integers(-(2**31), 2**31 - 1))
int64 = st.one_of(st.integers(0, 9), st.integers(-(2**63), 2**63 - 1))
times = st.builds(dict, seconds=st.one_of(int64, st.integers(0, 4_000_000_000)), nanos=int32)


def few(strategy):
    return st.lists(strategy, max_size=3)


contexts = st.builds(
    Context, surface=text, device=text, tags=st.dictionaries(text, text, max_size=2), as_of_time=st.none() | times
)
filters = st.builds(
    ItemFilter,
    categories_any=few(text),
    categories_none=few(text),
    exclude_item_ids=few(text),
    ranges=few(st.builds(NumberRange, name=text, min=st.none() | number, max=st.none() | number)),
    labels=few(st.builds(LabelMatch, name=text, values=few(text))),
)
events = st.builds(
    Event,
    event_id=text,
    item_id=text,
    kind=text,
    event_time=st.none() | times,
    value=st.none() | number,
    confidence=st.none() | number,
    categories=few(text),
)
tokens = st.builds(IngestToken, partition=int32, offset=int64, source=st.integers(0, 2**64 - 1))
requests = st.builds(
    RecommendRequest,
    user_id=text,
    num_items=int32,
    context=st.none() | contexts,
    filter=st.none() | filters,
    tokens=few(tokens),
    session_events=few(events),
    cursor=st.just("") | text,
    disable_exploration=st.booleans(),
    explain=st.booleans(),
    bundle_version=text,
    experiment_arm=text,
    min_score=st.none() | number,
    dry_run=st.just(value=True),
)


@settings(max_examples=300)
@given(requests)
def test_a_check_passes_or_names_the_field(request) -> None:
    try:
        check_recommend(request, SystemClock().now_ms())
    except InvalidRequestError as error:
        assert error.field
        assert str(error).startswith(error.field)


async def test_a_request_is_answered_or_refused(house) -> None:
    house.put_user()
    recommender, _ = await house.open(deadline_ms=50)
    examples: list[RecommendRequest] = []

    # Drawn first: hypothesis and the event loop do not mix.
    @settings(max_examples=200, derandomize=True, database=None)
    @given(requests)
    def draw(request) -> None:
        examples.append(request)

    draw()
    answered = 0
    for request in examples:
        for changed in (request, _mended(request)):
            try:
                answer = await recommender.Recommend(changed)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (changed, error)
            else:
                answered += 1
                ids = [item.item_id for item in answer.items]
                assert len(ids) == len(set(ids)) <= (changed.num_items or 20)
                assert not set(ids) & {*changed.filter.exclude_item_ids, "item-197", "item-198", "item-199"}
    assert answered > 50


def _mended(request) -> RecommendRequest:
    """The same with what is most often wrong put right, so that the stages see odd requests too."""
    mended = ask()
    mended.MergeFrom(request)
    mended.user_id, mended.cursor, mended.num_items = "ada", "", abs(request.num_items) % 501
    mended.ClearField("min_score")
    del mended.tokens[:], mended.session_events[:]
    return mended
