"""One definition of each feature, for the stream, the request and training.

`transforms`, `decay`, `windows`, `item_stats`, `catalog` and `vectors` are pure (numpy and protobuf at most); `stores`
holds the adapters. Invariant: the pure modules import no engine, store or transport.
"""
