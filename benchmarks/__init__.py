"""The figures of the project, each with the command that makes it.

Invariant: a benchmark measures what `headrace` itself runs, on the user's own copy of public data or on simulated data.
"""
