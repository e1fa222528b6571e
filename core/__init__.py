"""What every process shares: settings, topics, errors, deadlines, telemetry, the gRPC runtime, bundles.

Invariant: imports nothing of Headrace but the generated `headrace.v1`.
"""
