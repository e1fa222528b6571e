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
SIMILARITIES = 9 + 2 * 4
_RECENT, _LATEST, _KEPT_PER_STEP = 20, 5, 0.9
# exp(sharpness * cosine): what the towers' softmax makes of a cosine. A list's head stands out as it does there.
_SHARPNESS = (4.0, 8.0)


def similarities(candidates: Tensor, history: Tensor, batch: "RankerBatch", dimension: int) -> Tensor:
    """[B, C, SIMILARITIES] from vectors [B, C, d + k] and [B, L, d + k], the towers' d first, then k of tastes."""
    known = (batch.history_rows >= 0).to(candidates.dtype)
    cosines = candidates[..., :dimension] @ history[..., :dimension].transpose(1, 2)
    tastes = candidates[..., dimension:] @ history[..., dimension:].transpose(1, 2)
    liked = known * batch.history_weights.clamp(min=0)
    fresh = liked * torch.exp(-batch.history_ages)
    ago = torch.arange(history.shape[1] - 1, -1, -1, device=history.device)
    latest = known * (ago < _LATEST).to(known.dtype)
    means = torch.stack([known, liked, fresh, latest], 2)
    means = means / means.sum(1, keepdim=True).clamp(min=1.0)
    by_recency = _KEPT_PER_STEP ** ago.to(known.dtype)
    newest = [(ago < count).to(known.dtype) for count in (_RECENT, _LATEST)]
    shares = torch.stack([torch.ones_like(by_recency), *newest, by_recency], 1)
    sums = tastes @ shares
    user = candidates[..., :dimension] @ batch.user_vectors.unsqueeze(2)
    return torch.cat(
        [
            user,
            *(torch.exp(sharpness * (user - 1)) for sharpness in _SHARPNESS),
            cosines[:, :, -1:],
            (cosines * known.unsqueeze(1)).amax(2, keepdim=True),
            cosines @ means,
            sums,
            # A second meeting says less than the first.
            torch.sign(sums) * torch.sqrt(sums.abs()),
        ],
        -1,
    )
