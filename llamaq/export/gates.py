"""The gates of the hand-over: what was trained → codes → ExecuTorch's eager model → .pte.

A gate compares two forms of one model on held-out tokens and stops the run where they differ by more than the `export`
section allows. `export_checked` is the one way to a .pte: it exports, looks every tensor of the checkpoint up in the
file, and holds the file's logits against the gates.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaq.checkpoints.meta import PARAMS
from llamaq.config import Config, ExportConfig
from llamaq.data.datasets import build_dataset, cache_of
from llamaq.data.tokenizer import tokenizer_of
from llamaq.errors import UserError
from llamaq.export.exporter import eager_cached_logits, export_pte
from llamaq.export.pte import Pte, check_constants, size_parts
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import agreement, perturbed
from llamaq.runs.files import sha256_file
from llamaq.runs.ranks import say
from llamaq.runs.tracking import progress

GATE_CONTEXT = 8  # tokens of a short context: long enough for attention to matter, short enough to stay unperturbed

# what a stage that checks gates reads of the config
GATES = (
    "model",
    "tokenizer",
    "evaluate.dataset",
    "export.gate_tokens",
    "export.max_context_length",
    "export.max_relative_error",
    "export.min_top1_agreement",
    "export.max_kl",
    "export.noise_factor",
)
# what a stage that exports a .pte reads besides
FILE = ("export.max_seq_length", "export.quantize_kv_cache", "export.dynamic_shape", "export.full_logits")


def gate_tokens(c: Config) -> list[int]:
    """Return the held-out tokens that gates are measured on, as many as `export.gate_tokens` says."""
    samples = build_dataset(c.evaluate.dataset, tokenizer_of(c), "evaluate.dataset", cache_of(c))
    wanted = min(c.export.gate_tokens, c.export.max_context_length)
    tokens: list[int] = []
    for i in range(len(samples)):
        tokens += map(int, samples[i]["tokens"])
        if len(tokens) >= wanted:
            break
    return tokens[:wanted]


def runner_constants(tokenizer: Any) -> dict[str, Any]:
    """Return what a .pte tells ExecuTorch's runner. Without get_bos_id it takes the tokenizer's own, or none."""
    bos = {} if tokenizer.bos_id is None else {"get_bos_id": tokenizer.bos_id}
    return bos | {"get_eos_ids": list(tokenizer.stop_tokens)}


def check_gate(
    limits: ExportConfig, what: str, result: dict[str, float], *names: str, noise: dict[str, float] | None = None
) -> dict[str, float]:
    """Hold a comparison against the gates named (relative_error, token_error, top1 or kl), and return it.

    Args:
        limits: the gates.
        what: is compared, for the reader.
        result: of `agreement`.
        names: of the gates.
        noise: the same comparison of a model with itself, perturbed by last places; `export.noise_factor` times that
            much always passes.

    Raises:
        UserError: it is worse than a gate allows.
    """
    gates = {
        "relative_error": ("export.max_relative_error", limits.max_relative_error),
        "token_error": ("export.max_relative_error", limits.max_relative_error),
        "kl": ("export.max_kl", limits.max_kl),
        "top1": ("export.min_top1_agreement", limits.min_top1_agreement),
    }
    floor = ", ".join(f"{n} {noise[n]:.3g}" for n in names) if noise else ""
    say(f"{what}: " + ", ".join(f"{n} {result[n]:.3g}" for n in names) + f" (rounding alone: {floor})" * bool(floor))
    for name in names:
        setting, limit = gates[name]
        allowed = _distance(name, limit)
        if noise:
            allowed = max(allowed, limits.noise_factor * _distance(name, noise[name]))
        if not _distance(name, result[name]) <= allowed:  # nor if it is NaN
            above = f" and rounding alone gives {noise[name]:.3g}" if noise else ""
            raise UserError(
                f"gate missed: {what} has {name} {result[name]:.3g}, {setting} is {limit:g}{above}: what would ship is "
                "not what was trained"
            )
    return result


def _distance(name: str, value: float) -> float:
    """Return how far a value is from that of equal logits."""
    return 1 - value if name == "top1" else value


@dataclass
class Expected:
    """Logits that a .pte is held against, [tokens, vocab] each: of short contexts, and of one long context."""

    short: Tensor
    long: Tensor

    @classmethod
    def of(cls, logits_of: Callable[[list[list[int]]], list[Tensor]], tokens: list[int], context: int) -> "Expected":
        """Compute them with `logits_of` (contexts → logits of each), for short contexts and for all tokens as one."""
        *short, long = logits_of([*windows_of(tokens, context), tokens])
        return cls(torch.cat(short), long)


def eager_logits(model: CausalLM, contexts: list[list[int]]) -> list[Tensor]:
    """Compute the logits [tokens, vocab] of each context with llamaq's own model."""
    shown = progress(contexts, "gate: the trained model", unit="context")
    return [model(torch.tensor([tokens]))[0] for tokens in shown]


def pte_logits(pte: Pte, contexts: list[list[int]]) -> Tensor:
    """Compute the logits of all contexts, one after the other, with an exported file: [tokens, vocab]."""
    return torch.cat([pte.logits(tokens) for tokens in progress(contexts, f"gate: {pte.path.name}", unit="context")])


def windows_of(tokens: list[int], context: int) -> list[list[int]]:
    """Cut tokens into contexts of so many; the last may be shorter."""
    return [tokens[i : i + context] for i in range(0, len(tokens), context)]


