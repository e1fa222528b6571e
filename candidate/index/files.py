"""The index as files of a bundle: its facts as JSON, and the lists where there are any. The vectors are another file.

Written by training, read by the service. Invariant: an index is only loaded with the very vectors that it was made
of; a file that is cut short or of something else is refused.
"""

import zlib
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
from pydantic import BaseModel

from candidate.index import bits
from candidate.index.exact import Floats
from candidate.index.gpu import on_gpu
from candidate.index.item_index import ItemIndex, Parts
from candidate.index.lists import Lists
from candidate.index.reach import Reach, Sample
from core.errors import ArtifactError

_ROOM = 1024


class _ListsFacts(BaseModel):
    kind: str
    reach: Reach
    recall: float
    trained_items: int


class _Facts(BaseModel):
    format: Literal[2] = 2
    embedding_version: str
    dimension: int
    items: int
    exact_max_items: int
    build_time_ms: int
    # Rows in use, and those of them that are not in the index.
    rows: int
    absent_rows: list[int]
    # Of the vectors of the rows that are.
    vectors_crc32: int
    lists: _ListsFacts | None


def save_index(index: ItemIndex, path: Path) -> None:
    """Writes what is in the index now (delta merged) as `path`, and its facts beside it as `path` + `.json`."""
    if index.delta_count or index.tombstone_count:
        index.rebuild()
    rows, present, made, exact_max_items, build_time_ms = index.parts
    info = index.info
    # An exact index is its vectors; the file says so to whoever opens it.
    faiss.write_index(faiss.IndexFlatIP(info.dimension) if made is None else made.index, str(path))
    facts = _Facts(
        embedding_version=info.embedding_version,
        dimension=info.dimension,
        items=len(index),
        exact_max_items=exact_max_items,
        build_time_ms=build_time_ms,
        rows=rows,
        absent_rows=np.setdiff1d(np.arange(rows), bits.members(present)).tolist(),
        vectors_crc32=_checksum(index.vectors, bits.members(present)),
        lists=None
        if made is None
        else _ListsFacts(kind=made.kind, reach=made.reach, recall=made.recall, trained_items=made.trained_items),
    )
    _facts_path(path).write_text(facts.model_dump_json() + "\n", "utf-8")


def load_index(path: Path, vectors: Floats) -> ItemIndex:
    """Reads what `save_index` wrote.

    Args:
        path: of the lists.
        vectors: those that it was made of, by row; rows that it does not have may be anything. [n, d]

    Raises:
        ArtifactError: missing, cut short, not of its facts, or not of these vectors.
    """
    try:
        facts = _Facts.model_validate_json(_facts_path(path).read_text("utf-8"))
        index = faiss.read_index(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"index {path} cannot be read ({reason}); train again with `headrace train`") from error
    rows = np.setdiff1d(np.arange(facts.rows), facts.absent_rows)
    listed = 0 if facts.lists is None else facts.items
    if index.d != facts.dimension or index.ntotal != listed or len(rows) != facts.items:
        raise ArtifactError(
            f"index {path} is not what {_facts_path(path).name} describes; train again with `headrace train`"
        )
    are_theirs = vectors.shape[1:] == (facts.dimension,) and len(vectors) >= facts.rows
    if not are_theirs or _checksum(vectors, rows) != facts.vectors_crc32:
        raise ArtifactError(f"index {path} was made of other vectors than these; train again with `headrace train`")
    table = np.zeros((facts.rows + _ROOM, facts.dimension), np.float32)
    table[: facts.rows] = vectors[: facts.rows]
    present = bits.adding(bits.none_of(len(table)), rows)
    made = None if facts.lists is None else _lists(index, facts.lists, table, rows)
    parts = Parts(facts.rows, present, made, facts.exact_max_items, facts.build_time_ms)
    return ItemIndex.of_parts(table, parts, facts.embedding_version)


def _lists(index: faiss.Index, facts: _ListsFacts, table: Floats, rows: bits.Rows) -> Lists:
    sample = Sample.of(table, rows)
    return Lists(index, facts.kind, facts.reach, facts.recall, facts.trained_items, sample, on_gpu(index))


def _checksum(vectors: Floats, rows: bits.Rows) -> int:
    # Without a copy where all rows are there.
    taken = vectors[: len(rows)] if len(rows) and rows[-1] == len(rows) - 1 else vectors[rows]
    return zlib.crc32(np.ascontiguousarray(taken, np.float32).data)


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
