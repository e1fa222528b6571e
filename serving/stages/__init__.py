"""The stages of a request, one verb and one module each; `serving.pipeline` runs them in order.

Invariant: a stage never raises for a dependency that is away: it goes on without, and says so in the trace.
"""
