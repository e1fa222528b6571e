"""Feast's repo, generated from features/definitions.py, and its registration with a registry.

    python -m features.stores.feast_repo     writes feature_repo/ anew (a test compares)

Feast is imported here only, and only while applying: it costs seconds. Invariant: what Feast is told about a view is
what `definitions` says, so any Feast client reads the rows that the thin writer wrote, and the other way round.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow as pa

from core.errors import ConfigError
from core.settings import Settings
from features.definitions import SERVICES, VIEWS, Column, ColumnType, Entity, View
from features.stores import event_rows

REPO = Path(__file__).resolve().parents[2] / "feature_repo"
DEFINITIONS, CONFIG = "headrace_features.py", "feature_store.yaml"
# Names of the environment variables that feature_store.yaml and the definitions read.
REDIS_VARIABLE = "HEADRACE_FEAST_REDIS"
REGISTRY_VARIABLE = "HEADRACE_FEAST_REGISTRY"
OFFLINE_VARIABLE = "HEADRACE_FEAST_OFFLINE"
OFFLINE_DEFAULT = ".headrace/feast"

_TYPES = {
    ColumnType.BYTES: "Bytes",
    ColumnType.STRING: "String",
    ColumnType.INT64: "Int64",
    ColumnType.DOUBLE: "Float64",
    ColumnType.STRINGS: "Array(String)",
    ColumnType.FLOATS: "Array(Float32)",
}

_ARROW_TYPES = {
    ColumnType.BYTES: pa.binary(),
    ColumnType.STRING: pa.string(),
    ColumnType.INT64: pa.int64(),
    ColumnType.DOUBLE: pa.float64(),
    ColumnType.STRINGS: pa.list_(pa.string()),
    ColumnType.FLOATS: pa.list_(pa.float32()),
}

_HEADER = f'''\
"""Feast's view of the features: entities, views, push sources and feature services.

Generated from features/definitions.py by `python -m features.stores.feast_repo`; change that, not this. Invariant:
views of one entity share one online row, and offline each is a folder of Parquet files below {OFFLINE_VARIABLE}.
"""

import os

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import {{types}}

_OFFLINE = os.environ.get("{OFFLINE_VARIABLE}", "{OFFLINE_DEFAULT}")


def _files(view: str) -> FileSource:
    return FileSource(
        name=f"{{{{view}}}}_files",
        path=f"{{{{_OFFLINE}}}}/{{{{view}}}}",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )

'''

_CONFIG = f"""\
# Generated from features/definitions.py by `python -m features.stores.feast_repo`; change that, not this.
# {REDIS_VARIABLE}: host:port,db=0 of the online store. {REGISTRY_VARIABLE}: file of the registry.
project: {{project}}
provider: local
registry:
  path: ${{{{{REGISTRY_VARIABLE}}}}}
  # A refresh blocks reads; what is registered changes with a release.
  cache_ttl_seconds: 3600
online_store:
  type: redis
  connection_string: ${{{{{REDIS_VARIABLE}}}}}
offline_store:
  type: file
auth:
  type: no_auth
entity_key_serialization_version: 3
"""


def render(project: str = "headrace") -> dict[str, str]:
    """The generated files by name."""
    return {DEFINITIONS: _definitions(), CONFIG: _CONFIG.format(project=project)}


def write(folder: Path = REPO) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in render().items():
        (folder / name).write_text(text, "utf-8")


def apply_feature_repo(settings: Settings, registry_path: Path) -> int:
    """Registers entities, views and services in the registry file; what is there already is updated.

    Args:
        settings: `redis.url` and `features.project` go into the store's configuration.
        registry_path: the registry's file; its folder is made.

    Returns:
        How many objects were registered.

    Raises:
        ConfigError: Feast refuses them; says which.
    """
    store = feature_store(settings, registry_path)
    objects = feast_objects()
    try:
        store.apply(objects)
    except Exception as error:
        raise ConfigError(f"Feast refuses the feature repo: {' '.join(str(error).split())[:300]}") from error
    return len(objects)


def feature_store(settings: Settings, registry_path: Path):  # type: ignore[no-untyped-def]
    """A Feast store on the same Redis and project as the thin reader and writer."""
    from feast import FeatureStore, RepoConfig

    registry_path.parent.mkdir(parents=True, exist_ok=True)
    return FeatureStore(
        config=RepoConfig(
            project=settings.features.project,
            provider="local",
            registry={"path": str(registry_path), "cache_ttl_seconds": 3600},
            online_store={
                "type": "redis",
                "redis_type": "redis_cluster" if settings.redis.cluster else "redis",
                "connection_string": connection_string(
                    settings.redis.url.get_secret_value(), cluster=settings.redis.cluster
                ),
            },
            offline_store={"type": "file"},
            entity_key_serialization_version=3,
        )
    )


def offline_schema(view: View) -> pa.Schema:
    """Columns of a view's files below OFFLINE_VARIABLE."""
    keys = [pa.field(key, pa.string()) for key in view.join_keys]
    columns = [pa.field(column.name, _ARROW_TYPES[column.type]) for column in view.columns]
    times = [pa.field(name, event_rows.TIME) for name in ("event_timestamp", "created_timestamp")]
    return pa.schema([*keys, *columns, *times])


