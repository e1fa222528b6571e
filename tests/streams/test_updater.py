"""Vectors follow states: coalesced, never backwards, and found again by a sweep."""

import threading
import time
from concurrent import futures

import grpc
import pytest

from core.settings import load_settings
from features import positions, windows
from features.definitions import USER_EMBEDDING, USER_STATE
from features.stores.online import OnlineStore, Write
from features.windows import UserState
from headrace.v1 import candidate_service_pb2 as pb
from headrace.v1.candidate_service_pb2_grpc import CandidateServiceServicer, add_CandidateServiceServicer_to_server
from streams.updater import EmbeddingUpdater


def wait_until(condition, timeout_seconds: float = 10) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.002)


def everything(partition: int) -> bool:
    return True


class Encoder(CandidateServiceServicer):
    """A candidate service whose vector of a user is [revision]. Users named `bad…` are refused."""

    def __init__(self) -> None:
        self.version = "towers-1"
        # So many calls meet a full queue.
        self.full = 0
        self.calls: list[list[str]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def EncodeUsers(self, request, context):
        self.entered.set()
        self.gate.wait(10)
        self.calls.append([user.user_id for user in request.users])
        if self.full:
            self.full -= 1
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        if any(user.user_id.startswith("bad") for user in request.users):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "users: not a state")
        response = pb.EncodeUsersResponse(embedding_version=self.version)
        for user in request.users:
            revision = windows.decode(user.state).revision
            response.users.add(user_id=user.user_id, embedding=[float(revision)], revision=revision)
        return response

    def GetIndexInfo(self, request, context):
        return pb.GetIndexInfoResponse(embedding_version=self.version)


