"""Feast's view of the features: entities, views, push sources and feature services.

Generated from features/definitions.py by `python -m features.stores.feast_repo`; change that, not this. Invariant:
views of one entity share one online row, and offline each is a folder of Parquet files below HEADRACE_FEAST_OFFLINE.
"""

import os

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Array, Bytes, Float32, Int64, String

_OFFLINE = os.environ.get("HEADRACE_FEAST_OFFLINE", ".headrace/feast")


def _files(view: str) -> FileSource:
    return FileSource(
        name=f"{view}_files",
        path=f"{_OFFLINE}/{view}",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )


user = Entity(
    name="user",
    join_keys=["user_id"],
    value_type=ValueType.STRING,
    description="A user of the product.",
)

item = Entity(
    name="item",
    join_keys=["item_id"],
    value_type=ValueType.STRING,
    description="An item of the catalogue.",
)

source_partition = Entity(
    name="source_partition",
    join_keys=["source_partition"],
    value_type=ValueType.STRING,
    description="The partition that partial sums come from.",
)

segment = Entity(
    name="segment",
    join_keys=["segment"],
    value_type=ValueType.STRING,
    description="A group of users with its own popularity; `all` is everybody.",
)

user_state_files = _files("user_state")
user_state_push = PushSource(name="user_state_push", batch_source=user_state_files)
user_state = FeatureView(
    name="user_state",
    entities=[user],
    ttl=None,
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="state", dtype=Bytes, description="headrace.v1.UserState, see features/windows.py."),
        Field(
            name="offsets",
            dtype=Bytes,
            description="Source positions that the row includes (headrace.v1.SourceOffsets).",
        ),
        Field(name="revision", dtype=Int64, description="Events applied."),
        Field(name="watermark_ms", dtype=Int64, description="Newest event time, milliseconds since the epoch."),
    ],
    source=user_state_push,
    description="What the stream keeps of a user: a pure function of the user's events.",
)

user_embedding_files = _files("user_embedding")
user_embedding_push = PushSource(name="user_embedding_push", batch_source=user_embedding_files)
user_embedding = FeatureView(
    name="user_embedding",
    entities=[user],
    ttl=None,
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="vector", dtype=Array(Float32), description="The user tower's output."),
        Field(name="embedding_version", dtype=String, description="Version of the towers."),
        Field(name="embedding_revision", dtype=Int64, description="Revision of the state that was encoded."),
    ],
    source=user_embedding_push,
    description="The user's vector, and the state revision that it was encoded from.",
)

user_batch_scores_files = _files("user_batch_scores")
user_batch_scores = FeatureView(
    name="user_batch_scores",
    entities=[user],
    ttl=None,
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="batch_item_ids", dtype=Array(String), description="Items, best first."),
        Field(name="batch_scores", dtype=Array(Float32), description="Their scores, 0..1."),
        Field(name="batch_bundle_version", dtype=String, description="The bundle that scored them."),
    ],
    source=user_batch_scores_files,
    description="The offline top items of a user, best first.",
)

user_profile_files = _files("user_profile")
user_profile_push = PushSource(name="user_profile_push", batch_source=user_profile_files)
user_profile = FeatureView(
    name="user_profile",
    entities=[user],
    ttl=None,
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="profile", dtype=Bytes, description="headrace.v1.User."),
        Field(name="profile_segment", dtype=String, description="The user's segment, empty for none."),
        Field(name="profile_offsets", dtype=Bytes, description="Source position of the row."),
    ],
    source=user_profile_push,
    description="What is known of a user beside events.",
)

item_profile_files = _files("item_profile")
item_profile_push = PushSource(name="item_profile_push", batch_source=item_profile_files)
item_profile = FeatureView(
    name="item_profile",
    entities=[item],
    ttl=None,
    schema=[
        Field(name="item_id", dtype=String),
        Field(name="item", dtype=Bytes, description="headrace.v1.Item."),
        Field(name="title", dtype=String, description="The item's title."),
        Field(name="item_offsets", dtype=Bytes, description="Source position of the row."),
    ],
    source=item_profile_push,
    description="An item of the catalogue.",
)

item_stats_files = _files("item_stats")
item_stats_push = PushSource(name="item_stats_push", batch_source=item_stats_files)
item_stats = FeatureView(
    name="item_stats",
    entities=[item, source_partition],
    ttl=None,
    schema=[
        Field(name="item_id", dtype=String),
        Field(name="source_partition", dtype=String),
        Field(name="stats", dtype=Bytes, description="headrace.v1.ItemStats."),
        Field(
            name="offsets",
            dtype=Bytes,
            description="Source positions that the row includes (headrace.v1.SourceOffsets).",
        ),
        Field(name="revision", dtype=Int64, description="Events applied."),
    ],
    source=item_stats_push,
    description="Partial sums of an item over one source partition; add them up.",
)

popularity_files = _files("popularity")
popularity_push = PushSource(name="popularity_push", batch_source=popularity_files)
popularity = FeatureView(
    name="popularity",
    entities=[segment],
    ttl=None,
    schema=[
        Field(name="segment", dtype=String),
        Field(name="popular_item_ids", dtype=Array(String), description="Items, best first."),
        Field(name="popular_scores", dtype=Array(Float32), description="Decayed engagement."),
        Field(name="popular_watermark_ms", dtype=Int64, description="Newest event time, milliseconds since the epoch."),
    ],
    source=popularity_push,
    description="The most popular items of a segment, best first.",
)

retrieval_v1 = FeatureService(
    name="retrieval_v1",
    features=[
        user_state,
        user_embedding,
    ],
)

ranking_v1 = FeatureService(
    name="ranking_v1",
    features=[
        user_state,
        user_embedding,
        user_profile,
        item_profile,
        item_stats,
    ],
)

serving_v1 = FeatureService(
    name="serving_v1",
    features=[
        user_state,
        user_embedding,
        user_batch_scores,
        user_profile,
        popularity,
    ],
)
