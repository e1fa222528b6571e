"""Settings: one frozen object, read once at the entry point of a process and handed down.

Order, later wins: `core/defaults.toml`, a TOML file (`--config` or HEADRACE_CONFIG), KAFKA_BOOTSTRAP_SERVERS and
REDIS_URL, environment variables HEADRACE_<SECTION>__<KEY>. Invariant: every key has its default and its meaning
in `defaults.toml`; an unknown key is an error.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from core.errors import ConfigError

DEFAULTS = Path(__file__).with_name("defaults.toml")
CONFIG_VARIABLE = "HEADRACE_CONFIG"
# Names that the world already uses, and the setting that each of them sets.
_WELL_KNOWN = {"KAFKA_BOOTSTRAP_SERVERS": ("kafka", "bootstrap_servers"), "REDIS_URL": ("redis", "url")}

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
PositiveMs = Annotated[float, Field(gt=0)]
Ms = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KafkaSettings(_Section):
    """Where the log is and how to talk to it."""

    bootstrap_servers: str
    topic_prefix: str
    partitions: Positive
    replication: Positive
    fetch_wait_max_ms: Positive
    log_id: str
    client: dict[str, str | int | bool]


class RedisSettings(_Section):
    """Where the online store is."""

    url: SecretStr
    cluster: bool
    timeout_ms: Positive


class FeaturesSettings(_Section):
    """What is kept of users and items, and what it weighs."""

    project: str
    history_length: Annotated[int, Field(gt=0, le=1000)]
    duplicate_horizon: Annotated[int, Field(gt=0, le=10000)]
    half_lives_seconds: tuple[Positive, ...]
    category_buckets: Annotated[int, Field(gt=0, le=4096)]
    kind_weights: dict[str, float]
    positive_kinds: tuple[str, ...]
    session_gap_seconds: Positive
    stale_after_seconds: Positive

    @model_validator(mode="after")
    def _consistent(self) -> "FeaturesSettings":
        if "default" not in self.kind_weights:
            raise ValueError("features.kind_weights needs a `default` for kinds that it does not name")
        if self.duplicate_horizon < self.history_length:
            raise ValueError("features.duplicate_horizon must be at least features.history_length")
        return self


class RegistrySettings(_Section):
    """Where release bundles are."""

    path: Path
    watch_interval_ms: Positive


class StreamsSettings(_Section):
    """The stream worker."""

    host: str
    admin_port: Port
    group_id: str
    group_protocol: Literal["cooperative-sticky", "range", "roundrobin", "consumer"]
    instance_id: str
    session_timeout_ms: Positive
    poll_max_events: Positive
    gather_ms: Ms
    state_cache_users: Positive
    marker_interval_ms: Positive
    encode_batch_users: Annotated[int, Field(gt=0, le=1000)]
    bfloat16_from_users: Annotated[int, Field(ge=0)]
    encode_wait_ms: PositiveMs
    encode_timeout_ms: Positive
    dirty_users_max: Positive
    sweep_interval_seconds: Annotated[int, Field(ge=0)]
    stats_broadcast_interval_ms: Positive
    shown_broadcast_interval_ms: Positive
    popularity_interval_ms: Positive
    removed_item_keep_seconds: Positive
    stall_timeout_ms: Positive
    event_log_path: str
    event_log_max_events: Positive
    event_log_interval_ms: Positive


# Sources of the candidate service (features.vectors.SOURCES has the ranker's view of them).
SourceName = Literal["ann", "item_to_item", "co_visitation", "trending", "new"]


class CoVisitationSettings(_Section):
    """What the candidate service learns from the events: items that go together."""

    window_seconds: Positive
    window_events: Annotated[int, Field(gt=0, le=1000)]
    half_life_seconds: Positive
    neighbours_max: Annotated[int, Field(gt=0, le=10_000)]
    pairs_max: Positive
    users_max: Positive


class CandidateSettings(_Section):
    """The candidate service."""

    host: str
    port: Port
    admin_port: Port
    worker_threads: Positive
    encode_threads: Positive
    queue_max: Positive
    quotas: dict[SourceName, Annotated[int, Field(ge=0, le=2000)]]
    source_budget_ms: dict[SourceName, PositiveMs]
    item_to_item_seeds: Annotated[int, Field(gt=0, le=100)]
    exact_max_items: Positive
    index_delta_max_items: Positive
    recall_interval_ms: Positive
    shard_targets: tuple[str, ...]
    shard: Annotated[int, Field(ge=0)]
    encode_batch_users: Annotated[int, Field(gt=0, le=1000)]
    bfloat16_from_users: Annotated[int, Field(ge=0)]
    co_visitation: CoVisitationSettings

    @model_validator(mode="after")
    def _sources_are_complete(self) -> "CandidateSettings":
        missing = [
            name for name in get_args(SourceName) if name not in self.quotas or name not in self.source_budget_ms
        ]
        if missing:
            raise ValueError(f"quotas and source_budget_ms name every source; {missing[0]} is missing (quota 0 = off)")
        if not any(self.quotas.values()):
            raise ValueError("at least one source needs a quota above 0")
        return self

    @model_validator(mode="after")
    def _is_one_of_the_shards(self) -> "CandidateSettings":
        if self.shard >= max(1, len(self.shard_targets)):
            raise ValueError(f"shard {self.shard} is none of the {len(self.shard_targets)} shard_targets; count from 0")
        return self


class RankerSettings(_Section):
    """The ranker service."""

    host: str
    port: Port
    admin_port: Port
    device: Literal["auto", "cpu", "cuda"]
    worker_threads: Positive
    max_batch_size: Annotated[int, Field(gt=0, le=1024)]
    max_wait_ms: Annotated[float, Field(ge=0)]
    queue_max: Positive
    form: Literal["auto", "torch", "bf16", "onnx", "onnx-int8", "triton"]
    triton_target: str
    triton_timeout_ms: PositiveMs
    keep_previous: bool
    shadow_queue_max: Positive
    cascade_keep: Annotated[int, Field(ge=0)]


class StageBudgets(_Section):
    """Milliseconds per stage of a request."""

    hydrate: PositiveMs
    retrieve: PositiveMs
    rank: PositiveMs
    rerank: PositiveMs
    margin: PositiveMs

    def total(self) -> float:
        return self.hydrate + self.retrieve + self.rank + self.rerank + self.margin


Tier = Literal["ranked", "reranked_batch", "last_good", "rules", "popular_segment", "popular"]


class Surface(_Section):
    """What a surface (home, mail, checkout ...) has of its own; what is not given is as elsewhere."""

    num_items: Annotated[int, Field(gt=0, le=500)] | None = None
    diversity: Share | None = None
    exploration_rate: Share | None = None
    exclude_seen_kinds: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class OnSurface:
    """The settings that hold on one surface."""

    num_items: int
    diversity: float
    exploration_rate: float
    exclude_seen_kinds: frozenset[str]


class ServingSettings(_Section):
    """The front door."""

    host: str
    port: Port
    admin_port: Port
    candidate_target: str
    ranker_target: str
    deadline_ms: Positive
    stage_budget_ms: StageBudgets
    default_num_items: Annotated[int, Field(gt=0, le=500)]
    num_candidates: Annotated[int, Field(gt=0, le=2000)]
    retrieval_cache_seconds: Annotated[float, Field(ge=0, le=60)]
    ladder: tuple[Tier, ...]
    breaker_failures: Positive
    breaker_open_ms: Positive
    max_concurrent_requests: Positive
    last_good_users: Positive
    last_good_max_age_seconds: Positive
    exclude_seen_kinds: tuple[str, ...]
    blend_weights: dict[str, float]
    diversity: Share
    diversity_method: Literal["mmr", "dpp"]
    diversity_by: Literal["category", "vector"]
    fatigue_weight: Share
    fatigue_half_life_seconds: Positive
    exploration_rate: Share
    surfaces: dict[str, Surface]
    impression_queue_max: Positive
    feature_log_share: Share
    feature_log_others: Annotated[int, Field(ge=0, le=100)]
    rules_path: str
    state_path: str
    replay_log_mb: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _ladder_ends(self) -> "ServingSettings":
        if not self.ladder or self.ladder[-1] != "popular" or len(set(self.ladder)) != len(self.ladder):
            raise ValueError('serving.ladder must name each rung once and end with "popular"')
        return self

    def on(self, name: str) -> OnSurface:
        """The settings of a surface; those of all where it has none of its own."""
        own = self.surfaces.get(name, _NO_SURFACE)
        seen = self.exclude_seen_kinds if own.exclude_seen_kinds is None else own.exclude_seen_kinds
        return OnSurface(
            self.default_num_items if own.num_items is None else own.num_items,
            self.diversity if own.diversity is None else own.diversity,
            self.exploration_rate if own.exploration_rate is None else own.exploration_rate,
            frozenset(seen),
        )


_NO_SURFACE = Surface()


class OfflineSettings(_Section):
    """Training and batch scoring."""

    seed: int
    dimension: Positive
    blocks: Positive
    heads: Positive
    dropout: Share
    teachers: Annotated[int, Field(gt=0, le=8)]
    teacher_blocks: Annotated[int, Field(ge=0)]
    teacher_history_length: Positive
    teacher_dropout: Share
    teacher_share: Share
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Positive
    max_epochs: Positive
    patience_epochs: Positive
    max_train_seconds: Annotated[int, Field(ge=0)]
    validation_share: Share
    refit_epochs: Annotated[int, Field(ge=0)]
    ranker_student: bool
    ranker_epochs: Positive
    ranker_learning_rate: Annotated[float, Field(gt=0, le=1)]
    ranker_negatives: Positive
    ranker_max_rows: Positive
    batch_scores_per_user: Positive
    popularity_items: Positive


class TelemetrySettings(_Section):
    """Logs."""

    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["console", "json"]


class Settings(BaseSettings):
    """All sections. Each process uses its own and those of the things it talks to."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_", env_nested_delimiter="__", frozen=True, extra="forbid")

    kafka: KafkaSettings
    redis: RedisSettings
    features: FeaturesSettings
    registry: RegistrySettings
    streams: StreamsSettings
    candidate: CandidateSettings
    ranker: RankerSettings
    serving: ServingSettings
    offline: OfflineSettings
    telemetry: TelemetrySettings

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def load_settings(config: Path | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    """Reads the settings of this process.

    Args:
        config: a TOML file in the shape of `defaults.toml`; else the one that HEADRACE_CONFIG names, if any.
        overrides: values by section and key, below the environment (command-line flags of the tools).

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value out of range; names the key.
    """
    values = _read_toml(DEFAULTS)
    chosen = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    if chosen is not None:
        values = _merged(values, _read_toml(chosen))
    for variable, (section, key) in _WELL_KNOWN.items():
        if os.environ.get(variable):
            values = _merged(values, {section: {key: os.environ[variable]}})
    if overrides:
        values = _merged(values, overrides)
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigError(
            f"{where}: {first['msg']} (see core/defaults.toml for its meaning; set it in "
            f"{chosen or 'a --config file'} or as HEADRACE_{where.upper().replace('.', '__')})"
        ) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}; give an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path}: not valid TOML: {error}") from error


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both_tables = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(below, value) if both_tables and below is not None else value
    return merged
