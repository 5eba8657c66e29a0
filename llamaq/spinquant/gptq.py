"""Rounding by GPTQ (https://arxiv.org/abs/2210.17323), layer by layer, on inputs quantized as on the phone.

Column by column, the error of rounding is passed on to the columns not yet rounded, so that what the layer computes
changes least: min tr(Δ H Δᵀ), H the second moments of its input. What is different from the published recipe: inputs
are int8 while H is collected; a group's scales come from its columns as compensated so far (not from stale ones), by a
clip search weighted with H, rounded to bfloat16 before the codes; and optionally the target is what reproduces the
float model's output from the quantized model's input, as in Qronos (https://arxiv.org/abs/2505.11695) and GPTAQ.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.quant.modules import FrozenLinear
from llamaq.quant.prepare import replace
from llamaq.quant.scheme import WeightFormat, choose_scales, dequantize, fake_quantize_activation, quantize

CLIPS = tuple(1.1 - 0.025 * i for i in range(25))  # shares of absmax / 7.5 that the search tries: 1.1 … 0.5
IN_ORDER = (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("attn.output_proj",), ("mlp.w1", "mlp.w3"), ("mlp.w2",))


@dataclass(frozen=True)
class Rounding:
    """How to round; the defaults are ours, `Rounding.published()` is the original's."""

    method: str = "gptq"  # or rtn: each weight to the nearest code
    clip_search: bool = True
    damping: float = 0.01  # added to H's diagonal, as a share of its mean
    fresh_scales: bool = True  # of compensated columns; else 3 of 4 groups take theirs from columns as they were
    quantized_inputs: bool = True  # while H is collected
    correct_mismatch: bool = True

    @classmethod
    def published(cls) -> "Rounding":
        return cls(fresh_scales=False, quantized_inputs=False, correct_mismatch=False)


def search_scales(w: Tensor, importance: Tensor, fmt: WeightFormat, clips: Iterable[float] = CLIPS) -> Tensor:
    """Scales that minimise Σ importance · (w − code · scale)² group by group, over shares of the full range.

    Args:
        w: float32 [out, in].
        importance: [in], not negative.
        fmt: the format; scales are rounded to bfloat16 if it says so.
        clips: the shares.

    Returns:
        float32 [out, in / group_size].
    """
    full = choose_scales(w, fmt)
    best, least = full, torch.full_like(full, torch.inf)
    size = fmt.group_size or w.shape[1]
    for clip in clips:
        scales = full * clip
        scales = scales.bfloat16().float() if fmt.bf16_scales else scales
        error = (w - dequantize(quantize(w, scales, fmt), scales, fmt)).square() * importance
        error = error.unflatten(1, (-1, size)).sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def proxy_loss(w: Tensor, codes: Tensor, scales: Tensor, h: Tensor, fmt: WeightFormat) -> float:
    """tr(Δ H Δᵀ): the mean squared error of the outputs, summed over them."""
    delta = (w - dequantize(codes, scales, fmt)).double()
    return float(((delta @ h.double()) * delta).sum())


