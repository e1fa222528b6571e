"""The process: starts with everything down, refuses to start without a bundle, swaps releases while it serves."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.grpc_runtime import channel
from headrace.v1.recommender_service_pb2 import GetModelInfoRequest, RecommendRequest
from headrace.v1.recommender_service_pb2_grpc import RecommenderServiceStub

from .conftest import NOWHERE, until, write_bundle
from .test_tiers import ask, ids, reasons, tier

ROOT = Path(__file__).resolve().parents[2]


def start(registry, **more):
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}",
        "HEADRACE_REGISTRY__PATH": str(registry),
        "KAFKA_BOOTSTRAP_SERVERS": NOWHERE,
        "REDIS_URL": f"redis://{NOWHERE}",
        "HEADRACE_SERVING__PORT": "0",
        "HEADRACE_SERVING__ADMIN_PORT": "0",
        "HEADRACE_SERVING__CANDIDATE_TARGET": NOWHERE,
        "HEADRACE_SERVING__RANKER_TARGET": NOWHERE,
        "HEADRACE_TELEMETRY__LOG_FORMAT": "json",
        **more,
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "serving"], env=environment, stderr=subprocess.PIPE, text=True, cwd=registry.parent
    )


def test_without_a_bundle_it_says_what_to_run_and_exits(tmp_path) -> None:
    with start(tmp_path / "none") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.strip().splitlines()[-1].startswith("serving: no release bundle in ")
    assert "headrace train" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("broken", ["items.binpb", "popularity.json"])
def test_a_corrupt_bundle_is_refused(registry, house, broken) -> None:
    (registry / "v1" / broken).write_bytes(b"something else")
    with start(registry) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{broken} is corrupt" in said


def test_diversity_by_vectors_needs_a_bundle_that_has_them(registry, house) -> None:
    with start(registry, HEADRACE_SERVING__DIVERSITY_BY="vector") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "has no item_vectors.safetensors; train a new one" in said


async def test_it_starts_and_answers_with_everything_down(registry, house) -> None:
    with start(registry) as process:
        try:
            port = await asyncio.to_thread(_port, process)
            async with channel(f"127.0.0.1:{port}") as connection:
                begin = time.monotonic()
                answer = await RecommenderServiceStub(connection).Recommend(RecommendRequest(user_id="ada"), timeout=5)
                assert time.monotonic() - begin < 0.3
            assert tier(answer) == "POPULAR"
            assert len(answer.items) == 20
            assert "STORE_UNAVAILABLE" in reasons(answer)
        finally:
            process.terminate()
            await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 0


async def test_twice_what_it_can_rank_brings_lower_tiers_and_no_errors(registry, house) -> None:
    house.put_user()
    house.ranker.pause_seconds = 0.02
    settings = house.settings_of({})
    environment = {
        "HEADRACE_SERVING__CANDIDATE_TARGET": settings.serving.candidate_target,
        "HEADRACE_SERVING__RANKER_TARGET": settings.serving.ranker_target,
        # At most 2 / 0.02 s = 100 ranked answers a second.
        "HEADRACE_SERVING__MAX_CONCURRENT_REQUESTS": "2",
        "REDIS_URL": house.redis_url,
    }
    with start(registry, **environment) as process:
        try:
            port = await asyncio.to_thread(_port, process)
            async with channel(f"127.0.0.1:{port}") as connection:
                recommend = RecommenderServiceStub(connection).Recommend
                calls = []
                for _ in range(400):
                    calls.append(recommend(ask(), timeout=1))
                    await asyncio.sleep(0.005)
                # One that fails raises here.
                answers = await asyncio.gather(*calls)
        finally:
            process.terminate()
            await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 0
    assert all(len(answer.items) == 20 for answer in answers)
    ranked = [answer for answer in answers if tier(answer) == "RANKED"]
    shed = [answer for answer in answers if "OVERLOADED" in reasons(answer)]
    assert ranked
    assert len(shed) >= len(answers) / 4
    assert {tier(answer) for answer in shed} <= {"LAST_GOOD", "POPULAR"}


def _port(process) -> int:
    for line in process.stderr:
        if '"event": "ready"' in line:
            return int(line.split('"port": ')[1].split(",")[0].split("}")[0])
    raise AssertionError("it did not become ready")


async def test_a_new_release_is_swapped_in_while_it_serves(registry, house) -> None:
    recommender, _ = await house.open()
    features = house.settings_of({}).features
    await asyncio.to_thread(write_bundle, registry, features, "v2", rules={"lists": [{"item_ids": ["item-033"]}]})

    async def is_swapped() -> bool:
        assert (await recommender.Recommend(ask("nobody"))).items
        return await version_of(recommender) == "v2"

    await until(is_swapped)
    answer = await recommender.Recommend(ask("nobody"))
    assert (answer.versions.bundle_version, ids(answer)[0]) == ("v2", "item-033")


async def test_a_broken_release_leaves_the_old_one_in_place(registry, house, capfd) -> None:
    recommender, _ = await house.open()
    features = house.settings_of({}).features
    await asyncio.to_thread(write_bundle, registry, features, "v2", rules={"pin": [{"item_id": "a", "position": -1}]})

    async def is_refused() -> bool:
        return "the old one serves on" in capfd.readouterr().out

    await until(is_refused)
    assert await version_of(recommender) == "v1"
    await asyncio.to_thread(write_bundle, registry, features, "v3")

    async def is_swapped() -> bool:
        return await version_of(recommender) == "v3"

    await until(is_swapped)


async def version_of(recommender) -> str:
    return (await recommender.GetModelInfo(GetModelInfoRequest())).versions.bundle_version
