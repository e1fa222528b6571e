"""Pages of one list: what was shown, and the snapshot of what was not, in a cursor that the caller carries.

Read at the door, written with the answer; no process keeps anything of it, so any replica serves the next page.
Invariant: a cursor that was cut, changed or is another user's is refused, and reading one costs a bounded amount of
memory.
"""

import base64
import binascii
import zlib
from collections.abc import Sequence

import numpy as np
from google.protobuf.message import DecodeError

from core.errors import InvalidRequestError
from features.catalog import Catalog
from headrace.v1.cursor_pb2 import PageCursor
from serving.query import Candidates, Page

FORMAT = 1
# Items on all pages together: whoever has seen so many is better served by a new list.
MAX_SHOWN = 2000
# Unpacked: as many shown and as many waiting, of the longest ids.
_MAX_BYTES = 1_000_000
_CHECKSUM_BYTES = 4
# The fastest: ids of one catalogue are alike enough.
_LEVEL = 1


def read_cursor(text: str, user_id: str, catalog: Catalog, field: str = "cursor") -> Page:
    """The page that a cursor stands for; the first one for an empty cursor.

    Raises:
        InvalidRequestError: it is no cursor of ours, or another user's.
    """
    if not text:
        return Page()
    cursor = _unpack(text, field)
    if cursor.user_id != user_id:
        raise InvalidRequestError(field, "is another user's; take next_cursor from this user's last answer")
    return Page(tuple(cursor.shown_item_ids), _snapshot(cursor, catalog) if cursor.has_snapshot else None)


def next_cursor(
    page: Page, user_id: str, catalog: Catalog, shown_item_ids: Sequence[str], waiting: Candidates | None
) -> str:
    """The cursor after a page; empty where there is nothing more to show.

    Args:
        page: the page's own place.
        user_id: whose cursor it is.
        catalog: of the answer's release.
        shown_item_ids: the page's items.
        waiting: candidates that were not shown, to be ranked for the next page. None: the ladder made the page, and
            knows no candidates; a snapshot that was there stays.
    """
    shown = [*page.shown_item_ids, *shown_item_ids]
    if len(shown) >= MAX_SHOWN or not shown_item_ids:
        return ""
    if waiting is None and page.snapshot is not None:
        waiting = page.snapshot.take(~np.isin(page.snapshot.rows, catalog.rows(shown_item_ids)))
    cursor = PageCursor(format=FORMAT, user_id=user_id, shown_item_ids=shown)
    if waiting is not None:
        if not len(waiting):
            return ""
        _put(waiting, catalog, cursor)
    packed = zlib.compress(cursor.SerializeToString(), _LEVEL)
    return base64.urlsafe_b64encode(packed + _checksum(packed)).decode()


def _put(waiting: Candidates, catalog: Catalog, cursor: PageCursor) -> None:
    cursor.has_snapshot = True
    cursor.item_ids.extend([catalog.item_ids[row] for row in waiting.rows.tolist()])
    cursor.retrieval_scores.extend(waiting.retrieval.tolist())
    cursor.fused_scores.extend(waiting.fused.tolist())
    cursor.batch_scores.extend(waiting.batch.tolist())
    cursor.source_bits.extend(waiting.source_bits.tolist())


def _snapshot(cursor: PageCursor, catalog: Catalog) -> Candidates:
    """The snapshot's items that the catalogue (still) knows."""
    rows = catalog.rows(cursor.item_ids)
    found = Candidates(
        rows,
        np.array(cursor.retrieval_scores, np.float32),
        np.array(cursor.fused_scores, np.float32),
        np.array(cursor.batch_scores, np.float32),
        np.array(cursor.source_bits, np.int32),
    )
    return found.take(rows >= 0)


def _unpack(text: str, field: str) -> PageCursor:
    try:
        raw = base64.urlsafe_b64decode(text.encode())
        packed, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
        if _checksum(packed) != checksum:
            raise ValueError("its checksum differs")
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(packed, _MAX_BYTES)
        if not unpacking.eof:
            raise ValueError("it is too long")
        cursor = PageCursor.FromString(content)
    except (ValueError, binascii.Error, zlib.error, DecodeError) as error:
        raise InvalidRequestError(field, "is not a cursor of ours; pass next_cursor as it was") from error
    count = len(cursor.item_ids)
    arrays = (cursor.retrieval_scores, cursor.fused_scores, cursor.batch_scores, cursor.source_bits)
    is_whole = all(len(array) == count for array in arrays) and len(set(cursor.item_ids)) == count
    if cursor.format != FORMAT or not is_whole or max(cursor.source_bits, default=0) >= 1 << 31:
        raise InvalidRequestError(field, "is of another version; begin with the first page")
    return cursor


def _checksum(packed: bytes) -> bytes:
    return zlib.crc32(packed).to_bytes(_CHECKSUM_BYTES, "big")
