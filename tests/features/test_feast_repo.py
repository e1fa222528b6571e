"""The generated Feast repo."""

import ast

import pytest

from core.errors import ConfigError
from features.definitions import VIEWS
from features.stores import feast_repo


def test_the_committed_files_are_what_the_generator_writes() -> None:
    for name, text in feast_repo.render().items():
        assert (feast_repo.REPO / name).read_text("utf-8") == text, "run `python -m features.stores.feast_repo`"


def test_every_view_is_declared_with_every_column() -> None:
    tree = ast.parse(feast_repo.render()[feast_repo.DEFINITIONS])
    declared = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "FeatureView":
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            fields = [field.keywords[0].value.value for field in options["schema"].elts]
            declared[options["name"].value] = fields
    assert declared == {view.name: [*view.join_keys, *(column.name for column in view.columns)] for view in VIEWS}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://127.0.0.1:6380/2", "127.0.0.1:6380,db=2"),
        ("redis://localhost", "localhost:6379,db=0"),
        ("rediss://me:p%40ss@cache:7000/0", "cache:7000,db=0,username=me,password=p@ss,ssl=true"),
    ],
)
def test_a_redis_address_in_feasts_form(url, expected) -> None:
    assert feast_repo.connection_string(url) == expected


def test_the_address_of_a_cluster_has_no_database() -> None:
    assert feast_repo.connection_string("redis://node:7000/0", cluster=True) == "node:7000"


def test_another_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="redis://host:port"):
        feast_repo.connection_string("unix:///tmp/redis.sock")
