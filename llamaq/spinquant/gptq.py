"""Rounding by GPTQ (https://arxiv.org/abs/2210.17323), layer by layer, on inputs quantized as on the phone.

Column by column, the error of rounding is passed on to the columns not yet rounded, so that what the layer computes
changes least: min tr(Δ H Δᵀ), Δ the change of the weight and H the second moments of its input.

For example, take a weight (0.4, 0.4), integer codes, and two inputs that are always equal. Rounding to nearest gives
(0, 0), and the output of x = (1, 1) falls from 0.8 to 0. GPTQ rounds the first weight to 0, adds its error of 0.4 to
the second, and rounds 0.8 to 1: the output is 1.

What is different from the published recipe:

- Inputs are int8 while H is collected.
- A group's scales come from its columns as compensated so far, not from stale ones.
- Scales are found by a clip search weighted with H, and rounded to bfloat16 before the codes.
- Optionally, the target is what reproduces the float model's output from the quantized model's input, as in Qronos
  (https://arxiv.org/abs/2505.11695) and GPTAQ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.config import SpinQuantConfig
from llamaq.model.names import SAME_INPUT
from llamaq.quant.modules import FrozenLinear
from llamaq.quant.prepare import replace
from llamaq.quant.scheme import WeightFormat, choose_scales, dequantize, fake_quantize_activation, quantize
from llamaq.spinquant.loops import Progress, no_bar

CLIPS = tuple(1.1 - 0.025 * i for i in range(25))  # shares of absmax / 7.5 that the search tries: 1.1 … 0.5
_STALE_COLUMNS = 128  # the original sees its compensation once in so many columns


@dataclass(frozen=True)
class Rounding:
    """Settings of the rounding; the defaults are the config's, `Rounding.published()` is the original's."""

    method: str = SpinQuantConfig.rounding  # gptq, or rtn: each weight to the nearest code
    clip_search: bool = True
    damping: float = SpinQuantConfig.damping  # added to H's diagonal, as a share of its mean
    fresh_scales: bool = True  # of compensated columns; else 3 of 4 groups take theirs from columns as they were
    quantized_inputs: bool = True  # while H is collected
    correct_mismatch: bool = SpinQuantConfig.correct_mismatch

    @classmethod
    def of(cls, s: SpinQuantConfig) -> "Rounding":
        """Return the rounding that a config asks for."""
        return cls(method=s.rounding, damping=s.damping, correct_mismatch=s.correct_mismatch)

    @classmethod
    def published(cls) -> "Rounding":
        """Return the rounding of the published recipe."""
        return cls(damping=0.01, fresh_scales=False, quantized_inputs=False, correct_mismatch=False)


@dataclass
class LinearReport:
    """The losses of one linear, rounded to nearest and as it was rounded, relative to the size of its outputs.

    The size is tr(W H Wᵀ), so 0.01 is an error of 1 % in the mean square.
    """

    name: str
    nearest: float
    rounded: float


def search_scales(w: Tensor, importance: Tensor, fmt: WeightFormat, clips: Iterable[float] = CLIPS) -> Tensor:
    """Return the scales that minimize Σ importance · (w − code · scale)² group by group, among shares of the full one.

    Args:
        w: float32 [out, in].
        importance: [in], not negative.
        fmt: the format; scales are rounded to bfloat16 if it says so.
        clips: the shares.

    Returns:
        float32 [out, in / group_size].
    """
    full = choose_scales(w, fmt)  # [out, in / group_size]
    best, least = full, torch.full_like(full, torch.inf)
    size = fmt.group_size or w.shape[1]
    for clip in clips:
        scales = full * clip
        scales = scales.bfloat16().float() if fmt.bf16_scales else scales
        error = (w - dequantize(quantize(w, scales, fmt), scales, fmt)).square() * importance  # [out, in]
        error = error.unflatten(1, (-1, size)).sum(-1)  # [out, in / group_size]
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def proxy_loss(w: Tensor, codes: Tensor, scales: Tensor, h: Tensor, fmt: WeightFormat) -> float:
    """Return tr(Δ H Δᵀ): the mean squared error of the outputs, summed over them."""
    delta = (w - dequantize(codes, scales, fmt)).double()
    return float(((delta @ h.double()) * delta).sum())


def round_to_nearest(w: Tensor, h: Tensor, fmt: WeightFormat, clip_search: bool) -> tuple[Tensor, Tensor]:
    """Return codes int8 [out, in] and scales float32 [out, in / group_size]; no error is passed on."""
    scales = search_scales(w, h.diagonal(), fmt) if clip_search else choose_scales(w, fmt)
    return quantize(w, scales, fmt), scales


def gptq(w: Tensor, h: Tensor, fmt: WeightFormat, how: Rounding) -> tuple[Tensor, Tensor]:
    """Return codes int8 [out, in] and scales float32 [out, in / group_size], for inputs with second moments h [in, in].

    Never worse than rounding to nearest: where it would be, by `proxy_loss`, that is what comes back.
    """
    nearest = round_to_nearest(w, h, fmt, how.clip_search)
    if how.method == "rtn":
        return nearest
    ours = _pass_errors_on(w, h, fmt, how)
    return ours if proxy_loss(w, *ours, h, fmt) <= proxy_loss(w, *nearest, h, fmt) else nearest


def _pass_errors_on(w: Tensor, h: Tensor, fmt: WeightFormat, how: Rounding) -> tuple[Tensor, Tensor]:
    """Round column by column; after each, change the columns to its right so that they make up for its error.

    With H⁻¹ = Uᵀ U, U upper triangular, the best change of the columns k > j for an error δ of column j is
    −δ · U[j, k] / U[j, j], and what remains costs δ² / U[j, j]². U stays right for the columns that are left, so one
    factorization serves all of them.
    """
    size = fmt.group_size or w.shape[1]
    work, stale = w.clone(), w.clone()
    codes = torch.empty_like(w, dtype=torch.int8)
    scales = torch.empty(len(w), w.shape[1] // size, device=w.device)
    u = _inverse_factor(h, how.damping)  # [in, in]
    # what an error costs once later columns have made up for it; for stale scales, what it costs by itself
    importance = u.diagonal().square().reciprocal() if how.fresh_scales else h.diagonal()
    for start in range(0, w.shape[1], size):
        columns = slice(start, start + size)
        group = work[:, columns]  # [out, size], a view: compensated in place
        if not how.fresh_scales and start % _STALE_COLUMNS == 0:
            stale = work.clone()
        source = group if how.fresh_scales else stale[:, columns]
        found = search_scales(source, importance[columns], fmt) if how.clip_search else choose_scales(source, fmt)
        s = found[:, 0]  # [out]
        scales[:, start // size] = s
        errors = torch.empty_like(group)  # δ / U[j, j] of each column
        for j in range(size):
            q = (group[:, j] / s).round().clamp(fmt.qmin, fmt.qmax)
            codes[:, start + j] = q.to(torch.int8)
            errors[:, j] = (group[:, j] - q * s) / u[start + j, start + j]
            group[:, j + 1 :] -= errors[:, j : j + 1] * u[start + j, start + j + 1 : start + size]
        # columns of later groups wait for the whole group: one matmul instead of many narrow updates
        work[:, start + size :] -= errors @ u[columns, start + size :]
    return codes, scales


def _damped(h: Tensor, damping: float) -> Tensor:
    """Return H in float64 with its diagonal raised; inputs that are always 0 get a diagonal of 1."""
    h = h.double()
    diagonal = h.diagonal()
    raised = diagonal + damping * diagonal.mean().clamp_min(1e-30)
    return h + torch.diag(torch.where(diagonal > 0, raised, 1.0) - diagonal)


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor U of H⁻¹ = UᵀU, float32; more damping if H is too near to singular."""
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damped(h, damping))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping *= 4


