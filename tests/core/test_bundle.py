"""A bundle is loaded whole or refused."""

import json

import pytest

from core import bundle
from core.bundle import Manifest
from core.errors import ArtifactError
from headrace.v1.events_pb2 import Item


def manifest(version: str) -> Manifest:
    return Manifest(version, "e1", "i1", "m1", "signature", 1, 1, 4, 2)


@pytest.fixture
def publish(tmp_path):
    def build(version: str = "v1", *, promote: bool = True) -> bundle.ReleaseBundle:
        staged = bundle.staging_folder(tmp_path, version)
        bundle.write_delimited(staged / bundle.ITEMS, [Item(item_id="a", title="A"), Item(item_id="b")])
        (staged / bundle.BLEND).write_text('{"weights": {"ranker": 1.0}}', "utf-8")
        return bundle.publish(tmp_path, staged, manifest(version), promote=promote)

    return build


def test_a_published_bundle_opens_with_its_items(tmp_path, publish) -> None:
    publish()
    opened = bundle.open_current(tmp_path)
    assert opened.version == "v1"
    assert [item.item_id for item in opened.items()] == ["a", "b"]
    assert opened.json(bundle.BLEND) == {"weights": {"ranker": 1.0}}


def test_no_bundle_says_what_to_run(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="headrace train"):
        bundle.open_current(tmp_path)


def test_a_changed_byte_is_refused(tmp_path, publish) -> None:
    path = publish().path / bundle.ITEMS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match="corrupt"):
        bundle.open_current(tmp_path)


def test_a_missing_file_is_named(tmp_path, publish) -> None:
    (publish().path / bundle.BLEND).unlink()
    with pytest.raises(ArtifactError, match=bundle.BLEND):
        bundle.open_current(tmp_path)


def test_another_format_is_refused(tmp_path, publish) -> None:
    path = publish().path / bundle.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "format": 99}), "utf-8")
    with pytest.raises(ArtifactError, match="format 99"):
        bundle.open_current(tmp_path)


def test_a_cut_record_is_refused(tmp_path, publish) -> None:
    path = publish().path / bundle.ITEMS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="broken record"):
        list(bundle.read_delimited(path, Item))


def test_versions_are_promoted_in_one_step_and_never_overwritten(tmp_path, publish) -> None:
    publish("v1")
    publish("v2", promote=False)
    assert bundle.current_version(tmp_path) == "v1"
    bundle.promote_version(tmp_path, "v2")
    assert bundle.current_version(tmp_path) == "v2"
    assert bundle.versions(tmp_path) == ["v1", "v2"]
    with pytest.raises(ArtifactError, match="exists already"):
        publish("v1")
    with pytest.raises(ArtifactError, match="it holds: v1, v2"):
        bundle.promote_version(tmp_path, "v9")
