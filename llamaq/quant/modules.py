"""Define a model's quantized modules: linears, embedding, head and adapters. They compute what the .pte computes.

A linear has one of two states, and both compute the same bits:

    latent    a float `weight`, fake-quantized in every forward pass; it can be trained
    frozen    int8 `codes` and float32 `scales`; only the adapter can be trained

    stage 1 (QAT)     latent weights, no adapters                       weights are trained
    stage 2 (LoRA)    frozen weights, adapters                          adapters are trained
    stage 3 (DPO)     latent weights, adapters                          both are trained
    what ships        frozen weights, adapters if they were trained

With Q for quantize and dequantize, a linear with an adapter computes

    y = Q(W) Q(x) + alpha / rank · B A x

The adapter reads the unquantized input and is never merged into W. Example: one output, the weights and the token of
the examples in `llamaq.quant.scheme`, and an adapter of rank 1 with alpha / rank = 2.

    Q(W) = ( 0.7007  −0.6006  0.3003      0)
    Q(x) = (−0.5      0.12    1.0      2.05)     Q(W) Q(x)     = −0.1221
    x    = (−0.5      0.123   1.0      2.05)     2 · B A x     =  0.246      A = (0 1 0 0), B = (1)
                                                 y             =  0.1239

A format of None switches quantization off. The BF16 control is trained like that: the same modules and adapters in full
precision.
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
    """A LoRA adapter (https://arxiv.org/abs/2106.09685): `alpha / rank · B(A(x))`, A [rank, in], B [out, rank].

    The checkpoint stores adapters in bfloat16. So they are trained in float32 and used at their bfloat16 values. B
    starts at zero, so a fresh adapter changes nothing.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, device=None):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.a = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device))

    @property
    def scale(self) -> float:
        """Return what the output is multiplied by. ExecuTorch's loader fixes it at 2."""
        return self.alpha / self.rank

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set A as torchtune and PEFT do (Kaiming uniform with a = √5, which is ±1/√in), and B to zero."""
        nn.init.uniform_(self.a, -1 / math.sqrt(self.a.shape[1]), 1 / math.sqrt(self.a.shape[1]), generator=generator)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, round_to_bf16(self.a)), round_to_bf16(self.b))


class QuantizedLinear(nn.Module):
    """A linear in either state: it quantizes its input, and adds its bias and its adapter, if there are any.

    A bias (Qwen2's q, k and v have one) stays float32, like the norms.
    """

    def __init__(self, in_features: int, out_features: int, fmt: WeightFormat | None, bias: nn.Parameter | None = None):
        super().__init__()
        self.in_features, self.out_features, self.fmt = in_features, out_features, fmt
        self.bias = bias
        self.adapter: Adapter | None = None

    def quantized_weight(self) -> Tensor:
        """Return the weight that the matmul uses: float32 [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(fake_quantize_activation(x) if self.fmt else x, self.quantized_weight(), self.bias)
        return y if self.adapter is None else y + self.adapter(x)


class LatentLinear(QuantizedLinear):
    """A linear with a float weight [out, in], fake-quantized in every forward pass."""

    def __init__(self, weight: Tensor, fmt: WeightFormat | None, bias: nn.Parameter | None = None):
        super().__init__(weight.shape[1], weight.shape[0], fmt, bias)
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)

    def quantized_weight(self) -> Tensor:
        return fake_quantize(self.weight, self.fmt) if self.fmt else self.weight


class FrozenLinear(QuantizedLinear):
    """A linear with int8 codes [out, in] and float32 scales [out, in / group_size]."""

    fmt: WeightFormat
    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, fmt: WeightFormat, bias: nn.Parameter | None = None):
        super().__init__(codes.shape[1], codes.shape[0], fmt, bias)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def quantized_weight(self) -> Tensor:
        return dequantize(self.codes, self.scales, self.fmt)


class LatentEmbedding(nn.Module):
    """An embedding with a float weight [vocab, dim] and one int8 scale per row.

    Each row has its own scale, so only the rows that are looked up need to be fake-quantized: a few thousand of Llama's
    128,256.
    """

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
    """An embedding with int8 codes [vocab, dim] and float32 scales [vocab, 1]."""

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
    """The classification head: the embedding's matrix with int8 rows, applied to int8 dynamic activations.

    A tuple holds the embedding, so that torch does not register it a second time: there is one parameter, under one
    state-dict key.
    """

    tied = True

    def __init__(self, embedding: LatentEmbedding | FrozenEmbedding):
        super().__init__()
        self._embedding = (embedding,)

    def quantized_weight(self) -> Tensor:
        """Return the embedding's matrix as the matmul uses it: float32 [vocab, dim]."""
        return self._embedding[0].quantized_weight()

    def forward(self, h: Tensor, w: Tensor | None = None) -> Tensor:
        """Return the logits [..., vocab] of h [..., dim].

        Args:
            h: the decoder's output.
            w: an earlier result of `quantized_weight()`. Callers that take the sequence in chunks compute it once.
        """
        h = fake_quantize_activation(h) if self._embedding[0].fmt else h
        return F.linear(h, self.quantized_weight() if w is None else w)


class UntiedHead(TiedHead):
    """A head with its own matrix, which computes as `TiedHead` does. Rotating a model unties its head."""

    tied = False

    def __init__(self, matrix: LatentEmbedding | FrozenEmbedding):
        super().__init__(matrix)
        self.matrix = matrix


class HeadElsewhere(nn.Identity):
    """Stand in a decoder for its head where somebody else calls it; a tuple hides it, as in `TiedHead`."""

    def __init__(self, head: TiedHead):
        super().__init__()
        self._head = (head,)

    @property
    def head(self) -> TiedHead:
        """Return the head."""
        return self._head[0]

    @property
    def tied(self) -> bool:
        """Tell whether the head is the embedding's matrix."""
        return self.head.tied


def head_of(model: nn.Module, name: str = "output") -> TiedHead | None:
    """Return a model's quantized head, in its place or elsewhere; None if it has none."""
    head = getattr(model, name, None)
    head = head.head if isinstance(head, HeadElsewhere) else head
    return head if isinstance(head, TiedHead) else None


def codes_and_scales(module: LatentLinear | LatentEmbedding) -> tuple[Tensor, Tensor]:
    """Return the codes and scales that replace a latent module's weight. Conversion and export do not change them."""
    assert module.fmt is not None, "a full-precision module has no codes"
    scales = choose_scales(module.weight, module.fmt)
    return quantize(module.weight, scales, module.fmt), scales