def feast_objects() -> list[object]:
    """The objects that the generated definitions make."""
    from feast import Entity as FeastEntity
    from feast import FeatureService, FeatureView

    made = runpy.run_path(str(REPO / DEFINITIONS))
    return [value for value in made.values() if isinstance(value, FeastEntity | FeatureView | FeatureService)]


def connection_string(url: str, *, cluster: bool = False) -> str:
    """A redis:// or rediss:// address in Feast's own form; nodes of a cluster have no databases."""
    parts = urlparse(url)
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise ConfigError(f"redis.url: Feast needs redis://host:port/db, not {parts.scheme}://")
    fields = [f"{parts.hostname}:{parts.port or 6379}"]
    if not cluster:
        fields.append(f"db={parts.path.strip('/') or 0}")
    if parts.username:
        fields.append(f"username={unquote(parts.username)}")
    if parts.password:
        fields.append(f"password={unquote(parts.password)}")
    if parts.scheme == "rediss":
        fields.append("ssl=true")
    return ",".join(fields)


# --- the text of the definitions ---


def _definitions() -> str:
    used = {_TYPES[column.type] for view in VIEWS for column in view.columns} | {"String"}
    types = sorted({name for text in used for name in text.replace(")", "").split("(")})
    lines = [_HEADER.format(types=", ".join(types))]
    entities = {entity.name: entity for view in VIEWS for entity in view.entities}
    for entity in entities.values():
        lines += [*_entity(entity), ""]
    for view in VIEWS:
        lines += [*_view(view), ""]
    for name, views in SERVICES.items():
        lines += [*_service(name, views), ""]
    return "\n".join(lines).rstrip() + "\n"


def _entity(entity: Entity) -> Iterator[str]:
    yield f"{entity.name} = Entity("
    yield f'    name="{entity.name}",'
    yield f'    join_keys=["{entity.join_key}"],'
    yield "    value_type=ValueType.STRING,"
    yield f'    description="{entity.meaning}",'
    yield ")"


def _view(view: View) -> Iterator[str]:
    name = view.name
    yield f'{name}_files = _files("{name}")'
    if view.streamed:
        yield f'{name}_push = PushSource(name="{name}_push", batch_source={name}_files)'
    yield f"{name} = FeatureView("
    yield f'    name="{name}",'
    yield f"    entities=[{', '.join(entity.name for entity in view.entities)}],"
    # Not by Feast: it does not enforce it online. Missing or stale is decided from the timestamps.
    yield "    ttl=None,"
    yield "    schema=["
    for entity in view.entities:
        yield f'        Field(name="{entity.join_key}", dtype=String),'
    for column in view.columns:
        yield from _field(column)
    yield "    ],"
    yield f"    source={name}_{'push' if view.streamed else 'files'},"
    yield f'    description="{view.meaning}",'
    yield ")"


def _field(column: Column) -> Iterator[str]:
    whole = f'Field(name="{column.name}", dtype={_TYPES[column.type]}, description="{column.meaning}"),'
    if len(whole) + 8 <= 120:
        yield f"        {whole}"
        return
    yield "        Field("
    yield f'            name="{column.name}",'
    yield f"            dtype={_TYPES[column.type]},"
    yield f'            description="{column.meaning}",'
    yield "        ),"


def _service(name: str, views: tuple[View, ...]) -> Iterator[str]:
    yield f"{name} = FeatureService("
    yield f'    name="{name}",'
    yield "    features=["
    for view in views:
        yield f"        {view.name},"
    yield "    ],"
    yield ")"


if __name__ == "__main__":
    write()
