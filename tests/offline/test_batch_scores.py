"""Batch scores: of every user, best first, resumable, in the online store."""

import pytest

from core.errors import ArtifactError, StageError
from core.settings import load_settings
from features.definitions import USER_BATCH_SCORES
from features.stores.online import OnlineStore
from features.windows import recent_items
from offline import batch_scores
from offline.batch_scores import read_batch_scores, score, score_users, write_batch_scores
from offline.logs import with_new_items
from offline.models import Models
from offline.replay import Replay, read_entries
from offline.reporting import Reporter


@pytest.fixture(scope="module")
def replay(bundle, shop, settings):
    replay = Replay(with_new_items(bundle.items(), shop), settings.features)
    replay.advance(read_entries(shop))
    return replay


@pytest.fixture(scope="module")
def models(bundle, replay, settings):
    return Models.load(bundle.path, replay.catalog, settings)


def test_scores_are_those_of_the_ranker_and_leave_out_what_was_dealt_with(replay, models, settings):
    excluded = frozenset(settings.serving.exclude_seen_kinds)
    servable = replay.catalog.servable(replay.watermark_ms)
    rows = [row for batch in score_users(models, replay.catalog, replay.states, replay.watermark_ms) for row in batch]
    assert [row.user_id for row in rows] == [user for user, state in replay.states.items() if state.revision]
    for row in rows:
        assert not set(row.item_ids) & set(recent_items(replay.states[row.user_id], excluded))
        assert all(servable[replay.catalog.row(item_id)] for item_id in row.item_ids)
    assert len({tuple(row.item_ids) for row in rows}) > len(rows) / 2, "they are personal"


def test_an_interrupted_run_uses_its_finished_parts(replay, models, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_scores, "_PART_USERS", 40)
    arguments = (models, replay.catalog, replay.states, replay.watermark_ms, tmp_path / "parts")
    whole = write_batch_scores(*arguments, tmp_path / "one.parquet", Reporter(shown=False))
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == -(-len(replay.states) // 40)
    parts[1].unlink()
    scored = []
    real = batch_scores.score_users
    monkeypatch.setattr(
        batch_scores,
        "score_users",
        lambda models, catalog, states, now: scored.extend(states) or real(models, catalog, states, now),
    )
    assert write_batch_scores(*arguments, tmp_path / "two.parquet", Reporter(shown=False)) == whole
    assert scored == sorted(replay.states)[40:80]
    assert list(read_batch_scores(tmp_path / "one.parquet")) == list(read_batch_scores(tmp_path / "two.parquet"))


def test_score_writes_the_current_bundles_scores_into_the_store(shop, registry, bundle, online):
    summary = score(shop.root, registry, online, device="cpu", progress=False)
    written = list(read_batch_scores(bundle.path / "batch_scores.parquet"))
    assert summary.users == len(written)
    assert summary.bundle_version == bundle.version
    store = OnlineStore(online.redis, online.features.project)
    rows = store.read(USER_BATCH_SCORES, [(row.user_id,) for row in written])
    for row, expected in zip(rows, written, strict=True):
        assert row.cells["batch_item_ids"] == expected.item_ids
        assert row.cells["batch_scores"] == pytest.approx(expected.scores, rel=1e-5)
        assert row.cells["batch_bundle_version"] == bundle.version
    store.close()
    assert list(registry.glob(".scoring/*")) == []


def test_without_redis_score_says_so_before_the_work(shop, registry, bundle):
    nowhere = load_settings(overrides={"redis": {"url": "redis://127.0.0.1:9/0"}})
    with pytest.raises(StageError, match="redis"):
        score(shop.root, registry, nowhere, progress=False)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "scores.parquet").write_bytes(b"no parquet")
    with pytest.raises(ArtifactError, match=r"scores\.parquet cannot be read"):
        list(read_batch_scores(tmp_path / "scores.parquet"))
