"""How alike each candidate is to what the user had: the crosses of vectors that the network starts from.

Called by ranker/model.py, so it is in every form of it. Two kinds of vectors: those of the towers, and "tastes", which
only the ranker knows (offline/training/tastes.py). Invariant: items without a vector (zeros) add nothing, and padding
in front of the history changes nothing.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ranker.model import RankerBatch

# Cosines with: the user's vector (and how sharply), the last, the best, the mean, the liked, the freshly liked, the
# five last of the history; then sums of tastes over all of it, the last 20, the last 5, and weighted by recency.
SIMILARITIES, USER_SIMILARITIES = 9 + 2 * 4, 3
_RECENT, _LATEST, _KEPT_PER_STEP = 20, 5, 0.9
# exp(sharpness * cosine): what the towers' softmax makes of a cosine. A list's head stands out as it does there.
_SHARPNESS = (4.0, 8.0)


def user_similarities(candidates: Tensor, batch: "RankerBatch", dimension: int) -> Tensor:
    """Those with the user's vector alone, which need no history: the first of `similarities`, [B, C, 3]."""
    return _with_sharpness(candidates[..., :dimension] @ batch.user_vectors.unsqueeze(2))


def _with_sharpness(user: Tensor) -> Tensor:
    sharpness = torch.tensor(_SHARPNESS, dtype=user.dtype, device=user.device)
    return torch.cat([user, torch.exp((user - 1) * sharpness)], -1)


def similarities(candidates: Tensor, history: Tensor, batch: "RankerBatch", dimension: int) -> Tensor:
    """[B, C, SIMILARITIES] from vectors [B, C, d + k] and [B, L, d + k], the towers' d first, then k of tastes."""
    known = (batch.history_rows >= 0).to(candidates.dtype)
    of_history, of_candidates = history[..., :dimension], candidates[..., :dimension]
    liked = known * batch.history_weights.clamp(min=0)
    fresh = liked * torch.exp(-batch.history_ages)
    ago = torch.arange(history.shape[1] - 1, -1, -1, device=history.device)
    latest = known * (ago < _LATEST).to(known.dtype)
    means = torch.stack([known, liked, fresh, latest], 2)
    means = means / means.sum(1, keepdim=True).clamp(min=1.0)
    # A mean of cosines is the cosine with a mean: a few vectors instead of the whole history for each candidate.
    looked_for = torch.cat([batch.user_vectors.unsqueeze(2), of_history[:, -1:].transpose(1, 2)], 2)
    looked_for = torch.cat([looked_for, of_history.transpose(1, 2) @ means], 2)
    # In all digits, whatever those of the vectors: a list is ordered by their differences.
    cosines = of_candidates.float() @ looked_for.float()
    best = (of_candidates @ (of_history * known.unsqueeze(2)).transpose(1, 2)).amax(2, keepdim=True)
    by_recency = _KEPT_PER_STEP ** ago.to(known.dtype)
    newest = [(ago < count).to(known.dtype) for count in (_RECENT, _LATEST)]
    shares = torch.stack([torch.ones_like(by_recency), *newest, by_recency], 1)
    sums = candidates[..., dimension:].float() @ (history[..., dimension:].transpose(1, 2) @ shares).float()
    return torch.cat(
        [
            _with_sharpness(cosines[..., :1]),
            cosines[..., 1:2],
            best,
            cosines[..., 2:],
            sums,
            # A second meeting says less than the first.
            torch.sign(sums) * torch.sqrt(sums.abs()),
        ],
        -1,
    )
