"""How far two models' outputs are apart: KL, agreement of the most likely tokens, relative error."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.quant.prepare import quantized_linears

ULP = 2**-23  # of float32: the step from one number to the next, relative to the number
HEAD_CHUNK_TOKENS = 1024  # logits exist for this many positions at a time: 0.5 GB in float32 at Llama 3's vocabulary


def chunks(n: int) -> list[slice]:
    """Return slices of `HEAD_CHUNK_TOKENS` rows that cover n rows; one empty slice if there are none."""
    return [slice(i, i + HEAD_CHUNK_TOKENS) for i in range(0, max(n, 1), HEAD_CHUNK_TOKENS)]


def kl_divergence(target: Tensor, logprobs: Tensor) -> Tensor:
    """Return KL(target ‖ other) of each token, in nats: log-probabilities [..., vocab] of both → [...]."""
    return (target.exp() * (target - logprobs)).sum(-1)


def in_top5(token: Tensor, logits: Tensor) -> Tensor:
    """Tell of each token [n] whether it is among the five with the largest logits [n, vocab]."""
    return (logits > logits.gather(-1, token[:, None])).sum(-1) < 5


def agreement(reference: Tensor, other: Tensor) -> dict[str, float]:
    """Compare logits [n, vocab] with a reference's.

    Returns:
        relative_error (‖difference‖ / ‖reference‖ over all tokens), token_error (the median token's own),
        max_abs_error, sqnr_db (infinite if equal), kl (nats a token), top1 (share of equal argmaxes) and top5 (share of
        the reference's argmaxes among the other's five largest).
    """
    reference, other = reference.double(), other.double()
    error = float((other - reference).norm() / reference.norm())
    by_token = (other - reference).norm(dim=-1) / reference.norm(dim=-1)
    kl = kl_divergence(reference.log_softmax(-1), other.log_softmax(-1)).mean()
    return {
        "relative_error": error,
        "token_error": float(by_token.median()),
        "max_abs_error": float((other - reference).abs().max()),
        "sqnr_db": -20 * math.log10(error) if error else math.inf,
        "kl": max(0.0, float(kl)),  # float64 sums of equal distributions may come out at -1e-17
        "top1": float((reference.argmax(-1) == other.argmax(-1)).double().mean()),
        "top5": float(in_top5(reference.argmax(-1), other).double().mean()),
    }


@contextlib.contextmanager
def perturbed(decoder: nn.Module, seed: int = 0) -> Iterator[None]:
    """Change every linear's output by one float32 ulp, up, down or not at all, as summing in another order does.

    What that does to a model is the floor of every comparison with another implementation of it.
    """
    generator = torch.Generator().manual_seed(seed)

    def perturb(module: Any, inputs: Any, y: Tensor) -> Tensor:
        return y * (1 + ULP * torch.randint(-1, 2, y.shape, generator=generator))

    hooks = [m.register_forward_hook(perturb) for m in quantized_linears(decoder).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
