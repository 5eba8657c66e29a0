"""Where quantization costs: one linear quantized at a time, one left out at a time; and where models part, by block.

The model is the BF16 one rounded to nearest (vanilla PTQ), so what is seen is what training or rotating has to mend.
Two maps, as they can disagree: errors of different linears add up or cancel. *Alone*: KL of the model in which only
this linear is quantized (weights and its input). *Left out*: what is saved if all but this one is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.model.causal_lm import HEAD_CHUNK_TOKENS, CausalLM
from llamaq.runs.tracking import progress

ENDS = "embedding and head"  # one matrix, so one unit
LINEARS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w3", "mlp.w2")


@dataclass
class Sensitivity:
    """KL from the full-precision model in nats a token; units are full names of linears, and `ENDS`."""

    whole: float  # everything quantized
    alone: dict[str, float]
    left_out: dict[str, float]

    def saved(self) -> dict[str, float]:
        """Unit → KL that leaving it in full precision takes away; below 0 where it covers up another's error."""
        return {unit: self.whole - kl for unit, kl in self.left_out.items()}


def units_of(model: CausalLM) -> dict[str, list[Any]]:
    """Unit → its modules, whose `fmt` is the format or, for full precision, None."""
    units: dict[str, list[Any]] = {
        name: [m] for name, m in model.decoder.named_modules() if name.endswith(LINEARS) and hasattr(m, "fmt")
    }
    return units | {ENDS: [model.decoder.tok_embeddings]}  # the tied head reads its embedding's format


@contextmanager
def formats(units: dict[str, list[Any]], quantized: set[str]) -> Iterator[None]:
    """Quantize only these units meanwhile."""
    before = {id(m): m.fmt for modules in units.values() for m in modules}
    try:
        for unit, modules in units.items():
            for m in modules:
                m.fmt = before[id(m)] if unit in quantized else None
        yield
    finally:
        for modules in units.values():
            for m in modules:
                m.fmt = before[id(m)]


@torch.no_grad()
def sensitivity(model: CausalLM, batches: Sequence[Tensor]) -> Sensitivity:
    """Both maps of a model whose weights are latent and not adapted.

    Args:
        model: prepared with the scheme, in eval mode; its formats are switched off and on again.
        batches: tokens, each [b, s], on the model's device.
    """
    units = units_of(model)
    with formats(units, set()):
        reference = [model.hidden(tokens).flatten(0, 1) for tokens in batches]  # [b · s, dim] each

    def kl(quantized: set[str]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        with formats(units, quantized):
            hidden = [model.hidden(tokens).flatten(0, 1) for tokens in batches]
            head = model.head.quantized_weight()
            for h, r in zip(hidden, reference, strict=True):
                for i in range(0, len(h), HEAD_CHUNK_TOKENS):
                    rows = slice(i, i + HEAD_CHUNK_TOKENS)
                    q = model.head(h[rows], head).log_softmax(-1)
                    with formats(units, set()):
                        p = model.head(r[rows]).log_softmax(-1)
                    total += (p.exp() * (p - q)).sum().double().cpu()
        return float(total) / sum(len(r) for r in reference)

    everything, alone, left_out = set(units), {}, {}
    with progress(units, "sensitivity", unit="layer") as bar:
        for unit in bar:
            alone[unit] = kl({unit})
            left_out[unit] = kl(everything - {unit})
    return Sensitivity(kl(everything), alone, left_out)


def advice(s: Sensitivity) -> list[str]:
    """What a user can do about it, most telling first."""
    lines = []
    total = sum(s.alone.values())
    worst = sorted(s.alone, key=s.alone.__getitem__, reverse=True)
    shares = ", ".join(f"`{u}` {100 * s.alone[u] / total:.0f} %" for u in worst[:3])
    lines.append(f"Largest alone: {shares} of the sum over all.")
    by_kind = {kind: sum(v for u, v in s.alone.items() if u.endswith(kind)) / total for kind in LINEARS}
    kind, share = max(by_kind.items(), key=lambda item: item[1])
    even = 1 / len(LINEARS)
    if by_kind["mlp.w2"] > 2 * even:
        lines.append(
            f"`mlp.w2` (down_proj) takes {100 * by_kind['mlp.w2']:.0f} %: its inputs have outliers, which the online "
            "rotation R4 spreads; `tune run spinquant` tries it."
        )
    elif share > 2 * even:
        lines.append(
            f"`{kind}` takes {100 * share:.0f} % over all blocks: rotations R1 and R2 act on it; try spinquant."
        )
    else:
        lines.append(
            "No kind of linear stands out: this is the noise of int4 itself, which training (QAT, LoRA) mends."
        )
    if s.alone[ENDS] > 0.2 * total:
        lines.append(
            f"The int8 embedding and head take {100 * s.alone[ENDS] / total:.0f} %: rows with single large weights; "
            "QAT trains them, rotating (R1) evens them out."
        )
    gap = s.whole / total if total else 1.0
    if not 0.7 <= gap <= 1.4:
        how = "amplify" if gap > 1 else "partly cancel"
        lines.append(f"All together cost {gap:.1f} times the sum of each alone: errors {how} each other on the way.")
    return lines


@torch.no_grad()
def divergence(reference: nn.Module, other: nn.Module, layers: tuple[str, str], tokens: Tensor) -> list[float]:
    """Relative error of the residual stream after each block, ‖difference‖ / ‖reference‖ over tokens [1, s].

    Args:
        reference: called with tokens.
        other: likewise; its blocks may have other names.
        layers: where each keeps its list of blocks, e.g. ("decoder.layers", "layers").
        tokens: on the device of both.
    """
    streams = []
    for model, where in zip((reference, other), layers, strict=True):
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any, seen: list[Tensor] = seen) -> None:
            seen.append((output[0] if isinstance(output, tuple) else output).double())

        hooks = [block.register_forward_hook(keep) for block in model.get_submodule(where).children()]
        model(tokens)
        for hook in hooks:
            hook.remove()
        streams.append(seen)
    return [float((b - a).norm() / a.norm()) for a, b in zip(*streams, strict=True)]


def first_divergence(errors: Sequence[float], limit: float) -> int | None:
    """The first block whose stream is off by more than `limit`, or None."""
    return next((i for i, e in enumerate(errors) if e > limit), None)
