"""The fused loss of tower training against torch's own, gradients included."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offline.training.softmax import Teacher, softmax_loss

ITEMS, USERS, DIMENSION = 300, 1100, 16


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    users = functional.normalize(torch.randn(USERS, DIMENSION, generator=draw), dim=-1).requires_grad_()
    items = functional.normalize(torch.randn(ITEMS, DIMENSION, generator=draw), dim=-1).requires_grad_()
    return users, items, torch.tensor(20.0, requires_grad=True), torch.randint(ITEMS, (USERS,), generator=draw)


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 3, of)]


def test_value_and_gradients_are_those_of_torch() -> None:
    users, items, scale, targets = inputs(1)
    ours = gradients(softmax_loss(users, items, scale, targets), users, items, scale)
    theirs = gradients(functional.cross_entropy(scale * users @ items.T, targets), users, items, scale)
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-6)


def test_a_teacher_shares_the_target() -> None:
    users, items, scale, targets = inputs(2)
    other_users, other_items, _, _ = inputs(3)
    teacher = Teacher(15 * other_users.detach(), other_items.detach(), share=0.7)
    ours = gradients(softmax_loss(users, items, scale, targets, teacher=teacher), users, items, scale)
    likely = torch.softmax(teacher.users @ teacher.items.T, dim=1)
    wanted = 0.7 * likely + 0.3 * functional.one_hot(targets, ITEMS)
    exact = -(wanted * torch.log_softmax(scale * users @ items.T, dim=1)).sum(dim=1).mean()
    for mine, theirs in zip(ours, gradients(exact, users, items, scale), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [5.0, 60.0])
def test_half_precision_stays_close(scale: float) -> None:
    users, items, _, targets = inputs(4)
    factor = torch.tensor(scale)
    exact = gradients(softmax_loss(users, items, factor, targets), users)
    rough = gradients(softmax_loss(users, items, factor, targets, torch.bfloat16), users)
    torch.testing.assert_close(rough[0], exact[0], rtol=0.01, atol=0.01)
    assert (rough[1] - exact[1]).norm() < 0.05 * exact[1].norm()
