"""Quantize weights and activations: the one statement of llamaq's numerics.

Fake quantization, conversion, GPTQ, export and the tests all call the functions below.

What is quantized
-----------------
    where                    weights                                       input activations
    linears of the blocks    int4, one scale per `group_size` in a row     int8 per token, asymmetric, dynamic
    head                     int8, one scale per row                       the same
    embedding                int8, one scale per row                       none (a lookup)

How a weight is quantized
-------------------------
Weights are symmetric: w ≈ code · scale, and zero points are 0. With n bits,

    scale = absmax / (2^n − 1) · 2        int4: absmax / 7.5        int8: absmax / 127.5
    code  = round(w / scale), clamped     int4: −8 … 7              int8: −128 … 127

where absmax is the largest |w| of the group or row. Example: a group of 4 weights in int4.

    weights        0.75    −0.60     0.32    −0.04      absmax 0.75
    scale          0.75 / 7.5 = 0.1, which bfloat16 stores as 0.10009765625
    w / scale      7.49    −5.99     3.20    −0.40
    codes             7       −6        3        0
    dequantized  0.7007  −0.6006   0.3003        0      code · scale

Why 7.5 and not 7: dividing by 7 would represent the largest weight exactly and make the step 7 % wider for the other 31
weights of a group of 32. Dividing by 7.5 costs only half a step on the largest weight, and only if it is positive.

Why scales are rounded before the codes
---------------------------------------
Scales are computed in float32, whatever the training dtype. XNNPACK stores the scales of int4 groups as bfloat16
(executorch/backends/xnnpack/operators/node_visitor.py). So `choose_scales` rounds them to bfloat16 values, and codes
are computed from the rounded scales. Rounding them only at export changes the logits by 1 %. Scales of int8 rows are
stored as float32 and not rounded.

How an activation is quantized
------------------------------
Each token (the last dimension) gets a scale and a zero point when the model runs. The range includes 0, so that 0 is
represented exactly. Example: a token with 4 values.

    values        −0.5    0.123      1.0     2.05       range −0.5 … 2.05
    scale         (2.05 + 0.5) / 255 = 0.01             zero point −128 + 0.5 / 0.01 = −78
    codes         −128      −66       22      127       round(x / scale) + zero point
    dequantized   −0.5     0.12      1.0     2.05       (code − zero point) · scale

Why torchao
-----------
All arithmetic is torchao's (`quant_primitives`, `per_token_dynamic_quant`). ExecuTorch's loader calls the same
functions, so what is trained is what runs, bit for bit in float32.
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
    """The storage format of one weight matrix [out, in]."""

    bits: int
    group_size: int | None  # weights along a row that share a scale; None: the whole row
    bf16_scales: bool  # round scales to bfloat16 values

    @property
    def qmin(self) -> int:
        """Return the smallest code: −8 for int4, −128 for int8."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Return the largest code: 7 for int4, 127 for int8."""
        return 2 ** (self.bits - 1) - 1

    def block(self, w: Tensor) -> tuple[int, int]:
        """Return the shape of the block that one scale covers, torchao's `block_size`."""
        return (1, self.group_size or w.shape[-1])


@dataclass(frozen=True)
class Scheme:
    """Meta's scheme for quantized Llama 3.2. The group size is its one setting."""

    group_size: int = 32
    name: str = "int4_weight_int8_dynamic_activation"  # quantization_args.scheme in params.json

    @property
    def linear(self) -> WeightFormat:
        """Return the format of the linears in the transformer blocks."""
        return WeightFormat(bits=4, group_size=self.group_size, bf16_scales=True)

    @property
    def rows(self) -> WeightFormat:
        """Return the format of embedding and head. Llama 3.2 ties them: one matrix, the same codes and scales."""
        return WeightFormat(bits=8, group_size=None, bf16_scales=False)


def choose_scales(w: Tensor, fmt: WeightFormat) -> Tensor:
    """Return the scales of a weight [out, in]: float32 [out, in / group_size], or [out, 1] for whole rows."""
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
    """Return the integer codes of a weight: int8 [out, in], rounded half to even, clamped to [qmin, qmax]."""
    zeros = torch.zeros_like(scales)
    return quantize_affine(w.detach().float(), fmt.block(w), scales, zeros, torch.int8, fmt.qmin, fmt.qmax)


def dequantize(codes: Tensor, scales: Tensor, fmt: WeightFormat) -> Tensor:
    """Return the weight that codes and scales represent: float32 [out, in]."""
    zeros = torch.zeros_like(scales)
    return dequantize_affine(codes, fmt.block(codes), scales, zeros, torch.int8, fmt.qmin, fmt.qmax)


class _FakeQuantizeWeight(torch.autograd.Function):
    """Quantize and dequantize in the forward pass; pass the gradient through unchanged (straight-through estimator).

    Nothing is saved for the backward pass, so fake quantization of all weights costs no activation memory. Clipped
    weights get their gradient too: only the largest weight of a group can be clipped, by half a step.
    """

    @staticmethod
    def forward(ctx, w: Tensor, fmt: WeightFormat) -> Tensor:
        scales = choose_scales(w, fmt)
        return dequantize(quantize(w, scales, fmt), scales, fmt)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _FakeQuantizeActivation(torch.autograd.Function):
    """Quantize each token to asymmetric int8 and dequantize it; pass the gradient through unchanged.

    The range covers every value of the token, so nothing is clipped.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return per_token_dynamic_quant(
            x.float(), scale_dtype=torch.float32, zero_point_dtype=torch.float32, eps=FP32_EPS
        ).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


class _RoundToBF16(torch.autograd.Function):
    """Round to bfloat16 values; pass the gradient through unchanged."""

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        return w.bfloat16().to(w.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def fake_quantize(w: Tensor, fmt: WeightFormat) -> Tensor:
    """Return `dequantize(quantize(w))` in float32. The gradient passes straight through. [out, in] → [out, in]."""
    return _FakeQuantizeWeight.apply(w, fmt)


def fake_quantize_activation(x: Tensor) -> Tensor:
    """Return x [..., in] as the int8 kernels see it: each token rounded to its own 256 levels."""
    return _FakeQuantizeActivation.apply(x)


def round_to_bf16(w: Tensor) -> Tensor:
    """Return the weight rounded to bfloat16 values, in its own dtype. Adapters are stored like this.

    The gradient passes straight through.
    """
    return _RoundToBF16.apply(w)
