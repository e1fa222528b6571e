"""The ranker service: from a user's state and hundreds of candidates to calibrated scores.

Process `python -m ranker`. Invariant: offline imports only the model, calibration and scorer of this folder.
"""
