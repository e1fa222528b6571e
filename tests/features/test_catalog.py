"""The catalogue's columns fit each other also while items come in."""

import threading

from core.settings import load_settings
from features.catalog import Catalog
from headrace.v1.events_pb2 import Item

NOW_MS = 1_780_000_000_000


def test_readers_beside_the_writer_see_columns_of_one_length() -> None:
    catalog = Catalog(load_settings().features)
    done = threading.Event()
    problems: list[Exception] = []

    def read() -> None:
        while not done.is_set():
            try:
                known = len(catalog)
                assert len(catalog.servable(NOW_MS)) >= known
                assert len(catalog.column("year")) >= known
            except Exception as error:  # noqa: BLE001 - a thread's exception is for the test to see
                problems.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(20_000):
        catalog.upsert(Item(item_id=str(number)))
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []
