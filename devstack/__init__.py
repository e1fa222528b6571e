"""The `headrace` command: embedded Kafka and Redis, the supervisor of all processes, the demo.

The outermost layer: it may import everything, nothing imports it. Invariant: no process that it started outlives it.
"""
