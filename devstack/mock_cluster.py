"""librdkafka's mock cluster through its C interface, for the one setting that the Python client does not offer.

Used by the embedded broker. A consumer group of the mock waits 3 s for more members before its first assignment, at
every start of the stream worker; here it does not wait. Invariant: where the library cannot be reached this way, the
Python client's own mock cluster serves, only slower to start with.
"""

import ctypes
from pathlib import Path
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from core.errors import StageError

_PRODUCER = 0


def start_mock_cluster() -> tuple[str, Any]:
    """Starts a cluster of one broker.

    Returns:
        Its address, and an object to keep for as long as it shall live.

    Raises:
        StageError: the cluster does not start.
    """
    library = _library()
    started = _start(library) if library is not None else None
    return started or _start_by_client()


def _library() -> Any:
    package = Path(confluent_kafka.__file__).parent
    for pattern in ("../confluent_kafka.libs/librdkafka*", ".dylibs/librdkafka*"):
        for path in sorted(package.glob(pattern)):
            try:
                library = ctypes.CDLL(str(path))
                library.rd_kafka_mock_group_initial_rebalance_delay_ms  # noqa: B018 - is it there?
            except (OSError, AttributeError):
                continue
            return library
    return None


def _start(library: Any) -> tuple[str, Any] | None:
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    library.rd_kafka_conf_new.restype = pointer
    library.rd_kafka_conf_set.argtypes = [pointer, text, text, text, ctypes.c_size_t]
    library.rd_kafka_new.restype = pointer
    library.rd_kafka_new.argtypes = [integer, pointer, text, ctypes.c_size_t]
    library.rd_kafka_mock_cluster_new.restype = pointer
    library.rd_kafka_mock_cluster_new.argtypes = [pointer, integer]
    library.rd_kafka_mock_cluster_bootstraps.restype = text
    library.rd_kafka_mock_cluster_bootstraps.argtypes = [pointer]
    library.rd_kafka_mock_group_initial_rebalance_delay_ms.argtypes = [pointer, ctypes.c_int32]
    problem = ctypes.create_string_buffer(256)
    configuration = library.rd_kafka_conf_new()
    library.rd_kafka_conf_set(configuration, b"log_level", b"3", problem, len(problem))
    client = library.rd_kafka_new(_PRODUCER, configuration, problem, len(problem))
    cluster = library.rd_kafka_mock_cluster_new(client, 1) if client else None
    if not cluster:
        return None
    library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 0)
    return library.rd_kafka_mock_cluster_bootstraps(cluster).decode(), library


def _start_by_client() -> tuple[str, Any]:
    broker = AdminClient({"bootstrap.servers": "127.0.0.1", "test.mock.num.brokers": 1, "log_level": 3})
    try:
        brokers = broker.list_topics(timeout=10).brokers.values()
    except KafkaException as error:
        raise StageError("kafka", f"the embedded broker does not start: {error.args[0].str()}") from error
    return ",".join(f"{each.host}:{each.port}" for each in brokers), broker