class Service:
    """The encoder on a socket; may be stopped and started on the same port."""

    def __init__(self) -> None:
        self.encoder, self.port, self._server = Encoder(), 0, None

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        add_CandidateServiceServicer_to_server(self.encoder, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def service():
    service = Service()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def house(shared_redis, service, request):
    """A store, and a factory of running updaters."""
    started = []

    class House:
        store = None

        def settings(self, **streams):
            return load_settings(
                overrides={
                    "redis": {"url": shared_redis.url},
                    "features": {"project": f"updater-{request.node.name}"},
                    "streams": {"sweep_interval_seconds": 0, **streams},
                    "serving": {"candidate_target": f"127.0.0.1:{service.port}"},
                }
            )

        def start(self, *, owns=everything, **streams) -> EmbeddingUpdater:
            settings = self.settings(**streams)
            store = OnlineStore(settings.redis, settings.features.project)
            started.append(EmbeddingUpdater(settings, store, owns))
            started[-1].start()
            return started[-1]

        def put(self, *users: str, revision: int = 1, partition: int | None = None) -> None:
            offsets = {} if partition is None else {(1, partition): revision}
            state = UserState(revision=revision, offsets=offsets)
            cells = {"state": windows.encode(state), "revision": revision}
            if partition is not None:
                cells["offsets"] = positions.encode(offsets)
            self.store.write([Write(USER_STATE, (user_id,), cells) for user_id in users])

        def vector(self, user_id: str):
            cells = self.store.read(USER_EMBEDDING, [(user_id,)])[0].cells
            return cells.get("vector"), cells.get("embedding_version"), cells.get("embedding_revision")

    house = House()
    house.store = OnlineStore(house.settings().redis, house.settings().features.project)
    yield house
    for updater in started:
        updater.stop()
    house.store.close()


def test_a_marked_user_gets_a_vector_of_the_states_revision_within_milliseconds(house, service) -> None:
    updater = house.start()
    house.put("u", revision=3)
    updater.mark({"u"})
    wait_until(lambda: house.vector("u") == ([3.0], "towers-1", 3))
    house.put("u", revision=4)
    begin = time.monotonic()
    updater.mark({"u"})
    wait_until(lambda: house.vector("u")[2] == 4)
    assert time.monotonic() - begin < 0.5
    # The first sweep may have found the user, too, and looks at the row a moment later.
    wait_until(lambda: updater.oldest_dirty_ms() == 0)


def test_a_burst_of_events_of_one_user_costs_few_encodings(house, service) -> None:
    updater = house.start(encode_wait_ms=50)
    wait_until(lambda: updater._sweep is None and updater._version is not None)
    for revision in range(1, 40):
        house.put("u", revision=revision)
        updater.mark({"u"})
    wait_until(lambda: house.vector("u")[2] == 39)
    assert len(service.encoder.calls) <= 5


def test_a_full_queue_is_waited_for_and_no_user_is_lost(house, service) -> None:
    service.encoder.full = 3
    house.put("a", "b")
    updater = house.start()
    updater.mark(["a", "b"])
    wait_until(lambda: house.vector("a")[2] == 1 and house.vector("b")[2] == 1)
    assert service.encoder.full == 0


def test_a_user_who_is_erased_while_being_encoded_gets_no_vector(house, service) -> None:
    house.put("u", "v")
    service.encoder.gate.clear()
    updater = house.start()
    updater.mark(["u", "v"])
    assert service.encoder.entered.wait(10)
    house.store.clear(USER_STATE, [("u",)])
    service.encoder.gate.set()
    wait_until(lambda: house.vector("v")[2] == 1)
    wait_until(lambda: house.vector("u") == (None, None, None))


def test_batches_are_bounded(house, service) -> None:
    users = [f"u{n}" for n in range(50)]
    updater = house.start(encode_batch_users=16)
    house.put(*users)
    updater.mark(users)
    wait_until(lambda: all(house.vector(user_id)[2] == 1 for user_id in users))
    assert max(map(len, service.encoder.calls)) <= 16


def test_while_the_service_is_away_users_wait_and_then_drain(house, service) -> None:
    service.stop()
    updater = house.start()
    house.put("u")
    updater.mark({"u"})
    wait_until(lambda: updater.oldest_dirty_ms() > 200)
    assert house.vector("u") == (None, None, None)
    service.start()
    wait_until(lambda: house.vector("u")[2] == 1)


def test_an_answer_for_an_older_revision_never_replaces_a_newer_vector(house, service) -> None:
    updater = house.start()
    wait_until(lambda: updater._version is not None)
    service.encoder.gate.clear()
    house.put("u", revision=5)
    updater.mark({"u"})
    assert service.encoder.entered.wait(10)
    # Another worker is faster, with a newer state.
    cells = {"vector": [9.0], "embedding_version": "towers-1", "embedding_revision": 9}
    house.store.write([Write(USER_EMBEDDING, ("u",), cells)])
    service.encoder.gate.set()
    wait_until(lambda: service.encoder.calls)
    updater.stop()
    assert house.vector("u") == ([9.0], "towers-1", 9)


def test_a_user_that_the_service_refuses_does_not_keep_the_others_waiting(house, service) -> None:
    updater = house.start()
    house.put("a", "b", "bad", "c")
    updater.mark(["a", "b", "bad", "c"])
    wait_until(lambda: all(house.vector(user_id)[2] == 1 for user_id in "abc"))
    wait_until(lambda: updater.oldest_dirty_ms() == 0)
    assert house.vector("bad") == (None, None, None)


def test_the_sweep_at_start_finds_what_a_dead_worker_had_in_memory(house, service) -> None:
    house.put("missing", revision=2)
    house.put("older", revision=2)
    house.put("other-tower", revision=2)
    house.put("fresh", revision=2)
    for user_id, version, revision in (("older", "towers-1", 1), ("other-tower", "0", 2), ("fresh", "towers-1", 2)):
        cells = {"vector": [0.0], "embedding_version": version, "embedding_revision": revision}
        house.store.write([Write(USER_EMBEDDING, (user_id,), cells)])
    house.start()
    wait_until(lambda: all(house.vector(user_id)[0] == [2.0] for user_id in ("missing", "older", "other-tower")))
    assert house.vector("fresh")[0] == [0.0]


def test_users_of_other_workers_are_left_to_them(house, service) -> None:
    house.put("ours", partition=1)
    house.put("theirs", partition=2)
    house.put("from-a-log")
    house.start(owns=lambda partition: partition == 1)
    wait_until(lambda: house.vector("ours")[2] == 1 and house.vector("from-a-log")[2] == 1)
    assert house.vector("theirs") == (None, None, None)


def test_users_taken_over_from_a_dead_worker_are_swept(house, service) -> None:
    owned = {1}
    updater = house.start(owns=owned.__contains__)
    wait_until(lambda: updater._sweep is None and updater._version is not None)
    house.put("left-behind", partition=2)
    house.put("not-ours", partition=3)
    owned.add(2)
    updater.sweep_soon()
    wait_until(lambda: house.vector("left-behind")[2] == 1)
    assert house.vector("not-ours") == (None, None, None)


def test_new_towers_make_every_vector_stale(house, service) -> None:
    updater = house.start()
    house.put("quiet", "active")
    updater.mark(["quiet", "active"])
    wait_until(lambda: house.vector("quiet")[1] == house.vector("active")[1] == "towers-1")
    service.encoder.version = "towers-2"
    house.put("active", revision=2)
    updater.mark(["active"])
    wait_until(lambda: house.vector("quiet")[1] == house.vector("active")[1] == "towers-2")


def test_a_full_set_is_made_good_by_a_sweep(house, service) -> None:
    service.encoder.gate.clear()
    updater = house.start(dirty_users_max=2)
    users = [f"u{n}" for n in range(10)]
    house.put(*users)
    updater.mark(users)
    assert len(updater._dirty) <= 2
    service.encoder.gate.set()
    wait_until(lambda: all(house.vector(user_id)[2] == 1 for user_id in users))


def test_an_erased_user_gets_no_vector(house, service) -> None:
    updater = house.start()
    updater.mark(["gone"])
    updater.forget("gone")
    house.put("u")
    updater.mark(["u"])
    wait_until(lambda: house.vector("u")[2] == 1)
    assert house.vector("gone") == (None, None, None)
