"""Training makes a whole bundle, once; what was finished is not done again."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from candidate.co_visitation import load_co_visitation
from candidate.index import load_index
from candidate.towers import load_towers
from core import bundle as names
from core.bundle import open_bundle, open_current
from core.clock import ManualClock
from core.codec import from_ms
from core.errors import ConfigError, RecommenderError
from core.settings import load_settings
from features import vectors
from features.catalog import Catalog
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, IMPRESSIONS, ITEMS, USERS, Source, to_table
from headrace.v1.events_pb2 import Event
from offline import train as training
from offline.batch_scores import read_batch_scores
from offline.cli import app
from offline.logs import read_items
from offline.models import Models, read_item_vectors
from offline.replay import Replay, read_entries
from offline.train import train

TINY = {"offline": {"dimension": 8, "max_epochs": 1, "ranker_epochs": 1, "ranker_max_rows": 1000}}


@pytest.fixture
def quick():
    return load_settings(overrides=TINY)


class _StoppedError(Exception):
    pass


def test_the_bundle_is_whole_and_agrees_with_itself(bundle, shop, settings, registry):
    again = open_current(registry)
    assert again.version == bundle.version
    manifest = again.manifest
    items = list(again.items())
    assert [item.item_id for item in items] == [item.item_id for item in read_items(shop)]
    assert manifest.item_count == len(items) == len(read_item_vectors(again.path))
    assert manifest.dimension == settings.offline.dimension
    assert manifest.feature_signature == vectors.SIGNATURE
    assert manifest.embedding_version == load_towers(again.path).embedding_version
    assert manifest.model_version == again.json(names.RANKER_CONFIG)["model_version"]
    assert manifest.data_watermark_ms == max(entry.time_ms for entry in read_entries(shop))
    assert {"towers_ndcg_at_10", "ranker_auc"} <= set(manifest.metrics)
    item_vectors = read_item_vectors(again.path)
    index = load_index(again.file(names.INDEX), item_vectors)
    rows, _ = index.search(item_vectors[5:6], 1)
    assert rows[0, 0] == 5
    assert again.json(names.BLEND) == {"weights": settings.serving.blend_weights}
    assert again.json(names.RULES) == {}


def test_statistics_and_popularity_are_as_of_the_watermark(bundle, settings):
    catalog = Catalog.of_items(bundle.items(), settings.features)
    stats = list(bundle.item_stats())
    assert {one.source_partition for one in stats} == {-1}
    catalog.put_all_stats(stats)
    assert len(catalog) == bundle.manifest.item_count, "statistics name no other items"
    popularity = catalog.popularity(bundle.manifest.data_watermark_ms)
    lists = bundle.json(names.POPULARITY)
    listed = [item_id for item_id, _ in lists["all"]]
    servable = np.flatnonzero(catalog.servable(bundle.manifest.data_watermark_ms))
    expected = servable[np.argsort(-popularity[servable], kind="stable")][: settings.offline.popularity_items]
    assert set(listed) == {catalog.item_ids[row] for row in expected}
    scores = [score for _, score in lists["all"]]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, np.sort(popularity[expected])[::-1], rtol=1e-5)
    assert lists["segments"]


def test_every_user_with_events_has_batch_scores(bundle, shop, settings):
    rows = list(read_batch_scores(bundle.file(names.BATCH_SCORES)))
    events = shop.events()
    assert [row.user_id for row in rows] == sorted(set(events["user_id"].to_pylist()))
    for row in rows:
        assert 0 < len(row.item_ids) == len(set(row.item_ids)) <= settings.offline.batch_scores_per_user
        assert row.scores == sorted(row.scores, reverse=True)
        assert all(0 <= score <= 1 for score in row.scores)


def test_the_same_data_and_settings_are_not_trained_twice(bundle, shop, settings, registry, monkeypatch):
    monkeypatch.setattr(training, "train_towers", None)
    assert train(shop.root, registry, settings, progress=False).version == bundle.version


def test_an_interrupted_run_goes_on_after_its_last_finished_step(shop, quick, tmp_path, monkeypatch, capfd):
    trained = []
    real_towers, real_scores = training.train_towers, training.write_batch_scores
    monkeypatch.setattr(training, "train_towers", lambda *a, **k: trained.append("towers") or real_towers(*a, **k))

    def stop(*arguments, **options):
        raise _StoppedError

    monkeypatch.setattr(training, "write_batch_scores", stop)
    with pytest.raises(_StoppedError):
        train(shop.root, tmp_path, quick, device="cpu", progress=False)
    assert names.versions(tmp_path) == []
    monkeypatch.setattr(training, "write_batch_scores", real_scores)
    monkeypatch.setattr(training, "train_ranker", stop)
    made = train(shop.root, tmp_path, quick, device="cpu")
    assert trained == ["towers"]
    assert "towers: finished before, reused" in capfd.readouterr().err
    assert open_bundle(made.path).manifest.metrics["towers_epochs"] == 1
    assert [path.name for path in tmp_path.glob(".training/*") if path.is_dir()] == []


def test_fresh_starts_over_and_what_is_not_promoted_does_not_serve(shop, quick, tmp_path):
    clock = ManualClock(1_780_000_000_000)
    first = train(shop.root, tmp_path, quick, device="cpu", progress=False, clock=clock)
    assert first.version.startswith("20260528T202640-")
    clock.advance(1000)
    second = train(shop.root, tmp_path, quick, device="cpu", fresh=True, promote=False, progress=False, clock=clock)
    assert names.versions(tmp_path) == [first.version, second.version]
    assert names.current_version(tmp_path) == first.version
    # The same seed, the same models.
    assert second.manifest.model_version == first.manifest.model_version
    assert second.manifest.embedding_version == first.manifest.embedding_version
    # Found again, and promoted now.
    assert train(shop.root, tmp_path, quick, progress=False).version == second.version
    assert names.current_version(tmp_path) == second.version


def test_nothing_from_before_ms_on_is_in_the_bundle(shop, quick, tmp_path):
    times = shop.events()["event_time"].cast("int64").to_pylist()
    before_ms = times[len(times) // 2]
    made = train(shop.root, tmp_path / "log", quick, device="cpu", before_ms=before_ms, progress=False)
    assert made.manifest.data_watermark_ms < before_ms
    # A log that ends there gives the same key, hence the same bundle.
    cut = EventLog(tmp_path / "cut")
    for table in (EVENTS, IMPRESSIONS):
        cut.write(table, shop.rows(table, end_ms=before_ms).cast(table.schema), "x")
    for table in (ITEMS, USERS):
        cut.write(table, shop.states(table).cast(table.schema), "x")
    assert training.training_key(cut, quick, before_ms) == training.training_key(shop, quick, before_ms)
    assert training.training_key(shop, quick, None) != training.training_key(shop, quick, before_ms)


def test_what_is_wrong_is_said_in_one_line(tmp_path, quick, shop):
    with pytest.raises(ConfigError, match="no event log at"):
        train(tmp_path / "none", tmp_path / "registry", quick, progress=False)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RecommenderError, match="is not writable"):
        train(shop.root, tmp_path / "file", quick, progress=False)
    assert not (tmp_path / "registry").exists()


def test_two_runs_on_the_same_work_do_not_meet(shop, quick, tmp_path):
    work = tmp_path / ".training" / training.training_key(shop, quick, None)
    with training._only_one(work, fresh=False), pytest.raises(ConfigError, match="another `headrace train`"):
        train(shop.root, tmp_path, quick, progress=False)


def test_models_that_do_not_fit_the_catalogue_are_refused(bundle, settings):
    with pytest.raises(RecommenderError, match="train again"):
        Models.load(bundle.path, Catalog(settings.features), settings)


def test_the_command_prints_json(shop, registry, bundle, tmp_path):
    config = tmp_path / "quick.toml"
    config.write_text(
        "[offline]\ndimension = 16\nmax_epochs = 2\nranker_epochs = 1\nranker_max_rows = 4000\n"
        "batch_scores_per_user = 10\npopularity_items = 20\n"
    )
    arguments = ["train", "--data", shop.root, "--registry", str(registry), "--config", str(config), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bundle_version"] == bundle.version


def test_statistics_of_streamed_events_are_kept_apart_by_partition(tmp_path, shop, quick) -> None:
    """The stream broadcasts whole rows per partition: what a replica has from the bundle is replaced, not added to."""
    shutil.copytree(shop.root, tmp_path / "log")
    log, last_ms = EventLog(tmp_path / "log"), max(entry.time_ms for entry in read_entries(shop))
    item_id = read_items(shop)[0].item_id
    events = [
        Event(event_id=f"e{n}", user_id="u", item_id=item_id, kind="click", event_time=from_ms(last_ms + n))
        for n in range(5)
    ]
    places = [Source("headrace.events.v1", 2, offset, last_ms) for offset in range(5)]
    log.write(EVENTS, to_table(EVENTS, events, places), f"{7:016x}-p2-{0:012d}-{4:012d}")
    made = train(log.root, tmp_path / "bundles", quick, progress=False)
    stats = list(made.item_stats())
    assert {(one.item_id, one.revision) for one in stats if one.source_partition == 2} == {(item_id, 5)}
    before = Replay(read_items(shop), quick.features)
    before.advance(read_entries(shop))
    imported = {one.item_id: one.revision for one in stats if one.source_partition == -1}
    assert imported == {name: partial.revision for name, partial in before.partials.items()}
    # Co-visitation says how far it has read, so that a replica goes on from there; what was imported has no place.
    pairs = load_co_visitation(made.path, quick.candidate.co_visitation, quick.features)
    assert pairs.included == {(7, 2): 4}
    assert pairs.pair_count > 0
