"""The feature views, declared once: Feast's repo is generated from here, the thin reader and writer use the same names.

Invariant: a row of a view is one Redis hash per entity in Feast's layout; views of one entity share the hash and
never share a column. Columns named `offsets` and `revision` are what the row rules compare (see stores/online.py).
"""

from dataclasses import dataclass, field
from enum import Enum


class ColumnType(Enum):
    """Types of columns, by the field of headrace.v1.FeatureValue that holds them."""

    BYTES = "bytes_val"
    STRING = "string_val"
    INT64 = "int64_val"
    DOUBLE = "double_val"
    STRINGS = "string_list_val"
    FLOATS = "float_list_val"


@dataclass(frozen=True, slots=True)
class Column:
    """One feature of a view."""

    name: str
    type: ColumnType
    meaning: str


@dataclass(frozen=True, slots=True)
class Entity:
    """What rows are about. `join_key` is part of every key in the online store."""

    name: str
    join_key: str
    meaning: str


@dataclass(frozen=True, slots=True)
class View:
    """A feature view. `streamed` views have a Feast push source."""

    name: str
    entities: tuple[Entity, ...]
    meaning: str
    columns: tuple[Column, ...]
    streamed: bool = False
    # Of the entities, in their order.
    join_keys: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "join_keys", tuple(entity.join_key for entity in self.entities))


USER = Entity("user", "user_id", "A user of the product.")
ITEM = Entity("item", "item_id", "An item of the catalogue.")
SOURCE_PARTITION = Entity("source_partition", "source_partition", "The partition that partial sums come from.")
SEGMENT = Entity("segment", "segment", "A group of users with its own popularity; `all` is everybody.")

_OFFSETS = Column("offsets", ColumnType.BYTES, "Source positions that the row includes (headrace.v1.SourceOffsets).")

USER_STATE = View(
    "user_state",
    (USER,),
    "What the stream keeps of a user: a pure function of the user's events.",
    (
        Column("state", ColumnType.BYTES, "headrace.v1.UserState, see features/windows.py."),
        _OFFSETS,
        Column("revision", ColumnType.INT64, "Events applied."),
        Column("watermark_ms", ColumnType.INT64, "Newest event time, milliseconds since the epoch."),
    ),
    streamed=True,
)
USER_EMBEDDING = View(
    "user_embedding",
    (USER,),
    "The user's vector, and the state revision that it was encoded from.",
    (
        Column("vector", ColumnType.FLOATS, "The user tower's output."),
        Column("embedding_version", ColumnType.STRING, "Version of the towers."),
        Column("embedding_revision", ColumnType.INT64, "Revision of the state that was encoded."),
    ),
    streamed=True,
)
USER_BATCH_SCORES = View(
    "user_batch_scores",
    (USER,),
    "The offline top items of a user, best first.",
    (
        Column("batch_item_ids", ColumnType.STRINGS, "Items, best first."),
        Column("batch_scores", ColumnType.FLOATS, "Their scores, 0..1."),
        Column("batch_bundle_version", ColumnType.STRING, "The bundle that scored them."),
    ),
)
USER_PROFILE = View(
    "user_profile",
    (USER,),
    "What is known of a user beside events.",
    (
        Column("profile", ColumnType.BYTES, "headrace.v1.User."),
        Column("profile_segment", ColumnType.STRING, "The user's segment, empty for none."),
        Column("profile_offsets", ColumnType.BYTES, "Source position of the row."),
    ),
    streamed=True,
)
ITEM_PROFILE = View(
    "item_profile",
    (ITEM,),
    "An item of the catalogue.",
    (
        Column("item", ColumnType.BYTES, "headrace.v1.Item."),
        Column("title", ColumnType.STRING, "The item's title."),
        Column("item_offsets", ColumnType.BYTES, "Source position of the row."),
    ),
    streamed=True,
)
ITEM_STATS = View(
    "item_stats",
    (ITEM, SOURCE_PARTITION),
    "Partial sums of an item over one source partition; add them up.",
    (
        Column("stats", ColumnType.BYTES, "headrace.v1.ItemStats."),
        _OFFSETS,
        Column("revision", ColumnType.INT64, "Events applied."),
    ),
    streamed=True,
)
POPULARITY = View(
    "popularity",
    (SEGMENT,),
    "The most popular items of a segment, best first.",
    (
        Column("popular_item_ids", ColumnType.STRINGS, "Items, best first."),
        Column("popular_scores", ColumnType.FLOATS, "Decayed engagement."),
        Column("popular_watermark_ms", ColumnType.INT64, "Newest event time, milliseconds since the epoch."),
    ),
    streamed=True,
)

VIEWS = (USER_STATE, USER_EMBEDDING, USER_BATCH_SCORES, USER_PROFILE, ITEM_PROFILE, ITEM_STATS, POPULARITY)

# What a model version reads: feature services of the Feast repo.
SERVICES = {
    "retrieval_v1": (USER_STATE, USER_EMBEDDING),
    "ranking_v1": (USER_STATE, USER_EMBEDDING, USER_PROFILE, ITEM_PROFILE, ITEM_STATS),
    "serving_v1": (USER_STATE, USER_EMBEDDING, USER_BATCH_SCORES, USER_PROFILE, POPULARITY),
}
