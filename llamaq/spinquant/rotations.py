"""The rotations R1, R2 and R4: where they merge into the weights, and what a checkpoint says about them.

    R1  [dim, dim]                  the residual stream: merged into every weight that reads or writes it
    R2  [layers, kv_heads, d, d]    the values of one key/value head: merged into v_proj and output_proj
    R4  a Hadamard matrix           the input of down_proj: computed online, in blocks of `online_block` channels; its
                                    inverse is merged into down_proj

Rows are tokens, so a rotated input is x' = x R, and a weight [out, in] computes y = x Wᵀ. A linear that reads x' needs
W' = W R, since x' W'ᵀ = x R Rᵀ Wᵀ = x Wᵀ. A linear that writes into the rotated stream needs W' = Rᵀ W, since
x W'ᵀ = x Wᵀ R = y R. For example, with R the turn by 90°, x' is the same vector in other coordinates:

    R = [[0, 1], [-1, 0]]    x = (3, 1)    x' = x R = (-1, 3)
    W = [[2, 5]]             y = x Wᵀ = 11
    W' = W R = [[-5, 2]]     x' W'ᵀ = 5 + 6 = 11

RMSNorm divides by the length of x, which a rotation keeps, but then multiplies channel by channel, which a rotation
mixes up. So with R1 these gains move into the linears behind the norm first. The head reads through the last norm, so
it no longer equals the embedding: the tied matrix becomes two. Nothing is centred, because RMSNorm has no mean to take
away. (The published code centres the embedding and changes the model by it.)

Names of weights are torchtune's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llamaq.model.hadamard import random_orthogonal
from llamaq.model.names import EMBEDDING, FINAL_NORM, HEAD, READS, WRITES
from llamaq.model.online import merged_with_online, online_block
from llamaq.model.shape import Shape


@dataclass(frozen=True)
class Rotations:
    """A set of rotations; a matrix that is not part of it is None, and `r4` is 0."""

    r1: Tensor | None = None  # [dim, dim]
    r2: Tensor | None = None  # [layers, kv_heads, head_dim, head_dim]
    r4: int = 0  # channels mixed by one online transform

    @classmethod
    def random(cls, shape: Shape, which: set[str], seed: int) -> "Rotations":
        """Draw signed Hadamard matrices, float64, the same for the same seed; `which` of r1, r2 and r4."""
        generator = torch.Generator().manual_seed(seed)
        # always draw all of them: then r2 is the same whether or not r1 is wanted
        r1 = random_orthogonal(shape.dim, generator)
        heads = [random_orthogonal(shape.head_dim, generator) for _ in range(shape.layers * shape.kv_heads)]
        r2 = torch.stack(heads).view(shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
        return cls(
            r1 if "r1" in which else None,
            r2 if "r2" in which else None,
            online_block(shape.hidden) if "r4" in which else 0,
        )

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Return the matrices of the set by name: `r1`, `r2`, those there are."""
        return {name: r for name, r in (("r1", self.r1), ("r2", self.r2)) if r is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rotations":
        """Return the set with each of its matrices changed."""
        return replace(self, **{name: change(r) for name, r in self.matrices.items()})

    def projected(self) -> "Rotations":
        """Return the nearest exactly orthogonal matrices, in float64."""
        return self.map(_nearest_orthogonal)

    def orthogonality_error(self) -> float:
        """Return the largest |RᵀR − I| of all matrices; 0 if there are none."""
        errors = [
            (r.mT.double() @ r.double() - torch.eye(r.shape[-1], device=r.device)).abs().max().item()
            for r in self.matrices.values()
        ]
        return max(errors, default=0.0)

    def contract(self) -> dict[str, Any]:
        """Return what a checkpoint says about its rotations: which are merged in, and the width of the online R4."""
        return {"r1": self.r1 is not None, "r2": self.r2 is not None, "r4": self.r4}


def _nearest_orthogonal(r: Tensor) -> Tensor:
    """Return U Vᵀ of the singular value decomposition R = U S Vᵀ."""
    u, _, vh = torch.linalg.svd(r.double())
    return u @ vh


def fuse_norms(weights: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Move each norm's gain into the linears that read it, and untie the head.

    Computed in float64, returned in the dtypes the weights have. Norms keep a gain of 1.
    """
    new = dict(weights)
    new.setdefault(HEAD, weights[EMBEDDING])
    for i in range(shape.layers):
        for linear, norm in READS.items():
            _fuse(new, f"layers.{i}.{linear}.weight", f"layers.{i}.{norm}.scale")
    _fuse(new, HEAD, FINAL_NORM)
    for name in norm_names(shape):
        new[name] = torch.ones_like(new[name])
    return new


def norm_names(shape: Shape) -> list[str]:
    """List the norms in front of linears that read the residual stream; a head's own q and k norms stay as they are."""
    return [*(f"layers.{i}.{n}.scale" for i in range(shape.layers) for n in ("sa_norm", "mlp_norm")), FINAL_NORM]


def _fuse(weights: dict[str, Tensor], name: str, norm: str) -> None:
    gain = weights[norm].double()  # [dim], multiplies the columns of W [out, dim]
    w = weights[name]
    weights[name] = (w.double() * gain).to(w.dtype)


def rotate(weights: Mapping[str, Tensor], shape: Shape, r: Rotations) -> dict[str, Tensor]:
    """Merge rotations into a model's weights; computed in float64, returned in the dtypes the weights have.

    The result is the same function, once `attach_online` has put R4 in front of down_proj.
    """
    new = fuse_norms(weights, shape) if r.r1 is not None else dict(weights)
    for i in range(shape.layers):
        if r.r4:
            _change(new, f"layers.{i}.mlp.w2.weight", lambda w: merged_with_online(w, r.r4))
        if r.r2 is not None:
            _merge_r2(new, i, r.r2[i], shape.heads)
        if r.r1 is not None:
            _merge_r1(new, i, r.r1)
    if r.r1 is not None:
        r1 = r.r1.double().to(new[EMBEDDING].device)
        for name in (EMBEDDING, HEAD):  # rows of the embedding are written, rows of the head are read: E R1, W R1
            _change(new, name, lambda w: w @ r1)
    return new


def _merge_r1(weights: dict[str, Tensor], i: int, r1: Tensor) -> None:
    """Rotate what layer i reads from the residual stream and what it writes into it."""
    r1 = r1.double().to(weights[EMBEDDING].device)
    for linear in READS:
        _change(weights, f"layers.{i}.{linear}.weight", lambda w: w @ r1)  # its bias is not in the stream
    for linear in WRITES:
        _change(weights, f"layers.{i}.{linear}.weight", lambda w: r1.T @ w)
        _change(weights, f"layers.{i}.{linear}.bias", lambda b: b @ r1)


def _merge_r2(weights: dict[str, Tensor], i: int, r2: Tensor, heads: int) -> None:
    """Rotate the values of layer i; attention only averages them over tokens, so output_proj can undo it."""
    r2 = r2.double().to(weights[EMBEDDING].device)
    for part in ("weight", "bias"):
        _change(weights, f"layers.{i}.attn.v_proj.{part}", lambda w: rotate_values(w, r2))
    _change(weights, f"layers.{i}.attn.output_proj.weight", lambda w: rotate_value_readers(w, r2, heads))


def _change(weights: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change a weight in float64 and put it back in its own dtype; a bias that the model does not have is left out."""
    if name in weights:
        w = weights[name]
        weights[name] = change(w.double()).to(w.dtype)


def rotate_values(w: Tensor, r2: Tensor) -> Tensor:
    """Rotate the rows of v_proj [kv_heads · d, n], or its bias [kv_heads · d], head by head: R2ᵀ W."""
    heads, d, _ = r2.shape
    return (r2.mT @ w.reshape(heads, d, -1)).reshape(w.shape)


def rotate_value_readers(w: Tensor, r2: Tensor, heads: int) -> Tensor:
    """Rotate the columns of output_proj [n, heads · d]: W R2, each query head by its key/value head's matrix."""
    kv_heads, d, _ = r2.shape
    blocks = w.reshape(len(w), kv_heads, heads // kv_heads, d)  # query heads of one key/value head are neighbours
    return torch.einsum("nkqd,kde->nkqe", blocks, r2).reshape(w.shape)