def round_to_nearest(w: Tensor, h: Tensor, fmt: WeightFormat, clip_search: bool) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales float32 [out, in / group_size], no error passed on."""
    scales = search_scales(w, h.diagonal(), fmt) if clip_search else choose_scales(w, fmt)
    return quantize(w, scales, fmt), scales


def gptq(w: Tensor, h: Tensor, fmt: WeightFormat, how: Rounding) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales float32 [out, in / group_size] of w, for inputs with second moments h [in, in].

    Never worse than rounding to nearest: where it would be, by `proxy_loss`, that is what comes back.
    """
    nearest = round_to_nearest(w, h, fmt, how.clip_search)
    if how.method == "rtn":
        return nearest
    size = fmt.group_size or w.shape[1]
    work, fixed = w.clone(), w.clone()
    codes = torch.empty_like(w, dtype=torch.int8)
    scales = torch.empty(len(w), w.shape[1] // size, device=w.device)
    u = _inverse_factor(h, how.damping)
    importance = u.diagonal().square().reciprocal()  # what an error costs once later columns have made up for it
    importance = importance if how.fresh_scales else h.diagonal()
    for start in range(0, w.shape[1], size):
        columns = slice(start, start + size)
        group = work[:, columns]
        if not how.fresh_scales and start % 128 == 0:
            fixed = work.clone()  # the original sees its compensation once in 128 columns
        source = group if how.fresh_scales else fixed[:, columns]
        s = search_scales(source, importance[columns], fmt) if how.clip_search else choose_scales(source, fmt)
        scales[:, start // size] = s[:, 0]
        errors = torch.empty_like(group)
        for j in range(size):
            q = (group[:, j] / s[:, 0]).round().clamp(fmt.qmin, fmt.qmax)
            codes[:, start + j] = q.to(torch.int8)
            errors[:, j] = (group[:, j] - q * s[:, 0]) / u[start + j, start + j]
            group[:, j + 1 :] -= errors[:, j : j + 1] * u[start + j, start + j + 1 : start + size]
        work[:, start + size :] -= errors @ u[columns, start + size :]
    ours = (codes, scales)
    return ours if proxy_loss(w, *ours, h, fmt) <= proxy_loss(w, *nearest, h, fmt) else nearest


def _damped(h: Tensor, damping: float) -> Tensor:
    """H in float64 with its diagonal raised; inputs that are always 0 get a diagonal of 1."""
    h = h.double()
    diagonal = h.diagonal()
    raised = diagonal + damping * diagonal.mean().clamp_min(1e-30)
    return h + torch.diag(torch.where(diagonal > 0, raised, 1.0) - diagonal)


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of H⁻¹ = UᵀU, float32; more damping if H is too near to singular."""
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damped(h, damping))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping *= 4


def matching_weight(w: Tensor, h: Tensor, cross: Tensor, damping: float) -> Tensor:
    """The weight that comes closest to W x on the inputs x̂ the quantized model really gets.

    W + W (E[x x̂ᵀ] − E[x̂ x̂ᵀ]) (E[x̂ x̂ᵀ] + λ)⁻¹: least squares with a ridge towards W.

    Args:
        w: [out, in].
        h: E[x̂ x̂ᵀ] [in, in].
        cross: E[x x̂ᵀ] [in, in].
        damping: λ as a share of the mean of H's diagonal.
    """
    change = w.double() @ (cross.double() - h.double())
    factor = torch.linalg.cholesky(_damped(h, damping))
    return (w + torch.cholesky_solve(change.T, factor).T).float()


@dataclass
class LinearReport:
    """How one linear was rounded; losses relative to tr(W H Wᵀ), the size of its outputs."""

    name: str
    nearest: float
    rounded: float


def round_layers(
    student: Any, batches: list[Tensor], fmt: WeightFormat, how: Rounding, teacher: Any, device: Any = "cpu",
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda x: x,
) -> list[LinearReport]:  # fmt: skip
    """Round every linear of a prepared decoder (latent, R4 attached) in place, each on what the rounded part before
    it computes.

    Args:
        student: the decoder; its embedding is used as it is (fake-quantized).
        batches: calibration tokens [b, s].
        fmt: of the linears.
        how: GPTQ's settings.
        teacher: the same rotated decoder in full precision, for `correct_mismatch`.
        device: where to compute, one layer at a time; models and layers' inputs stay where they are.
        progress: wraps the loop over layers.
    """
    x = [student.tok_embeddings(b) for b in batches]
    correct = how.correct_mismatch and how.method == "gptq"
    exact = [teacher.tok_embeddings(b) for b in batches] if correct else []
    home = x[0].device
    reports = []
    for i in progress(range(len(student.layers))):
        layer, exact_layer = student.layers[i].to(device), teacher.layers[i].to(device) if correct else None
        for names in IN_ORDER:
            h, cross = _moments(layer, exact_layer, names[0], x, exact, how.quantized_inputs, device)
            for name in names:
                w = layer.get_submodule(name).weight.detach().float()
                target = w if cross is None else matching_weight(w, h, cross, how.damping)
                codes, scales = gptq(target, h, fmt, how)
                reports.append(_report(f"layers.{i}.{name}", w, h, codes, scales, fmt, how))
                replace(layer, name, FrozenLinear(codes, scales, fmt))
        x = [layer(t.to(device)).to(home) for t in x]
        if exact_layer is not None:
            exact = [exact_layer(t.to(device)).to(home) for t in exact]
            exact_layer.to(home)
        layer.to(home)
    return reports


def _moments(
    layer: nn.Module,
    exact_layer: nn.Module | None,
    name: str,
    x: list[Tensor],
    exact: list[Tensor],
    quantized: bool,
    device: Any,
) -> tuple[Tensor, Tensor | None]:
    """E[x̂ x̂ᵀ] of what a linear reads, and E[x x̂ᵀ] with what it reads in the float model."""
    h, cross, count = 0.0, 0.0, 0
    for i, batch in enumerate(x):
        read = _read_by(layer, name, batch.to(device))
        read = fake_quantize_activation(read) if quantized else read
        h, count = h + read.T @ read, count + len(read)
        if exact_layer is not None:
            cross = cross + _read_by(exact_layer, name, exact[i].to(device)).T @ read
    assert isinstance(h, Tensor)
    return h / count, cross / count if isinstance(cross, Tensor) else None


class _ReadError(Exception):
    """Ends a forward pass once the linear in question has been reached."""


def _read_by(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a linear of the layer reads, [tokens, in]; its own hooks (R4) have run before ours."""
    found: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Tensor]) -> None:
        found.append(arguments[0].flatten(0, -2).float())
        raise _ReadError

    handle = layer.get_submodule(name).register_forward_pre_hook(hook)
    try:
        layer(x)
    except _ReadError:
        pass
    finally:
        handle.remove()
    return found[0]


def _report(
    name: str, w: Tensor, h: Tensor, codes: Tensor, scales: Tensor, fmt: WeightFormat, how: Rounding
) -> LinearReport:
    size = float(((w.double() @ h.double()) * w.double()).sum())
    nearest = round_to_nearest(w, h, fmt, how.clip_search)
    return LinearReport(
        name, proxy_loss(w, *nearest, h, fmt) / size, proxy_loss(w, codes, scales, h, fmt) / size
    )  # fmt: skip
