"""Candidate generation: towers, index, sources and the service that fans them out. The first stage after hydrate.

Invariant: a vector is only ever searched against vectors of its own embedding version.
"""
