"""Loading a release and keeping it fresh: what is refused, what the topics change. Kafka is away throughout."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from core.bundle import ReleaseBundle
from core.clock import ManualClock
from core.errors import ArtifactError
from core.kafka import Record
from core.settings import Settings, load_settings
from core.topics import Topics
from features import item_stats
from features.item_stats import ItemPartial
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import Item
from ranker.release import UserJob, score_jobs
from ranker.releases import Releases

T0_MS = 1_700_000_000_000
DIMENSION = 16
MakeBundle = Callable[..., ReleaseBundle]
State = Callable[..., UserState]


def test_without_a_bundle_it_says_what_to_run(registry_settings: Settings) -> None:
    with pytest.raises(ArtifactError, match="headrace train"):
        Releases(registry_settings, ManualClock())


def test_a_device_that_is_not_there_is_refused(make_bundle: MakeBundle, registry_settings: Settings) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    make_bundle()
    settings = registry_settings.model_copy(
        update={"ranker": registry_settings.ranker.model_copy(update={"device": "cuda"})}
    )
    with pytest.raises(ArtifactError, match="set it to auto or cpu"):
        Releases(settings, ManualClock())


def test_news_of_the_topics_reach_the_catalogue(make_bundle: MakeBundle, registry_settings: Settings) -> None:
    make_bundle()
    releases = Releases(registry_settings, ManualClock(T0_MS))
    release, topics = releases.current, Topics()
    catalog = release.catalog
    clicks = catalog.column("clicks")[catalog.row("item-0")]
    partial = ItemPartial()
    item_stats.apply(partial, UserEvent("u", 1, "item-0", "click", T0_MS), registry_settings.features)
    message = item_stats.as_message("item-0", 2, partial, registry_settings.features)

    def record(topic: str, key: str, value: bytes | None) -> Record:
        return Record(topic, key.encode(), value, None, 0, 0)

    releases.feed.apply(
        [
            record(topics.item_stats, "item-0\x002", message.SerializeToString()),
            record(topics.items, "new-1", Item(item_id="new-1", categories=["taste-1"]).SerializeToString()),
            record(topics.items, "broken", b"\xff\xff"),
            record(topics.items, "item-1", None),
            record(topics.items, "never-there", None),
        ]
    )
    assert catalog.column("clicks")[catalog.row("item-0")] == clicks + 1
    row = catalog.row("new-1")
    assert row >= 40
    assert release.scorer.table.categories[row + 1].tolist() == catalog.column("categories")[row].tolist()
    assert not catalog.column("available")[catalog.row("item-1")]


def test_one_batch_of_two_releases_scores_each_by_its_own(
    make_bundle: MakeBundle, registry_settings: Settings, state_of: State
) -> None:
    jobs = []
    for seed in (1, 2):
        make_bundle(f"v{seed}", seed=seed)
        release = Releases(registry_settings, ManualClock(T0_MS)).current
        numbers = [f"item-{number}" for number in range(5)]
        scores, bits = np.ones(5, np.float32), np.ones(5, np.int32)
        jobs.append(UserJob(release, state_of(7), None, numbers, scores, bits, T0_MS + 1000))
    mixed = score_jobs([jobs[0], jobs[1], jobs[0]], registry_settings)
    alone = [score_jobs([job], registry_settings)[0] for job in jobs]
    for ours, theirs in zip(mixed, [alone[0], alone[1], alone[0]], strict=True):
        np.testing.assert_allclose(ours.score, theirs.score, atol=1e-6)
    assert not np.allclose(mixed[0].score, mixed[1].score)


def test_warm_up_and_load_take_little_time(make_bundle: MakeBundle, registry_settings: Settings) -> None:
    make_bundle()
    started = time.monotonic()
    Releases(registry_settings, ManualClock(T0_MS))
    assert time.monotonic() - started < 10


def test_settings_of_another_dimension_do_not_matter(make_bundle: MakeBundle, registry_settings: Settings) -> None:
    make_bundle()
    other = load_settings(None, {"registry": registry_settings.registry.model_dump(), "offline": {"dimension": 128}})
    assert Releases(other, ManualClock(T0_MS)).current.dimension == DIMENSION
