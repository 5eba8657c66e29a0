"""Polish: codes stay as they are; group scales and norm gains are trained to bring the model nearer to the BF16 one.

What EfficientQAT (https://arxiv.org/abs/2407.11062) calls end-to-end training of quantization parameters. The file
has the same form and runs as fast. Scales are rounded to bfloat16 in every forward pass, straight through.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from llamaq.quant.modules import FrozenLinear, QuantizedLinear
from llamaq.quant.prepare import quantized_linears, replace
from llamaq.quant.scheme import round_to_bf16


class _ScaledLinear(QuantizedLinear):
    """A frozen linear whose scales are s · (1 + θ)."""

    codes: Tensor
    start: Tensor

    def __init__(self, linear: FrozenLinear):
        super().__init__(linear.in_features, linear.out_features, linear.fmt)
        self.register_buffer("codes", linear.codes)
        self.register_buffer("start", linear.scales)
        self.theta = nn.Parameter(torch.zeros_like(linear.scales))

    def scales(self) -> Tensor:
        return round_to_bf16(self.start * (1 + self.theta))

    def quantized_weight(self) -> Tensor:
        w = self.codes.unflatten(1, (self.start.shape[1], -1)) * self.scales()[..., None]
        return w.flatten(1)

    def frozen(self) -> FrozenLinear:
        assert self.fmt is not None
        return FrozenLinear(self.codes, self.scales().detach(), self.fmt)


def polish(
    decoder: nn.Module, loss: Callable[[Tensor], Tensor], batches: list[Tensor], steps: int, lr: float,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda x: x,
) -> list[float]:  # fmt: skip
    """Train scales and norm gains of a frozen decoder in place; returns the loss of each step.

    Args:
        decoder: its linears are `FrozenLinear`s.
        loss: tokens [b, s] → a scalar, e.g. KL from the BF16 model.
        batches: step i takes batches[i % len].
        steps: of Adam.
        lr: relative change a step; a cosine takes it to 0.
        progress: wraps the loop.
    """
    decoder.requires_grad_(False)
    scaled: dict[str, _ScaledLinear] = {}
    for name, linear in quantized_linears(decoder).items():
        assert isinstance(linear, FrozenLinear), f"{name} is not frozen"
        scaled[name] = _ScaledLinear(linear)
        replace(decoder, name, scaled[name])
    gains = [p.requires_grad_() for name, p in decoder.named_parameters() if name.endswith("norm.scale")]
    optimizer = torch.optim.Adam([*(s.theta for s in scaled.values()), *gains], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / steps))
    losses = []
    for step in progress(range(steps)):
        optimizer.zero_grad()
        value = loss(batches[step % len(batches)])
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    decoder.requires_grad_(False)
    for name, linear in scaled.items():
        replace(decoder, name, linear.frozen())
    return losses