def matching_weight(w: Tensor, h: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Return the weight that comes closest to W x on the inputs x̂ that the quantized model really gets.

    Least squares with a ridge towards W: min over V of E‖V x̂ − W x‖² + λ ‖V − W‖², which gives

        V = W + W (E[x x̂ᵀ] − E[x̂ x̂ᵀ]) (E[x̂ x̂ᵀ] + λ)⁻¹

    For inputs that come out 10 % too small, x̂ = 0.9 x and λ = 0, it is W + W (0.9 − 0.81) / 0.81 = W / 0.9.

    Args:
        w: [out, in].
        h: E[x̂ x̂ᵀ] [in, in].
        cross: E[x x̂ᵀ] [in, in].
        damping: λ as a share of the mean of H's diagonal.
    """
    change = w.double() @ (cross.double() - h.double())  # [out, in]
    factor = torch.linalg.cholesky(_damped(h, damping))
    return (w + torch.cholesky_solve(change.T, factor).T).float()


def round_layers(
    student: Any,
    batches: list[Tensor],
    fmt: WeightFormat,
    how: Rounding,
    teacher: Any,
    device: Any = "cpu",
    progress: Progress = no_bar,
) -> list[LinearReport]:
    """Round every linear of a prepared decoder in place, each on what the rounded part before it computes.

    Args:
        student: the decoder, latent, with R4 attached; its embedding is used as it is (fake-quantized).
        batches: calibration tokens [b, s].
        fmt: of the linears.
        how: GPTQ's settings.
        teacher: the same rotated decoder in full precision, for `correct_mismatch`.
        device: where to compute, one layer at a time; models and layers' inputs stay where they are.
        progress: wraps the loop over layers.
    """
    correct = how.correct_mismatch and how.method == "gptq"
    x = [student.tok_embeddings(b) for b in batches]  # [b, s, dim] each: what the layer reads
    exact = [teacher.tok_embeddings(b) for b in batches] if correct else []  # what it reads in the float model
    home = x[0].device
    reports = []
    for i in progress(range(len(student.layers))):
        layer, exact_layer = student.layers[i].to(device), teacher.layers[i].to(device) if correct else None
        for names in SAME_INPUT:  # in the order they compute: those before are rounded already
            h, cross = _moments(layer, exact_layer, names[0], x, exact, how.quantized_inputs, device)
            for name in names:
                linear = layer.get_submodule(name)
                w = linear.weight.detach().float()
                target = w if cross is None else matching_weight(w, h, cross, how.damping)
                codes, scales = gptq(target, h, fmt, how)
                reports.append(_report(f"layers.{i}.{name}", w, h, codes, scales, fmt, how))
                replace(layer, name, FrozenLinear(codes, scales, fmt, linear.bias))
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
    """Return E[x̂ x̂ᵀ] of what a linear reads, and E[x x̂ᵀ] with what it reads in the float model; [in, in] both."""
    h, cross, count = 0.0, 0.0, 0
    for i, batch in enumerate(x):
        read = _read_by(layer, name, batch.to(device))  # [t, in]
        read = fake_quantize_activation(read) if quantized else read
        h, count = h + read.T @ read, count + len(read)
        if exact_layer is not None:
            cross = cross + _read_by(exact_layer, name, exact[i].to(device)).T @ read
    assert isinstance(h, Tensor)
    return h / count, cross / count if isinstance(cross, Tensor) else None


class _ReachedError(Exception):
    """Ends a forward pass once the linear in question has been reached."""


def _read_by(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return what a linear of the layer reads, [tokens, in]; its own hooks (R4) have run before ours."""
    found: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Tensor]) -> None:
        found.append(arguments[0].flatten(0, -2).float())
        raise _ReachedError

    handle = layer.get_submodule(name).register_forward_pre_hook(hook)
    try:
        layer(x)
    except _ReachedError:
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
        name,
        nearest=proxy_loss(w, *nearest, h, fmt) / size,
        rounded=proxy_loss(w, codes, scales, h, fmt) / size,
    )
