"""The stack with real Redis and Kafka, and tiny processes in place of the recommender's."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from core.errors import ConfigError, NotFoundError, RecommenderError, StageError
from core.kafka import KafkaProducer
from core.settings import load_settings
from devstack.ports import Ports
from devstack.processes import ProcessSpec
from devstack.stack import Stack

News = list[tuple[str, str]]
Tiny = Callable[..., ProcessSpec]


def journal_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_clients_and_children_are_told_the_same_addresses(tiny: Tiny, tmp_path: Path, news: News) -> None:
    journal = tmp_path / "journal"
    worker = tiny("worker", "--journal", str(journal), depends_on=("redis", "kafka"))
    extra = {"HEADRACE_SERVING__EXPLORATION_RATE": "0"}
    with Stack(tmp_path, processes=[worker], extra_env=extra, say=lambda *what: news.append(what)) as stack:
        settings = stack.settings
        with redis.Redis.from_url(settings.redis.url.get_secret_value()) as client:
            assert client.ping()
        producer = KafkaProducer(settings.kafka)
        producer.send("headrace.events.v1", b"user", b"event").result(10)
        producer.close()
        (started,) = journal_of(journal)
        told = started["env"]
        assert told["HEADRACE_KAFKA__BOOTSTRAP_SERVERS"] == stack.address("kafka")
        assert told["HEADRACE_KAFKA__LOG_ID"] == settings.kafka.log_id != ""
        assert (told["HEADRACE_KAFKA__PARTITIONS"], told["HEADRACE_KAFKA__FETCH_WAIT_MAX_MS"]) == ("4", "5")
        assert told["HEADRACE_SERVING__EXPLORATION_RATE"] == "0"
        assert told["HEADRACE_REGISTRY__PATH"] == str(tmp_path / "bundles")
        assert told["HEADRACE_SERVING__RANKER_TARGET"] == stack.address("ranker")
        assert settings.serving.exploration_rate == 0
        # What other processes read through HEADRACE_CONFIG.
        elsewhere = load_settings(stack.settings_file)
        assert elsewhere.kafka == settings.kafka
        assert elsewhere.redis == settings.redis
        assert {name for name, _ in news} == {"redis", "kafka", "worker"}
        with pytest.raises(NotFoundError, match="worker has no address"):
            stack.address("worker")


def test_a_new_log_starts_its_readers_again(tiny: Tiny, tmp_path: Path, news: News) -> None:
    journal = tmp_path / "journal"
    worker = tiny("worker", "--journal", str(journal), depends_on=("redis", "kafka"))
    with Stack(tmp_path, processes=[worker], say=lambda *what: news.append(what)) as stack:
        redis_pid, before = stack.pid("redis"), stack.settings.kafka
        stack.kill("kafka", signal.SIGKILL)
        stack.wait_ready("kafka", 20)
        stack.wait_ready("worker", 20)
        after = stack.settings.kafka
        assert stack.pid("redis") == redis_pid
        assert after.log_id != before.log_id
        last = [line for line in journal_of(journal) if line["what"] == "start"][-1]
        assert last["env"]["HEADRACE_KAFKA__LOG_ID"] == after.log_id
        assert last["env"]["HEADRACE_KAFKA__BOOTSTRAP_SERVERS"] == after.bootstrap_servers
        assert last["pid"] == stack.pid("worker")
        assert load_settings(stack.settings_file).kafka == after


def test_redis_keeps_its_data_over_stacks_and_kafka_begins_anew(tmp_path: Path, news: News) -> None:
    def write(stack: Stack) -> tuple[str, int]:
        with redis.Redis.from_url(stack.settings.redis.url.get_secret_value()) as client:
            return stack.settings.kafka.log_id, client.incr("stacks")

    with Stack(tmp_path, processes=[], say=lambda *what: news.append(what)) as stack:
        first = write(stack)
    with Stack(tmp_path, processes=[], say=lambda *what: news.append(what)) as stack:
        second = write(stack)
    with Stack(tmp_path, processes=[], say=lambda *what: news.append(what), fresh=True) as stack:
        fresh = write(stack)
    assert (first[1], second[1], fresh[1]) == (1, 2, 1)
    assert first[0] != second[0]


def test_a_home_has_one_stack(tmp_path: Path, news: News) -> None:
    with (
        Stack(tmp_path, processes=[], say=lambda *what: news.append(what)),
        pytest.raises(ConfigError, match=f"another stack \\(process {os.getpid()}\\) runs in {tmp_path}"),
        Stack(tmp_path, processes=[], say=lambda *what: news.append(what)),
    ):
        pass


def test_a_given_redis_and_kafka_are_used_not_started(tiny: Tiny, tmp_path: Path, news: News) -> None:
    with Stack(tmp_path / "one", processes=[], say=lambda *what: news.append(what)) as one:
        url, kafka = one.settings.redis.url.get_secret_value(), one.address("kafka")
        # The embedded broker cannot make topics for a stranger; that it was asked is what counts here.
        extra = {"HEADRACE_KAFKA__LOG_ID": one.settings.kafka.log_id}
        two = Stack(
            tmp_path / "two",
            kafka=kafka,
            redis_url=url,
            processes=[tiny("worker")],
            extra_env=extra,
            say=lambda *what: news.append(what),
        )
        with two:
            assert two.names == ("worker",)
            assert two.address("redis") == one.address("redis")
            assert two.address("kafka") == kafka


@pytest.mark.parametrize(
    ("kafka", "problem"),
    [("nonsense", 'kafka "nonsense": give embedded, local or HOST:PORT'), ("local", "KAFKA_HOME is not set; unpack")],
)
def test_a_kafka_that_cannot_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kafka: str, problem: str
) -> None:
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    with pytest.raises(ConfigError, match=problem), Stack(tmp_path, kafka=kafka, processes=[]):
        pass


def test_a_child_with_bad_settings_is_one_line(tmp_path: Path, news: News) -> None:
    code = "from core.settings import load_settings; load_settings()"
    bad = {"HEADRACE_SERVING__PORT": "many"}
    spec = ProcessSpec("worker", (sys.executable, "-P", "-c", code), env=bad, check=lambda: "not up yet")
    stack = Stack(tmp_path, processes=[spec], say=lambda *what: news.append(what))
    with (
        pytest.raises(StageError, match=r"worker: did not start, exit code 1: .*serving\.port: Input should be"),
        stack,
    ):
        pass


def test_the_recommender_without_a_bundle_says_what_to_run(tmp_path: Path, news: News) -> None:
    with (
        pytest.raises(RecommenderError, match="headrace train") as caught,
        Stack(tmp_path, say=lambda *what: news.append(what)),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_fixed_ports_are_those_of_the_settings(tmp_path: Path, ports: Ports, news: News) -> None:
    names = ("redis", "streams", "candidate", "ranker", "serving")
    wanted = {name: ports.take(name) for name in names}
    ports.close()
    lines = [f"[redis]\nurl = 'redis://127.0.0.1:{wanted['redis']}/0'"]
    lines += [f"[{name}]\nadmin_port = 0" for name in names[1:]]
    lines += [f"port = {wanted['serving']}"]
    config = tmp_path / "config.toml"
    config.write_text("\n".join(lines).replace("[candidate]", f"[candidate]\nport = {wanted['candidate']}"))
    config.write_text(config.read_text().replace("[ranker]", f"[ranker]\nport = {wanted['ranker']}"))

    def fixed() -> Stack:
        return Stack(tmp_path, processes=[], ports="fixed", config=config, say=lambda *what: news.append(what))

    with fixed() as stack:
        assert stack.address("redis") == f"127.0.0.1:{wanted['redis']}"
        assert stack.address("serving") == f"127.0.0.1:{wanted['serving']}"
    problem = f"port {wanted['serving']} for serving: .* --fixed-ports"
    with socket.create_server(("127.0.0.1", wanted["serving"])), pytest.raises(ConfigError, match=problem), fixed():
        pass
