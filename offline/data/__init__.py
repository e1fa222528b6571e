"""Getting events, items and users into an event log: one's own files, public data sets, a simulator.

Invariant: every source ends in the same writer (features/stores/event_log.py), and says what it left out and why.
"""
