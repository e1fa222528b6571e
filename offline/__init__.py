"""What runs beside the request: data, training, batch scores, release bundles, evaluation, replay.

Invariant: takes only model, index and artifact code from candidate and ranker; writes event logs and bundles.
"""
