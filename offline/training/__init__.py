"""Training of the towers and of the ranker from an event log.

Invariant: what is trained reads its input through the same code that serves.
"""
