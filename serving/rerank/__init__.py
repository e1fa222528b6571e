"""The arithmetic of the re-ranker: pure functions over the arrays of one request's candidates.

Invariant: results do not depend on the order of the candidates; ties are broken by item_id.
"""