def rounding_noise(model: CausalLM, trained: Expected, tokens: list[int], context: int) -> dict[str, dict[str, float]]:
    """Compare a model with itself as a .pte is compared with it, perturbed by one float32 ulp in every linear."""
    with perturbed(model.decoder):
        other = Expected.of(partial(eager_logits, model), tokens, context)
    return {"pte": agreement(trained.short, other.short), "pte_long": agreement(trained.long, other.long)}


def pte_gates(
    limits: ExportConfig,
    pte: Pte,
    tokens: list[int],
    expected: Expected,
    noise: dict[str, dict[str, float]],
    context: int = GATE_CONTEXT,
) -> dict[str, dict[str, float]]:
    """Hold a .pte against the fake-quantized model, on short contexts and on one long context.

    The two compute the same numbers up to the order of float32 sums (2e-7), until an activation falls so close to the
    border between two int8 levels that this order decides: about once in 25 tokens for a 5 M parameter model, in every
    token of a 1B one. That token, and through the KV cache all after it, then differs by one rounding, some 5e-3.

    So short contexts are gated by their median token, which a wrong scale anywhere would move to 1e-2. The long
    context is gated by its KL; it shows that the cache and its positions are right. A rotated model's activations are
    spread evenly over the levels, so more of them lie near a border (4 layers: one token in four): its short contexts
    are single tokens.

    With 30 layers rounding decides some level of every token. The error then is as large for one ulp as for four, and
    `noise` says how large; what is three times as far is something else than rounding.
    """
    logits = pte_logits(pte, windows_of(tokens, context))
    short, long = agreement(expected.short, logits), agreement(expected.long, pte.logits(tokens))
    what = f"what was trained → {pte.path.name}"
    return {
        "pte": check_gate(limits, f"{what}, contexts of {context}", short, "token_error", "top1", noise=noise["pte"]),
        "pte_long": check_gate(limits, f"{what}, one context of {len(tokens)}", long, "kl", noise=noise["pte_long"]),
    }


def export_checked(
    c: Config,
    checkpoint: Path,
    pte_file: Path,
    make: Callable[[], CausalLM],
    context: int,
    methods: dict[str, Path] | None = None,
) -> dict[str, Any]:
    """Export a checkpoint, and hold the file's constants and logits against what they should be.

    Args:
        c: settings: `GATES` and `FILE`, and `export.baseline_dtype` for a checkpoint in full precision.
        checkpoint: in Meta's layout.
        pte_file: to write.
        make: builds the same model as llamaq computes it; it is gone from memory when the export begins.
        context: tokens in a short context of the gates.
        methods: checkpoints of further methods.

    Returns:
        hand_overs, noise (what rounding alone does, by hand-over), constants (how many tensors were found in the file
        bit for bit), bytes, parts, sha256, metadata.
    """
    tokenizer, tokens = tokenizer_of(c), gate_tokens(c)
    quantized = "quantization_args" in json.loads((checkpoint / PARAMS).read_text())
    model = make().eval()
    trained = Expected.of(partial(eager_logits, model), tokens, context)
    noise = rounding_noise(model, trained, tokens, context) if quantized else {}
    del model
    say(f"exporting {pte_file} with ExecuTorch (up to a minute for a tiny model, 10 for 1B) …")
    metadata = runner_constants(tokenizer)
    dtype = "fp32" if quantized else c.export.baseline_dtype
    export_pte(checkpoint, pte_file, c.export, metadata, dtype, methods)
    pte = Pte(pte_file)
    result: dict[str, Any] = {"bytes": pte_file.stat().st_size, "sha256": sha256_file(pte_file), "metadata": metadata}
    if not quantized:  # its rounding to bf16 is reported, not gated
        floats = agreement(trained.long, pte.logits(tokens))
        say(f"float32 → {pte_file.parent.name} in {dtype}: KL {floats['kl']:.3g}, top1 {floats['top1']:.3g}")
        return result | {"hand_overs": {"pte_float": floats}}
    result["constants"] = check_constants(checkpoint, pte_file)
    say(f"{pte_file.name} holds all {result['constants']} tensors of the checkpoint bit for bit")
    hand_overs = _gate_quantized(c, checkpoint, pte, tokens, trained, noise, context)
    return result | {"hand_overs": hand_overs, "noise": noise, "parts": size_parts(checkpoint, pte_file)}


def _gate_quantized(
    c: Config,
    checkpoint: Path,
    pte: Pte,
    tokens: list[int],
    trained: Expected,
    noise: dict[str, dict[str, float]],
    context: int,
) -> dict[str, dict[str, float]]:
    """Gate a quantized file; one with an int8 KV cache is held against the same cache, whose own cost is reported."""
    if not c.export.quantize_kv_cache:
        return pte_gates(c.export, pte, tokens, trained, noise, context)
    same_cache = Expected.of(lambda contexts: eager_cached_logits(checkpoint, contexts, c.export), tokens, context)
    hand_overs = pte_gates(c.export, pte, tokens, same_cache, noise, context)
    return hand_overs | {"kv_cache": agreement(trained.long, pte.logits(tokens))}


def check_method(
    c: Config, checkpoint: Path, pte_file: Path, name: str, noise: dict[str, float], context: int
) -> dict[str, float]:
    """Hold a further method of a .pte against ExecuTorch's eager model of its checkpoint.

    `noise` is that of the method `forward`; see `rounding_noise`.
    """
    windows, pte = windows_of(gate_tokens(c), context), Pte(pte_file, name)
    expected = torch.cat(eager_cached_logits(checkpoint, windows, c.export))
    result = agreement(expected, pte_logits(pte, windows))
    return check_gate(c.export, f"adapters {name} → method {name}", result, "token_error", "top1", noise=noise)
