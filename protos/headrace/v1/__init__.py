"""Generated messages and services of the `headrace.v1` protos. Regenerate with `make protos`."""
