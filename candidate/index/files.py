"""The index as files of a bundle: its facts as JSON, and the lists where there are any. The vectors are another file.

Written by training, read by the service. Invariant: an index is only loaded with the very vectors that it was made
of; a file that is cut short or of something else is refused.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from candidate.index import bits
from candidate.index.exact import Floats
from candidate.index.item_index import ItemIndex, Parts
from candidate.index.lists import Lists
from core.errors import ArtifactError

FORMAT = 2
_ROOM = 1024


def save_index(index: ItemIndex, path: Path) -> None:
    """Writes what is in the index now (delta merged) as `path`, and its facts beside it as `path` + `.json`."""
    if index.delta_count or index.tombstone_count:
        index.rebuild()
    parts = index.parts
    made = parts.lists
    # An exact index is its vectors; the file says so to whoever opens it.
    faiss.write_index(faiss.IndexFlatIP(index.vectors.shape[1]) if made is None else made.index, str(path))
    facts: dict[str, Any] = {
        "format": FORMAT,
        "embedding_version": index.info.embedding_version,
        "dimension": index.info.dimension,
        "items": len(index),
        "exact_max_items": parts.exact_max_items,
        "build_time_ms": parts.build_time_ms,
        "rows": parts.rows,
        "absent_rows": np.setdiff1d(np.arange(parts.rows), bits.members(parts.present)).tolist(),
        "vectors_crc32": _checksum(index.vectors, parts),
        "lists": None
        if made is None
        else {
            "kind": made.kind,
            "probes": made.probes,
            "recall": made.recall,
            "trained_items": made.trained_items,
        },
    }
    _facts_path(path).write_text(json.dumps(facts) + "\n", "utf-8")


def load_index(path: Path, vectors: Floats) -> ItemIndex:
    """Reads what `save_index` wrote.

    Args:
        path: of the lists.
        vectors: those that it was made of, by row; rows that it does not have may be anything. [n, d]

    Raises:
        ArtifactError: missing, cut short, not of its facts, or not of these vectors.
    """
    try:
        facts: dict[str, Any] = json.loads(_facts_path(path).read_text("utf-8"))
        if facts["format"] != FORMAT:
            raise ArtifactError(f"index {path} is of format {facts['format']}, not {FORMAT}; run `headrace train`")
        count, items = int(facts["rows"]), int(facts["items"])
        absent = np.array(facts["absent_rows"], np.int64)
        index = faiss.read_index(str(path))
        made = None if facts["lists"] is None else Lists(index, **facts["lists"])
        dimension, exact_max_items = int(facts["dimension"]), int(facts["exact_max_items"])
        build_time_ms = int(facts["build_time_ms"])
        embedding_version, checksum = str(facts["embedding_version"]), int(facts["vectors_crc32"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"index {path} cannot be read ({reason}); train again with `headrace train`") from error
    is_whole = index.d == dimension and index.ntotal == (0 if made is None else items) and items == count - len(absent)
    if not is_whole:
        raise ArtifactError(
            f"index {path} is not what {_facts_path(path).name} describes; train again with `headrace train`"
        )
    present = bits.pack(np.isin(np.arange(count), absent, invert=True), count + _ROOM)
    parts = Parts(count, present, made, exact_max_items, build_time_ms)
    is_theirs = vectors.shape[1:] == (dimension,) and len(vectors) >= count
    if not is_theirs or _checksum(vectors, parts) != checksum:
        raise ArtifactError(f"index {path} was made of other vectors than these; train again with `headrace train`")
    table = np.zeros((count + _ROOM, dimension), np.float32)
    table[:count] = vectors[:count]
    return ItemIndex.of_parts(table, parts, embedding_version)


def _checksum(vectors: Floats, parts: Parts) -> int:
    """Of the vectors of the rows that are in the index."""
    rows = bits.members(parts.present)
    taken = vectors[: parts.rows] if len(rows) == parts.rows else vectors[rows]
    return zlib.crc32(np.ascontiguousarray(taken, np.float32).data)


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
