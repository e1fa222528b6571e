"""The vector index: exact while that is cheap, inverted lists beyond, changed while it is searched.

`item_index` is what others use; `exact`, `lists` and `delta` are its parts, `files` its form in a bundle, `recall`
watches it. Invariant: rows are the catalogue's, everywhere.
"""

from candidate.index.files import load_index, save_index
from candidate.index.item_index import IndexInfo, ItemIndex

__all__ = ["IndexInfo", "ItemIndex", "load_index", "save_index"]
