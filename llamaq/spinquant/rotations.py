"""The rotations, where they merge, and what a checkpoint says about them.

    R1  [dim, dim]                    the residual stream: merged into everything that reads or writes it
    R2  [layers, kv_heads, d, d]      values of one key/value head: merged into v_proj and output_proj
    R4  Hadamard, width `online_block` before down_proj, computed online; its inverse is merged into down_proj

Rows are tokens, x' = x R. Names are torchtune's. With R1, what norms multiply with moves into the linears behind them,
and embedding and head become two matrices. Nothing is centred: RMSNorm has no mean to take away (the published code
does, and changes the model by it).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llamaq.errors import UserError
from llamaq.spinquant.hadamard import merged_with_online, online_block, online_transform, random_orthogonal

# linears that read the residual stream → the norm in front of them; linears that write into it
READS = {"attn.q_proj": "sa_norm", "attn.k_proj": "sa_norm", "attn.v_proj": "sa_norm", "mlp.w1": "mlp_norm",
         "mlp.w3": "mlp_norm"}  # fmt: skip
WRITES = ("attn.output_proj", "mlp.w2")
EMBEDDING, HEAD, FINAL_NORM = "tok_embeddings.weight", "output.weight", "norm.scale"


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int

    @classmethod
    def of(cls, decoder: Any) -> "Shape":
        attn, mlp = decoder.layers[0].attn, decoder.layers[0].mlp
        hidden = mlp.w1.out_features
        return cls(len(decoder.layers), attn.embed_dim, attn.num_heads, attn.num_kv_heads, attn.head_dim, hidden)


@dataclass(frozen=True)
class Rotations:
    """None, or 0 for `r4`, where there is none."""

    r1: Tensor | None = None  # [dim, dim]
    r2: Tensor | None = None  # [layers, kv_heads, head_dim, head_dim]
    r4: int = 0  # channels mixed by one online transform

    @classmethod
    def random(cls, shape: Shape, which: set[str], seed: int) -> "Rotations":
        """Signed Hadamard matrices, float64, the same for the same seed; `which` of r1, r2, r4."""
        generator = torch.Generator().manual_seed(seed)
        r1 = random_orthogonal(shape.dim, generator)
        heads = [random_orthogonal(shape.head_dim, generator) for _ in range(shape.layers * shape.kv_heads)]
        r2 = torch.stack(heads).view(shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
        return cls(
            r1 if "r1" in which else None,
            r2 if "r2" in which else None,
            online_block(shape.hidden) if "r4" in which else 0,
        )

    def projected(self) -> "Rotations":
        """The nearest exactly orthogonal matrices, float64 (U Vᵀ of the singular value decomposition)."""
        return replace(self, r1=_nearest(self.r1), r2=_nearest(self.r2))

    def orthogonality_error(self) -> float:
        """Largest |RᵀR − I| of all matrices."""
        errors = [
            (r.mT.double() @ r.double() - torch.eye(r.shape[-1], device=r.device)).abs().max().item()
            for r in (self.r1, self.r2)
            if r is not None
        ]
        return max(errors, default=0.0)

    def contract(self) -> dict[str, Any]:
        """What a checkpoint says about its rotations: whoever runs it must do R4, and need not know of the others."""
        return {"r1": self.r1 is not None, "r2": self.r2 is not None, "r4": self.r4}


def _nearest(r: Tensor | None) -> Tensor | None:
    if r is None:
        return None
    u, _, vh = torch.linalg.svd(r.double())
    return u @ vh


def check_contract(contract: Mapping[str, Any] | None, spinquant: bool, hidden: int, where: str) -> int:
    """The width of a checkpoint's online transform, 0 if it has none.

    Raises:
        UserError: contract and `quantization_args.spinquant` contradict each other, or R4 does not fit the model.
    """
    if contract is None:
        if spinquant:
            raise UserError(f"{where}: quantization_args.spinquant is true, but nothing says which rotations it has")
        return 0
    block = contract.get("r4")
    if not isinstance(block, int) or bool(block) != spinquant:
        raise UserError(
            f"{where}: quantization_args.spinquant={spinquant} contradicts its rotation r4={block}: without the "
            "online transform that was merged into down_proj the model talks nonsense"
        )
    if block and block != online_block(hidden):
        raise UserError(f"{where}: rotation r4={block} does not fit a feed-forward width of {hidden}")
    return block


def fuse_norms(weights: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Move each norm's gain into the linears that read it, and untie the head. Float64 inside, dtypes as they were."""
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
    """The norms in front of rotated linears; a head's own q and k norms stay as they are."""
    return [*(f"layers.{i}.{n}.scale" for i in range(shape.layers) for n in ("sa_norm", "mlp_norm")), FINAL_NORM]


