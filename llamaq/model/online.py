"""R4, the Hadamard transform that a rotated model computes online before down_proj, as ExecuTorch's operator does it.

Rotations R1 and R2 disappear into the weights. R4 cannot, since the SiLU between w1 and w2 is not linear, so the phone
computes it for every token, and its inverse is merged into down_proj. A checkpoint says in its `params.json` which
rotations it has (its *contract*): without R4 computed online, a model that has R4 merged in computes nonsense.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llamaq.errors import UserError
from llamaq.model.hadamard import order_28


def online_block(n: int) -> int:
    """Return how many channels of a width n one online transform mixes.

    All of them where ExecuTorch's operator takes n (2^k or 28 · 2^k), else blocks of the largest power of two in n.
    8192 → 8192, 28 · 256 → 7168, 1536 = 3 · 512 → 512.
    """
    power = n & -n
    return n if n in (power, 28 * (power // 4)) else power


def online_gain(block: int) -> float:
    """Return the factor by which ExecuTorch's operator changes lengths: it divides 28 · 2^k by √2^k, not by √28 too."""
    return 1.0 if block & (block - 1) == 0 else math.sqrt(28)


def online_transform(x: Tensor, block: int) -> Tensor:
    """Multiply each run of `block` channels of x [..., n] by the Hadamard matrix over √block, times `online_gain`.

    Computed as a butterfly of log2 steps, with one matmul for the factor of 28; dtype and device are those of x.
    """
    power = block & -block
    core = block // power * (4 if block != power else 1)  # 28, or 1
    power = block // core
    y = x.reshape(-1, core, power)
    if core > 1:
        y = torch.einsum("nip,ij->njp", y, order_28().to(x))
    span = 1
    while span < power:
        y = y.reshape(-1, power // (2 * span), 2, span)
        a, b = y[:, :, 0], y[:, :, 1]
        y = torch.stack([a + b, a - b], 2)
        span *= 2
    return (y * (1 / math.sqrt(power))).reshape(x.shape)


def merged_with_online(w: Tensor, block: int) -> Tensor:
    """Return the weight [out, n] that gives the same outputs on transformed inputs: W H / (√block · gain)."""
    gain = online_gain(block)
    return online_transform(w, block) / (gain * gain)


def attach_online(decoder: Any, block: int) -> list[RemovableHandle]:
    """Put R4 in front of every down_proj, before its input is quantized; return the hooks' handles. Nothing for 0."""
    if not block:
        return []

    def transform(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (online_transform(arguments[0], block),)

    return [layer.mlp.w2.register_forward_pre_hook(transform) for layer in decoder.layers]


def check_contract(contract: Mapping[str, Any] | None, spinquant: bool, hidden: int, where: str) -> int:
    """Return the width of a checkpoint's online transform, 0 if it has none.

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
