"""Cross-entropy of users against every item, with its gradient made chunk by chunk on the way.

The loss of tower training (offline/training/trainer.py). On a CPU the scores of a batch against all items are far
larger than any cache; a chunk of rows at a time they stay in it, and neither scores nor probabilities are ever kept
for the way back. Invariant: value and gradients are those of `torch.nn.functional.cross_entropy` over
`scale * users @ items.T`, up to the rounding of `precision`.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

# Scores of so many users at once: with some thousands of items they fit a CPU's cache.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Teacher:
    """What another model holds to be likely, to be learnt from (Hinton et al., "Distilling the Knowledge", 2015)."""

    users: Tensor  # [n, e], already multiplied by its scale
    items: Tensor  # [m, e]
    # Weight of the teacher's opinion; the rest is that of what really came next.
    share: float


def softmax_loss(
    users: Tensor,
    items: Tensor,
    scale: Tensor,
    targets: Tensor,
    precision: torch.dtype = torch.float32,
    teacher: Teacher | None = None,
) -> Tensor:
    """Mean over users of -log softmax(scale * users @ items.T)[target].

    Args:
        users: unit vectors. [n, d]
        items: unit vectors. [m, d]
        scale: factor from a cosine to a logit, at most 80: no score is shifted before its exponential is taken. []
        targets: rows of `items`. [n]
        precision: of the products; sums are float32.
        teacher: where given, a share of the target is what it holds to be likely.
    """
    return cast(Tensor, _Softmax.apply(users, items, scale, targets, precision, teacher))  # type: ignore[no-untyped-call]


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        scale: Tensor,
        targets: Tensor,
        precision: torch.dtype,
        teacher: Teacher | None,
    ) -> Tensor:
        share = teacher.share if teacher else 0.0
        low = items.to(precision)
        # The vector that each user should be near, and the one that the model expects: the gradient is between them.
        wanted = (1 - share) * items[targets]
        expected = torch.empty_like(wanted)
        to_items = torch.zeros_like(items).index_add_(0, targets, users, alpha=share - 1)
        log_sums = users.new_empty(len(users))
        for start in range(0, len(users), _CHUNK):
            at = slice(start, start + _CHUNK)
            part = users[at]
            odds = ((part * scale).to(precision) @ low.T).exp_()
            sums = odds.sum(dim=1, dtype=torch.float32, keepdim=True)
            log_sums[at] = sums[:, 0].log()
            expected[at] = (odds @ low) / sums
            to_items += ((part / sums).to(precision).T @ odds).T
            if teacher:
                odds = (teacher.users[at] @ teacher.items.T).exp_()
                sums = odds.sum(dim=1, dtype=torch.float32, keepdim=True) / share
                wanted[at] += (odds @ low) / sums
                to_items -= ((part / sums).to(precision).T @ odds).T
        aims = (users * wanted).sum(dim=1)
        factor = scale / len(users)
        by_scale = ((users * expected).sum(dim=1) - aims).mean()
        ctx.save_for_backward((expected - wanted).mul_(factor), to_items.mul_(factor), by_scale)
        return log_sums.mean() - scale * aims.mean()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        to_users, to_items, to_scale = ctx.saved_tensors
        return outer[0] * to_users, outer[0] * to_items, outer[0] * to_scale, None, None, None
