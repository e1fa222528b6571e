"""What reading alone costs: `python -m benchmarks.bare_consumers faust|batch ADDRESS TOPIC COUNT`, for the cost table.

A Faust agent, and confluent's batch consumer, each parse `COUNT` events of a topic and do nothing with them.
Invariant: the clock runs from the first event to the last, so joining the group is not in the figure; one line of
JSON on stdout.
"""

import asyncio
import json
import sys
import tempfile
import time
from typing import Any

from headrace.v1.events_pb2 import Event

_BATCH, _WAIT_SECONDS, _PATIENCE_SECONDS = 1000, 0.005, 120.0


class Meter:
    """Counts events and knows when it is done."""

    def __init__(self, count: int) -> None:
        self._count, self._seen = count, 0
        self._begin = self._cpu = 0.0
        self.rates: dict[str, float] | None = None

    def add(self, events: int) -> None:
        if not self._seen:
            self._begin, self._cpu = time.perf_counter(), time.process_time()
        self._seen += events
        if self._seen >= self._count and self.rates is None:
            self.rates = {
                "events_per_second": round(self._seen / (time.perf_counter() - self._begin)),
                "cpu_us_per_event": round((time.process_time() - self._cpu) / self._seen * 1e6, 1),
            }


def read_batches(address: str, topic: str, meter: Meter) -> None:
    from confluent_kafka import Consumer

    consumer = Consumer({"bootstrap.servers": address, "group.id": f"bare-{time.time_ns()}", **_EARLIEST})
    consumer.subscribe([topic])
    end = time.monotonic() + _PATIENCE_SECONDS
    while meter.rates is None and time.monotonic() < end:
        messages = consumer.consume(_BATCH, _WAIT_SECONDS)
        for message in messages:
            Event.FromString(message.value() or b"")
        if messages:
            meter.add(len(messages))
    consumer.close()


def read_with_faust(address: str, topic: str, meter: Meter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_agent(address, topic, meter, folder))


async def _agent(address: str, topic: str, meter: Meter, folder: str) -> None:
    import faust

    app = faust.App(
        f"bare-{time.time_ns()}",
        broker=f"kafka://{address}",
        autodiscover=False,
        datadir=folder,
        store="memory://",
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
    )
    done = asyncio.Event()

    async def agent(stream: Any) -> None:
        async for value in stream:
            Event.FromString(value)
            meter.add(1)
            if meter.rates is not None:
                done.set()

    app.agent(app.topic(topic, value_type=bytes, value_serializer="raw", key_serializer="raw"))(agent)
    await app.start()
    try:
        await asyncio.wait_for(done.wait(), _PATIENCE_SECONDS)
    except TimeoutError:
        pass
    finally:
        await app.stop()


_EARLIEST = {"auto.offset.reset": "earliest", "enable.auto.commit": False}


def main() -> int:
    which, address, topic, count = sys.argv[1:5]
    meter = Meter(int(count))
    (read_with_faust if which == "faust" else read_batches)(address, topic, meter)
    print(json.dumps(meter.rates))
    return 0 if meter.rates is not None else 1


if __name__ == "__main__":
    sys.exit(main())
