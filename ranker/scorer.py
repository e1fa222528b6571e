"""Scores of users' candidates from one padded batch: arrays in, arrays out, calibration included.

Used by the service for each batch and by offline to evaluate. Invariant: every number that leaves is finite and in
0..1, and a user's scores are the same alone and beside others (up to float rounding).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from features.catalog import Floats, Rows
from features.vectors import CANDIDATE_FEATURES, USER_FEATURES, RankerInput
from headrace.v1.feature_log_pb2 import LoggedFeatures
from ranker.calibration import Calibration
from ranker.forms import Network, TorchNetwork
from ranker.model import CLICK, CONVERSION, HEADS, VALUE, RankerBatch, RankerModel, item_table

# Candidates in one forward pass on a CPU: more fall out of its caches and take longer each.
_CPU_ROWS = 2048
_GPU_ROWS = 262_144
# How much of the order a predicted value (given a click) and a conversion decide.
_VALUE_SHARE, _CONVERSION_SHARE = 0.25, 0.25
# Clicks after which an item's statistics count for half.
_HALF_SUPPORT = 3.0
# Engagement weights and log-hours lie well within.
_MOST_WEIGHT = 20.0
_MAX_UNTRAINED_CONFIDENCE = 0.2
_UNKNOWN_USER_FACTOR = 0.5
_IMPRESSIONS, _CLICKS = CANDIDATE_FEATURES.index("log_impressions"), CANDIDATE_FEATURES.index("log_clicks")
_KNOWN_USER = USER_FEATURES.index("is_known")

Mask = npt.NDArray[np.bool_]


class Scores(NamedTuple):
    """Scores of one user's C candidates, each 0..1."""

    click: Floats
    conversion: Floats
    value: Floats
    # By which to order, higher is better.
    score: Floats
    # Low where the item or the user was hardly seen in training.
    confidence: Floats
    # Half-width of the band of about one standard deviation around `click`, 0..1.
    uncertainty: Floats
    # Inputs and outputs that were not finite and were replaced.
    replaced_count: int
    # What was read, of some candidates, where the job asked for it.
    features: LoggedFeatures | None = None
    # Candidates that only the light scorer saw, below all others; None where there are none. [C]
    cut: Mask | None = None


