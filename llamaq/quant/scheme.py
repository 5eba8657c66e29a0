"""The scheme: the one statement of the numerics, read by fake quantization, conversion, export and the tests.

    where                    weights                                       input activations
    linears of the blocks    int4, one scale per `group_size` in a row     int8 per token, asymmetric, dynamic
    head                     int8, one scale per row                       the same
    embedding                int8, one scale per row                       none (a lookup)

Weights are symmetric: w ≈ code · scale, zero points are 0. With n bits, scale = absmax / (2^n − 1) · 2, that is
absmax/7.5 for int4 and absmax/127.5 for int8, and codes run over [−2^(n−1), 2^(n−1) − 1]: the largest positive weight
of a group is clipped by half a step, which costs less than a step that is 7 % wider for all 32.

Scales are computed in float32 whatever the training dtype, and those of int4 groups are rounded to a bfloat16 value
*before* the codes are computed, because XNNPACK stores group scales as bf16
(executorch/backends/xnnpack/operators/node_visitor.py): rounded later, that cast alone is a 1 % error in the logits.

All arithmetic is torchao's (`quant_primitives`, `per_token_dynamic_quant`), the very functions ExecuTorch's loader
uses, so that what is trained is what runs, bit for bit in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from torchao.quantization.utils import per_token_dynamic_quant

FP32_EPS = torch.finfo(torch.float32).eps
SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal  # XNNPACK refuses zero and subnormal scales


@dataclass(frozen=True)
class WeightFormat:
    """How one weight matrix [out, in] is stored.

    `group_size` counts weights along a row that share a scale; None means the whole row.
    """

    bits: int
    group_size: int | None
    bf16_scales: bool

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def block(self, w: Tensor) -> tuple[int, int]:
        """The shape of the block one scale covers, torchao's `block_size`."""
        return (1, self.group_size or w.shape[-1])


@dataclass(frozen=True)
class Scheme:
    """Meta's scheme for quantized Llama 3.2, with the group size as its one setting."""

    group_size: int = 32
    name: str = "int4_weight_int8_dynamic_activation"  # quantization_args.scheme in params.json

    @property
    def linear(self) -> WeightFormat:
        """Linears of the transformer blocks."""
        return WeightFormat(bits=4, group_size=self.group_size, bf16_scales=True)

    @property
    def rows(self) -> WeightFormat:
        """Embedding and head, one matrix in Llama 3.2: same codes, same scales."""
        return WeightFormat(bits=8, group_size=None, bf16_scales=False)


def choose_scales(w: Tensor, fmt: WeightFormat) -> Tensor:
    """Scales of a weight [out, in]: float32 [out, in / group_size] (or [out, 1] for whole rows)."""
    scales, _ = choose_qparams_affine(
        w.detach().float(),
        MappingType.SYMMETRIC,
        fmt.block(w),  # pyright: ignore[reportArgumentType]  (annotated Tuple[int], takes any)
        torch.int8,
        fmt.qmin,
        fmt.qmax,
        eps=SMALLEST_SCALE,
        scale_dtype=torch.float32,
    )
    scales = scales.reshape(w.shape[0], -1)
    return scales.bfloat16().float() if fmt.bf16_scales else scales


def quantize(w: Tensor, scales: Tensor, fmt: WeightFormat) -> Tensor:
    """Integer codes of a weight: int8 [out, in], round half to even, clamped to [qmin, qmax]."""
    zeros = torch.zeros_like(scales)
    return quantize_affine(w.detach().float(), fmt.block(w), scales, zeros, torch.int8, fmt.qmin, fmt.qmax)


def dequantize(codes: Tensor, scales: Tensor, fmt: WeightFormat) -> Tensor:
    """The weight that codes and scales stand for: float32 [out, in]."""
    zeros = torch.zeros_like(scales)
    return dequantize_affine(codes, fmt.block(codes), scales, zeros, torch.int8, fmt.qmin, fmt.qmax)


class _FakeQuantizeWeight(torch.autograd.Function):
    """Quantize and dequantize going forward; the identity going back (straight-through estimator).

    Nothing is kept for the backward pass, so fake-quantizing all weights costs no activation memory. The gradient of
    clipped weights passes too: at absmax/7.5 only the largest weight of a group is ever clipped, by half a step.
    """

    @staticmethod
    def forward(ctx, w: Tensor, fmt: WeightFormat) -> Tensor:
        scales = choose_scales(w, fmt)
        return dequantize(quantize(w, scales, fmt), scales, fmt)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _FakeQuantizeActivation(torch.autograd.Function):
    """Per-token asymmetric int8, straight-through. The range covers every value of the token: nothing is clipped."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return per_token_dynamic_quant(
            x.float(), scale_dtype=torch.float32, zero_point_dtype=torch.float32, eps=FP32_EPS
        ).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


class _RoundToBF16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        return w.bfloat16().to(w.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def fake_quantize(w: Tensor, fmt: WeightFormat) -> Tensor:
    """`dequantize(quantize(w))` in float32, differentiable straight through. [out, in] → [out, in]."""
    return _FakeQuantizeWeight.apply(w, fmt)


def fake_quantize_activation(x: Tensor) -> Tensor:
    """What the int8 kernels see of x [..., in]: each token (last dimension) rounded to its own 256 levels."""
    return _FakeQuantizeActivation.apply(x)


def round_to_bf16(w: Tensor) -> Tensor:
    """W rounded to bfloat16 values in its own dtype, differentiable straight through: how adapters are stored."""
    return _RoundToBF16.apply(w)
