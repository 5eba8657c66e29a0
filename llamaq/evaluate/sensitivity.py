"""Find where quantization costs: which linear, and after which block two models differ.

The model is the BF16 model rounded to nearest (plain PTQ), so the maps show what training or rotations have to mend.
There are two maps, because errors of different linears can add up or cancel. *Alone* is the KL of a model in which
only this linear is quantized (its weights and its input). *Left out* is the KL that is saved when everything but this
linear is quantized.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import chunks, kl_divergence
from llamaq.model.names import LINEARS
from llamaq.runs.tracking import progress

ENDS = "embedding and head"  # one matrix, so one unit


@dataclass
class Sensitivity:
    """KL from the full-precision model in nats per token; units are full names of linears, and `ENDS`."""

    whole: float  # everything quantized
    alone: dict[str, float]
    left_out: dict[str, float]

    def saved(self) -> dict[str, float]:
        """Return the KL that each unit saves in full precision; below 0 where its error offsets another one."""
        return {unit: self.whole - kl for unit, kl in self.left_out.items()}


def units_of(model: CausalLM) -> dict[str, list[Any]]:
    """Return each unit's modules. Their `fmt` is the integer format they compute in, or None for full precision."""
    units: dict[str, list[Any]] = {
        name: [m] for name, m in model.decoder.named_modules() if name.endswith(LINEARS) and hasattr(m, "fmt")
    }
    ends = [model.decoder.tok_embeddings]  # a tied head reads its embedding's format
    return units | {ENDS: ends if model.head.tied else [*ends, model.head.matrix]}


@contextmanager
def quantize_only(units: dict[str, list[Any]], quantized: set[str]) -> Iterator[None]:
    """Quantize only these units inside the `with` block; the others compute in full precision."""
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
    """Measure both maps of a model that has latent weights and no adapters.

    Args:
        model: prepared with the scheme, in eval mode; its formats are switched off and on again.
        batches: tokens, each [b, s], on the model's device.
    """
    units = units_of(model)
    with quantize_only(units, set()):
        reference = [model.hidden(tokens).flatten(0, 1) for tokens in batches]  # [b · s, dim] each

    def kl(quantized: set[str]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        with quantize_only(units, quantized):
            hidden = [model.hidden(tokens).flatten(0, 1) for tokens in batches]
            head = model.head.quantized_weight()
            for h, exact in zip(hidden, reference, strict=True):
                for rows in chunks(len(h)):
                    logprobs = model.head(h[rows], head).log_softmax(-1)
                    with quantize_only(units, set()):
                        target = model.head(exact[rows]).log_softmax(-1)
                    total += kl_divergence(target, logprobs).sum().double().cpu()
        return float(total) / sum(len(r) for r in reference)

    everything, alone, left_out = set(units), {}, {}
    with progress(units, "sensitivity", unit="layer") as bar:
        for unit in bar:
            alone[unit] = kl({unit})
            left_out[unit] = kl(everything - {unit})
    return Sensitivity(kl(everything), alone, left_out)


# --- what to do about it ---------------------------------------------------------------------------------------------


def advice(s: Sensitivity) -> list[str]:
    """Say in sentences what the maps show and what a user can do about it, the most important first."""
    total = sum(s.alone.values())
    worst = sorted(s.alone, key=s.alone.__getitem__, reverse=True)[:3]
    shares = ", ".join(f"`{u}` {100 * s.alone[u] / total:.0f} %" for u in worst)
    lines = [f"Quantized alone, the costliest are {shares} of the sum over all.", _advice_on_kinds(s, total)]
    if s.alone[ENDS] > 0.2 * total:
        lines.append(
            f"The int8 embedding and head take {100 * s.alone[ENDS] / total:.0f} %: some rows have single large "
            "weights. QAT trains them; the rotation R1 evens them out."
        )
    gap = s.whole / total if total else 1.0
    if not 0.7 <= gap <= 1.4:
        how = "amplify" if gap > 1 else "partly cancel"
        lines.append(f"All together cost {gap:.1f} times the sum of each alone: errors {how} each other.")
    return lines


def _advice_on_kinds(s: Sensitivity, total: float) -> str:
    """Name the kind of linear that takes more than twice its even share over all blocks, if one does."""
    shares = {kind: sum(kl for unit, kl in s.alone.items() if unit.endswith(kind)) / total for kind in LINEARS}
    worst = "mlp.w2" if shares["mlp.w2"] > 2 / len(LINEARS) else max(shares, key=shares.__getitem__)
    if shares[worst] <= 2 / len(LINEARS):
        return (
            "No kind of linear stands out: this is the noise of int4 itself. Training with quantization (QAT, LoRA) "
            "reduces it."
        )
    if worst == "mlp.w2":
        return (
            f"`mlp.w2` (down_proj) takes {100 * shares[worst]:.0f} %: its inputs have outliers. The online rotation R4 "
            "spreads them; try `tune run spinquant`."
        )
    return (
        f"`{worst}` takes {100 * shares[worst]:.0f} % over all blocks. The rotations R1 and R2 act on it; try "
        "`tune run spinquant`."
    )


# --- by block --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def divergence(reference: nn.Module, other: nn.Module, layers: tuple[str, str], tokens: Tensor) -> list[float]:
    """Return the relative error of the residual stream after each block, ‖difference‖ / ‖reference‖ over all tokens.

    Args:
        reference: called with tokens.
        other: called with tokens; its blocks may have other names.
        layers: where each of the two keeps its list of blocks, e.g. ("decoder.layers", "layers").
        tokens: [1, s], on the device of both.
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
    """Return the first block after which the stream is off by more than `limit`, or None."""
    return next((i for i, e in enumerate(errors) if e > limit), None)
