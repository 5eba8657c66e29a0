"""Orthogonal matrices that an optimizer can move: the Cayley map, and Cayley SGD.

A gradient step on an orthogonal matrix R leaves the orthogonal matrices. Two ways around it:

- `CayleyRotations` moves a free matrix instead, whose skew-symmetric part A = U − Uᵀ (U its upper triangle) gives
  R = R₀ (I + A)⁻¹(I − A). That is exactly orthogonal whatever A is, and any optimizer can move A.
- `sgdg_step` moves R itself along the orthogonal matrices, as the published code does.

In two dimensions the Cayley map of a is the turn by the angle θ with tan(θ/2) = a, so a = 1 turns by 90°:

    A = [[0, 1], [-1, 0]]    I + A = [[1, 1], [-1, 1]]    I − A = [[1, -1], [1, 1]]
    (I + A)⁻¹(I − A) = ½ [[1, -1], [1, 1]] · [[1, -1], [1, 1]] = [[0, -1], [1, 0]]
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llamaq.spinquant.rotations import Rotations


@dataclass
class Learned:
    """The result of learning rotations."""

    rotations: Rotations  # float64, orthogonal to 1e-12
    losses: list[float]  # of each step


def skew(a: Tensor) -> Tensor:
    """Return the skew-symmetric matrix with the upper triangle of a free one. [..., n, n] → the same."""
    upper = a.triu(1)
    return upper - upper.mT


def cayley(a: Tensor) -> Tensor:
    """Return (I + A)⁻¹(I − A) of A = skew(a): a rotation, and I at a = 0. [..., n, n] → the same."""
    s, eye = skew(a), torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(eye + s, eye - s)


class CayleyRotations:
    """Rotations as functions of the free matrices that an optimizer moves: R = R₀ · cayley(a), a = 0 at first."""

    def __init__(self, start: Rotations, device: Any):
        self.start = start.map(lambda r: r.double().to(device))
        self.free = {
            name: torch.zeros_like(r, dtype=torch.float32, requires_grad=True)
            for name, r in self.start.matrices.items()
        }

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, with smaller steps for matrices larger than 256.

        Adam moves every entry of A by about lr, so the length of a row of A, and with it the angle that a row of R
        turns by, changes by about lr · √n.
        """
        return [{"params": [a], "lr": lr * min(1.0, math.sqrt(256 / a.shape[-1]))} for a in self.free.values()]

    def __call__(self) -> Rotations:
        """Return the rotations, float32 and orthogonal to its rounding.

        The solve is in float64. It costs little beside what the rotations are used for.
        """
        turned = {
            name: (r @ cayley(self.free[name].double())).float() for name, r in self.start.matrices.items()
        }  # [n, n] each, r2's [layers, kv_heads, n, n]
        return replace(self.start, **turned)


def sgdg_step(r: Tensor, grad: Tensor, lr: float) -> Tensor:
    """Take one step of Cayley SGD, without momentum, as published. [..., n, n] → the same.

    The Cayley transform is solved by five fixed-point iterations (https://arxiv.org/abs/2002.01113). The step is at
    most 1 / ‖W‖₁, so each of them at least halves the error.
    """
    x = r / r.norm(dim=-1, keepdim=True)  # rows of length 1: takes back the drift of earlier steps
    v = -grad.mT  # the step is taken on the transpose
    # W is skew-symmetric; W Xᵀ is the part of −gradᵀ that is tangent to the orthogonal matrices at Xᵀ
    w = v @ x - 0.5 * x.mT @ (x @ (v @ x))
    w = w - w.mT
    alpha = (1 / w.abs().sum(-2).amax(-1).clamp_min(1e-12)).clamp_max(lr)[..., None, None]
    # Y = Xᵀ + α W (Xᵀ + Y) / 2 is the Cayley transform of Xᵀ along W; it is iterated from the plain gradient step
    y = x.mT + alpha * v
    for _ in range(5):
        y = x.mT + alpha * w @ (x.mT + y) / 2
    return y.mT