class Scorer:
    """A model on a device with the items that it scores."""

    def __init__(
        self,
        model: RankerModel,
        item_vectors: Floats,
        categories: Rows,
        calibration: Calibration,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.model = model.eval()
        # May be replaced by another form of the same.
        self.network: Network = TorchNetwork(model, self.device)
        # Cuts lists before the network; None: none is cut.
        self.light: Network | None = None
        self.table = item_table(model, item_vectors, categories, self.device)
        self._calibration = [calibration.of(head) for head in HEADS]
        self._trained = [head in model.config.trained_heads for head in HEADS]
        self._rows_per_pass = _CPU_ROWS if self.device.type == "cpu" else _GPU_ROWS

    def score(
        self, inputs: Sequence[RankerInput], user_vectors: Sequence[Floats | None], keep: int | None = None
    ) -> list[Scores]:
        """Scores users together.

        Args:
            inputs: B users, each with its own number of candidates (0 is allowed).
            user_vectors: B vectors [d], None where a user has none.
            keep: of a longer list the network scores only so many, those that the light scorer puts first.

        Returns:
            B scores, in the order of `inputs`.
        """
        out: list[Scores | None] = [None] * len(inputs)
        for chosen in self._passes([len(one.candidate_rows) for one in inputs]):
            group = [inputs[index] for index in chosen]
            logits, cut = self._logits(group, [user_vectors[index] for index in chosen], keep)
            for place, (index, one) in enumerate(zip(chosen, group, strict=True)):
                there = slice(len(one.candidate_rows))
                made = self._finish(one, logits[place, there], user_vectors[index])
                out[index] = made if cut is None else _below(made, cut[place, there])
        return [scores if scores is not None else _EMPTY for scores in out]

    def _passes(self, counts: Sequence[int]) -> Iterator[list[int]]:
        """Users by forward pass: alike in length, so that little is padding, and not too many rows at once."""
        chosen: list[int] = []
        rows = 0
        for index in sorted((i for i, count in enumerate(counts) if count), key=lambda i: -counts[i]):
            longest = counts[chosen[0]] if chosen else 0
            if chosen and (longest * (len(chosen) + 1) > self._rows_per_pass or longest > 2 * counts[index] + 64):
                yield chosen
                chosen, rows = [], 0
            chosen.append(index)
            rows += counts[index]
        if chosen:
            yield chosen

    def _logits(
        self, group: Sequence[RankerInput], user_vectors: Sequence[Floats | None], keep: int | None
    ) -> tuple[Floats, Mask | None]:
        """Logits [B, C, heads], and which of them are the light scorer's [B, C]."""
        batch = collate(group, user_vectors, self.model.config.dimension, len(self.table))
        if keep is None or self.light is None or batch.candidate_rows.shape[1] <= keep:
            return self.network.logits(batch, self.table), None
        logits = self.light.logits(batch, self.table).copy()
        counts = np.array([len(one.candidate_rows) for one in group])
        is_padding = np.arange(logits.shape[1]) >= counts[:, None]
        first_guess = np.where(is_padding, -np.inf, logits[:, :, CLICK])
        kept = np.argpartition(-first_guess, keep - 1, axis=1)[:, :keep]
        places = (np.arange(len(group))[:, None], kept)
        fewer = batch._replace(
            candidate_rows=torch.from_numpy(batch.candidate_rows.numpy()[places]),
            candidates=torch.from_numpy(batch.candidates.numpy()[places]),
        )
        logits[places] = self.network.logits(fewer, self.table)
        cut = np.ones(logits.shape[:2], np.bool_)
        cut[places] = False
        return logits, cut

    def _finish(self, one: RankerInput, logits: Floats, vector: Floats | None) -> Scores:
        replaced = sum(_not_finite(part) for part in (logits, one.candidates, one.user, vector) if part is not None)
        if replaced:
            logits = np.where(np.isfinite(logits), logits, np.float32(-20.0))
        zeros = np.zeros(len(logits), np.float32)
        click, conversion, value = (
            self._calibration[head](logits[:, head]) if self._trained[head] else zeros
            for head in (CLICK, CONVERSION, VALUE)
        )
        score = click
        if self._trained[VALUE]:
            score = score * (1 - _VALUE_SHARE + _VALUE_SHARE * value)
        if self._trained[CONVERSION]:
            score = (1 - _CONVERSION_SHARE) * score + _CONVERSION_SHARE * conversion
        support = _support(one)
        # As of a rate that was counted over the item's support and a prior of as much as halves the confidence.
        uncertainty = np.sqrt(click * (1 - click) / (support + _HALF_SUPPORT)).astype(np.float32)
        return Scores(click, conversion, value, score, self._confidence(one, support), uncertainty, replaced)

    def _confidence(self, one: RankerInput, support: Floats) -> Floats:
        """How much was known, [C]: support / (support + 3) of the item, halved for users without history."""
        confidence = support / (support + _HALF_SUPPORT)
        trained = (one.candidate_rows >= 0) & (one.candidate_rows < self.table.vector_count)
        confidence = np.where(trained, confidence, np.minimum(confidence, _MAX_UNTRAINED_CONFIDENCE))
        confidence = np.where(one.candidate_rows >= 0, confidence, 0.0)
        if not one.user[_KNOWN_USER] > 0:
            confidence = confidence * _UNKNOWN_USER_FACTOR
        return confidence.astype(np.float32)


def _below(made: Scores, cut: Mask) -> Scores:
    """The same with what was cut below what was not, in its own order, and no more trusted than an unknown item."""
    if not cut.any():
        return made
    limit, most = np.nextafter(made.score[~cut].min(), np.float32(0)), made.score[cut].max()
    scale = limit / most if most > limit else np.float32(1)
    return made._replace(
        score=np.where(cut, np.minimum(made.score * scale, limit), made.score),
        confidence=np.where(cut, np.minimum(made.confidence, np.float32(_MAX_UNTRAINED_CONFIDENCE)), made.confidence),
        cut=cut,
    )


def _not_finite(values: Floats) -> int:
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def _support(one: RankerInput) -> Floats:
    """Clicks that each candidate's statistics stand for, [C]; a click says as much of an item as ten impressions do."""
    counted = np.expm1(_finite(one.candidates[:, [_IMPRESSIONS, _CLICKS]]).clip(0, 20))
    support: Floats = counted[:, 1] + np.float32(0.1) * counted[:, 0]
    return support


def collate(
    group: Sequence[RankerInput], user_vectors: Sequence[Floats | None], dimension: int, item_count: int
) -> RankerBatch:
    """One padded batch on the CPU. Rows at or above `item_count` count as unknown, a broken vector as none."""
    size, longest = len(group), max(len(one.candidate_rows) for one in group)
    vectors = np.zeros((size, dimension), np.float32)
    has_vector = np.zeros((size, 1), np.float32)
    rows = np.full((size, longest), -1, np.int64)
    candidates = np.zeros((size, longest, len(CANDIDATE_FEATURES)), np.float32)
    for index, (one, vector) in enumerate(zip(group, user_vectors, strict=True)):
        if vector is not None and np.isfinite(vector).all():
            vectors[index] = vector
            has_vector[index] = 1.0
        count = len(one.candidate_rows)
        rows[index, :count] = one.candidate_rows
        candidates[index, :count] = one.candidates
    history = np.stack([one.history_rows for one in group]).astype(np.int64)
    return RankerBatch(
        torch.from_numpy(vectors),
        torch.from_numpy(has_vector),
        torch.from_numpy(np.where(history < item_count, history, -1)),
        torch.from_numpy(_bounded(np.stack([one.history_weights for one in group]))),
        torch.from_numpy(_bounded(np.stack([one.history_ages for one in group]))),
        torch.from_numpy(np.stack([one.user for one in group])),
        torch.from_numpy(np.where(rows < item_count, rows, -1)),
        torch.from_numpy(candidates),
    )


def _bounded(values: Floats) -> Floats:
    """Weights and ages as training saw them: finite, and no larger than any that makes sense."""
    return _finite(values).clip(-_MOST_WEIGHT, _MOST_WEIGHT)


def _finite(values: Floats) -> Floats:
    """The same with 0 for what is not finite; looked at first, for that costs a fifth of replacing."""
    return values if np.isfinite(values).all() else np.nan_to_num(values, posinf=0.0, neginf=0.0)


_NOTHING: Floats = np.zeros(0, np.float32)
_EMPTY = Scores(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, 0)
