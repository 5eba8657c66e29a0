"""The modules a model is made of while it trains: linears, embedding, head and adapters of the scheme.

A linear is in one of two states. *Latent*: a float `weight`, fake-quantized on every forward pass (stages 1 and 3).
*Frozen*: int8 `codes` and float32 `scales`, nothing to train but the adapter (stage 2, and what ships). Both compute
the same bits. The adapter reads the unquantized input and is never merged:  y = Q(W) Q(x) + alpha/rank · B A x.

A format of None switches quantization off: that is the BF16 control, the same modules and adapters in full precision.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamaq.quant.scheme import (
    WeightFormat,
    choose_scales,
    dequantize,
    fake_quantize,
    fake_quantize_activation,
    quantize,
    round_to_bf16,
)


class Adapter(nn.Module):
    """LoRA (https://arxiv.org/abs/2106.09685): `scale · B(A(x))`, A [rank, in], B [out, rank].

    Weights are trained in float32 and used at their bfloat16 values, which is what the checkpoint stores. B starts at
    zero, so a fresh adapter changes nothing.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, device=None):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.a = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A as in torchtune and PEFT (kaiming uniform with a = √5, i.e. ±1/√in); B zero."""
        nn.init.uniform_(self.a, -1 / math.sqrt(self.a.shape[1]), 1 / math.sqrt(self.a.shape[1]), generator=generator)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, round_to_bf16(self.a)), round_to_bf16(self.b))


class QuantizedLinear(nn.Module):
    """What both states share: int8 dynamic activations, and perhaps an adapter."""

    def __init__(self, in_features: int, out_features: int, fmt: WeightFormat | None):
        super().__init__()
        self.in_features, self.out_features, self.fmt = in_features, out_features, fmt
        self.adapter: Adapter | None = None

    def quantized_weight(self) -> Tensor:
        """The weight the matmul sees, float32 [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(fake_quantize_activation(x) if self.fmt else x, self.quantized_weight())
        return y if self.adapter is None else y + self.adapter(x)


class LatentLinear(QuantizedLinear):
    """Float weight [out, in], fake-quantized on every forward pass."""

    def __init__(self, weight: Tensor, fmt: WeightFormat | None):
        super().__init__(weight.shape[1], weight.shape[0], fmt)
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)

    def quantized_weight(self) -> Tensor:
        return fake_quantize(self.weight, self.fmt) if self.fmt else self.weight


class FrozenLinear(QuantizedLinear):
    """Integer codes int8 [out, in] and scales float32 [out, in / group_size]."""

    fmt: WeightFormat
    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, fmt: WeightFormat):
        super().__init__(codes.shape[1], codes.shape[0], fmt)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def quantized_weight(self) -> Tensor:
        return dequantize(self.codes, self.scales, self.fmt)


class LatentEmbedding(nn.Module):
    """Embedding [vocab, dim] with int8 rows. Only the rows looked up are fake-quantized: a row has its own scale."""

    def __init__(self, weight: Tensor, fmt: WeightFormat | None):
        super().__init__()
        self.fmt = fmt
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)

    def quantized_weight(self) -> Tensor:
        return fake_quantize(self.weight, self.fmt) if self.fmt else self.weight

    def forward(self, tokens: Tensor) -> Tensor:
        rows = F.embedding(tokens, self.weight)  # [..., dim]
        return fake_quantize(rows.flatten(0, -2), self.fmt).view_as(rows) if self.fmt else rows


class FrozenEmbedding(nn.Module):
    """Embedding as codes int8 [vocab, dim] and scales float32 [vocab, 1]."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, fmt: WeightFormat):
        super().__init__()
        self.fmt = fmt
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def quantized_weight(self) -> Tensor:
        return dequantize(self.codes, self.scales, self.fmt)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codes).float() * F.embedding(tokens, self.scales)


class TiedHead(nn.Module):
    """The classification head: the embedding's matrix, int8 rows, over int8 dynamic activations.

    The embedding is held in a tuple so that it is not registered a second time: one parameter, one state-dict key.
    """

    def __init__(self, embedding: LatentEmbedding | FrozenEmbedding):
        super().__init__()
        self._embedding = (embedding,)

    def quantized_weight(self) -> Tensor:
        """Float32 [vocab, dim]."""
        return self._embedding[0].quantized_weight()

    def forward(self, h: Tensor, w: Tensor | None = None) -> Tensor:
        """Logits [..., vocab] of h [..., dim]; `w` is a `quantized_weight()` made earlier, for calls in chunks."""
        h = fake_quantize_activation(h) if self._embedding[0].fmt else h
        return F.linear(h, self.quantized_weight() if w is None else w)


class UntiedHead(TiedHead):
    """A head with a matrix of its own, which rotating a model makes of a tied one. Computes as `TiedHead` does."""

    def __init__(self, matrix: LatentEmbedding | FrozenEmbedding):
        super().__init__(matrix)
        self.matrix = matrix


def frozen(module: LatentLinear | LatentEmbedding) -> tuple[Tensor, Tensor]:
    """Codes and scales of a latent module: the only place where scales are derived from weights for keeps."""
    assert module.fmt is not None, "a full-precision module has no codes"
    scales = choose_scales(module.weight, module.fmt)
    return quantize(module.weight, scales, module.fmt), scales
