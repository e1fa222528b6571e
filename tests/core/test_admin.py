"""The admin port over a real socket."""

import urllib.error
import urllib.request

import pytest

from core.admin import AdminServer, Readiness


@pytest.fixture
def admin():
    readiness = Readiness()
    server = AdminServer("127.0.0.1", 0, readiness)
    yield readiness, f"http://127.0.0.1:{server.port}"
    server.close()


def test_ready_names_each_problem_in_a_line(admin) -> None:
    readiness, url = admin
    problem: list[str] = ["no bundle", ""]
    readiness.add("bundle", lambda: problem[0] or None)
    readiness.add("kafka", lambda: problem[1] or None)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/ready")
    assert caught.value.code == 503
    assert caught.value.read() == b"bundle: no bundle\n"
    caught.value.close()
    problem[0] = ""
    with urllib.request.urlopen(f"{url}/ready") as answer:
        assert answer.status == 200


def test_a_taken_port_is_named(admin) -> None:
    port = int(admin[1].rpartition(":")[2])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        AdminServer("127.0.0.1", port, Readiness())


def test_metrics_are_served(admin) -> None:
    with urllib.request.urlopen(f"{admin[1]}/metrics") as answer:
        assert b"python_info" in answer.read()
