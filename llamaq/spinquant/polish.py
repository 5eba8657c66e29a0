"""Polish: train group scales and norm gains to bring the model nearer to the BF16 one, with the codes frozen.

EfficientQAT (https://arxiv.org/abs/2407.11062) calls this end-to-end training of quantization parameters. The file has
the same form as without it and runs as fast.

A scale s becomes s · (1 + θ), and θ is trained, so one learning rate fits large and small scales: with lr 3e-4, the
first step of Adam changes every scale by 0.03 %. Scales are rounded to bfloat16 in every forward pass, straight
through, because XNNPACK stores them so.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llamaq.quant.modules import FrozenLinear, QuantizedLinear
from llamaq.quant.prepare import quantized_linears, replace
from llamaq.quant.scheme import round_to_bf16
from llamaq.spinquant.loops import Progress, cosine_schedule, no_bar


class _ScaledLinear(QuantizedLinear):
    """A frozen linear whose scales are s · (1 + θ)."""

    codes: Tensor
    start: Tensor

    def __init__(self, linear: FrozenLinear):
        super().__init__(linear.in_features, linear.out_features, linear.fmt, linear.bias)
        self.register_buffer("codes", linear.codes)
        self.register_buffer("start", linear.scales)
        self.theta = nn.Parameter(torch.zeros_like(linear.scales))

    def scales(self) -> Tensor:
        """Return the scales at bfloat16 values, float32 [out, in / group_size]."""
        return round_to_bf16(self.start * (1 + self.theta))

    def quantized_weight(self) -> Tensor:
        by_group = self.codes.unflatten(1, (self.start.shape[1], -1))  # [out, in / group_size, group_size]
        return (by_group * self.scales()[..., None]).flatten(1)

    def frozen(self) -> FrozenLinear:
        """Return the linear with its trained scales."""
        assert self.fmt is not None
        return FrozenLinear(self.codes, self.scales().detach(), self.fmt, self.bias)


def polish(
    decoder: nn.Module,
    loss: Callable[[Tensor], Tensor],
    batches: list[Tensor],
    steps: int,
    lr: float,
    progress: Progress = no_bar,
) -> list[float]:
    """Train scales and norm gains of a frozen decoder in place; return the loss of each step.

    Args:
        decoder: its linears are `FrozenLinear`s.
        loss: tokens [b, s] → a scalar, e.g. KL from the BF16 model.
        batches: step i takes batches[i % len].
        steps: of Adam.
        lr: relative change a step; a cosine takes it to 0.
        progress: wraps the loop.
    """
    decoder.requires_grad_(False)
    scaled = _make_scales_trainable(decoder)
    gains = [p.requires_grad_() for name, p in decoder.named_parameters() if name.endswith("norm.scale")]
    optimizer = torch.optim.Adam([*(s.theta for s in scaled.values()), *gains], lr=lr)
    schedule = cosine_schedule(optimizer, steps)
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


def _make_scales_trainable(decoder: nn.Module) -> dict[str, _ScaledLinear]:
    """Put a `_ScaledLinear` in the place of each frozen linear; return them by name."""
    scaled: dict[str, _ScaledLinear] = {}
    for name, linear in quantized_linears(decoder).items():
        assert isinstance(linear, FrozenLinear), f"{name} is not frozen"
        scaled[name] = _ScaledLinear(linear)
        replace(decoder, name, scaled[name])
    return scaled