def _fuse(weights: dict[str, Tensor], name: str, norm: str) -> None:
    w = weights[name]
    weights[name] = (w.double() * weights[norm].double()).to(w.dtype)


def rotate(weights: Mapping[str, Tensor], shape: Shape, r: Rotations) -> dict[str, Tensor]:
    """Merge rotations into a model's weights (torchtune names); computed in float64, dtypes as they were.

    The result is the same function, once `attach_online` has put R4 in front of down_proj.
    """
    new = fuse_norms(weights, shape) if r.r1 is not None else dict(weights)

    def apply(name: str, change: Any) -> None:
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in new:
                w = new[part]
                new[part] = change(w.double(), part.endswith("bias")).to(w.dtype)

    for i in range(shape.layers):
        if r.r4:
            w2 = f"layers.{i}.mlp.w2.weight"
            new[w2] = merged_with_online(new[w2].double(), r.r4).to(new[w2].dtype)
        if r.r2 is not None:
            r2 = r.r2[i].double().to(new[EMBEDDING].device)
            apply(f"layers.{i}.attn.v_proj", lambda w, _, r2=r2: rotate_values(w, r2))
            apply(
                f"layers.{i}.attn.output_proj",
                lambda w, bias, r2=r2: w if bias else rotate_value_readers(w, r2, shape.heads),
            )
        if r.r1 is not None:
            r1 = r.r1.double().to(new[EMBEDDING].device)
            for linear in READS:
                apply(f"layers.{i}.{linear}", lambda w, bias, r1=r1: w if bias else w @ r1)
            for linear in WRITES:
                apply(f"layers.{i}.{linear}", lambda w, bias, r1=r1: w @ r1 if bias else r1.T @ w)
    if r.r1 is not None:
        r1 = r.r1.double().to(new[EMBEDDING].device)
        for name in (EMBEDDING, HEAD):
            new[name] = (new[name].double() @ r1).to(new[name].dtype)
    return new


def rotate_values(w: Tensor, r2: Tensor) -> Tensor:
    """Rows of v_proj [kv_heads · d, n], or its bias [kv_heads · d], head by head: R2ᵀ W."""
    heads, d, _ = r2.shape
    return (r2.mT @ w.reshape(heads, d, -1)).reshape(w.shape)


def rotate_value_readers(w: Tensor, r2: Tensor, heads: int) -> Tensor:
    """Columns of output_proj [n, heads · d]: W R2, each query head with its key/value head's matrix."""
    kv_heads, d, _ = r2.shape
    blocks = w.reshape(len(w), kv_heads, heads // kv_heads, d)  # query heads of one key/value head are neighbours
    return torch.einsum("nkqd,kde->nkqe", blocks, r2).reshape(w.shape)


def attach_online(decoder: Any, block: int) -> list[RemovableHandle]:
    """Put R4 in front of every down_proj (before its input is quantized); returns the hooks' handles."""
    if not block:
        return []

    def transform(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (online_transform(arguments[0], block),)

    return [layer.mlp.w2.register_forward_pre_hook(transform) for layer in decoder.layers]
