"""The hand-over to ExecuTorch, held against gates: what was trained → codes → its eager model → .pte.

Whatever leaves the house goes through `export_checked`: the model that ships, and any other of the run that is
measured as a file.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaq.checkpoints.quantized import (
    BACKBONE,
    backbone_hash,
    load_peft,
    model_params,
    save_float,
    save_pth,
    save_quantized,
)
from llamaq.config import Config
from llamaq.data.datasets import build_dataset
from llamaq.errors import UserError
from llamaq.evaluate.scores import agreement
from llamaq.export.exporter import PteOptions, eager_cached_logits, export_pte
from llamaq.export.pte import Pte, check_constants, size_parts
from llamaq.model.causal_lm import CausalLM
from llamaq.quant.prepare import freeze, quantized_linears
from llamaq.runs.run import Run, on_rank_zero, say, sha256_file
from llamaq.train.sft import tokenizer_of

GATE_CONTEXT = 8  # tokens of a short context: long enough for attention to matter, short enough to stay unperturbed


def gate_tokens(run: Run) -> list[int]:
    """Held-out tokens, as many as `export.gate_tokens` says: what the gates are measured on."""
    c = run.config
    samples = build_dataset(c.evaluate.dataset, tokenizer_of(c), "evaluate.dataset")
    wanted = min(c.export.gate_tokens, c.export.max_context_length)
    tokens: list[int] = []
    for i in range(len(samples)):
        tokens += list(samples[i]["tokens"])
        if len(tokens) >= wanted:
            break
    return tokens[:wanted]


def check_gate(run: Run, what: str, result: dict[str, float], *names: str) -> dict[str, float]:
    """Hold a hand-over against the gates named: relative_error, token_error, top1 or kl.

    Raises:
        UserError: it is worse than a gate allows.
    """
    e = run.config.export
    gates = {
        "relative_error": ("export.max_relative_error", e.max_relative_error),
        "token_error": ("export.max_relative_error", e.max_relative_error),
        "kl": ("export.max_kl", e.max_kl),
        "top1": ("export.min_top1_agreement", e.min_top1_agreement),
    }
    say(f"{what}: " + ", ".join(f"{n} {result[n]:.3g}" for n in names))
    for name in names:
        setting, limit = gates[name]
        if not (result[name] >= limit if name == "top1" else result[name] <= limit):
            raise UserError(
                f"gate missed: {what} has {name} {result[name]:.3g}, {setting} is {limit:g}: what would ship is not "
                "what was trained"
            )
    return result


@dataclass
class Expected:
    """Logits a .pte is held against, [tokens, vocab] each: of contexts of a few tokens, and of one long context."""

    short: Tensor
    long: Tensor

    @classmethod
    def of(cls, logits_of: Callable[[list[list[int]]], list[Tensor]], tokens: list[int], context: int) -> "Expected":
        """What `logits_of` (contexts → logits of each) gives for short contexts and for all tokens as one."""
        *short, long = logits_of([*windows_of(tokens, context), tokens])
        return cls(torch.cat(short), long)


def eager_logits(model: CausalLM, contexts: list[list[int]]) -> list[Tensor]:
    """Logits [tokens, vocab] of each context, as llamaq computes them."""
    return [model(torch.tensor([tokens]))[0] for tokens in contexts]


def windows_of(tokens: list[int], context: int) -> list[list[int]]:
    """Cut into contexts of so many tokens; the last may be shorter."""
    return [tokens[i : i + context] for i in range(0, len(tokens), context)]


def pte_gates(
    run: Run, pte: Pte, tokens: list[int], expected: Expected, context: int = GATE_CONTEXT
) -> dict[str, dict[str, float]]:
    """The .pte against the fake-quantized model: on contexts of a few tokens, and on one long context.

    The two compute the same numbers up to the order of float32 sums (2e-7), until an activation falls so close to the
    border between two int8 levels that this order decides: about once in 25 tokens for a 5 M parameter model, in every
    token of a 1B one. That token, and through the KV cache all after it, then differs by one rounding, some 5e-3.
    So short contexts are gated by their median token, which a wrong scale anywhere would move to 1e-2, and the long
    context, which shows that the cache and its positions are right, by its KL. A rotated model's activations are spread
    evenly over the levels, so more of them lie near a border (4 layers: one token in four): its contexts are one token.
    """
    logits = torch.cat([pte.logits(w) for w in windows_of(tokens, context)])
    long = agreement(expected.long, pte.logits(tokens))
    what = f"what was trained → {pte.path.name}"
    return {
        "pte": check_gate(
            run, f"{what}, contexts of {context}", agreement(expected.short, logits), "token_error", "top1"
        ),
        "pte_long": check_gate(run, f"{what}, one context of {len(tokens)}", long, "kl"),
    }


@torch.no_grad()
def export_model(run: Run, name: str, make: Callable[[], CausalLM], inputs: list[Path], context: int) -> Path:
    """A model of the run that does not ship, as `export_NAME/model.pte`, through the same gates.

    Quantized ones as what ships is; one in full precision in `export.baseline_dtype`, whose rounding is reported, not
    gated.
    """
    c = run.config

    def build(folder: Path) -> dict[str, Any]:
        model, checkpoint = make(), folder / "model"
        if next(iter(quantized_linears(model.decoder).values())).fmt is None:
            save_float(checkpoint, model.decoder.state_dict(), model_params(model.decoder))
        else:
            save_quantized(checkpoint, freeze(copy.deepcopy(model.decoder)), run.scheme)
        del model
        result = export_checked(run, checkpoint, folder / "model.pte", make, context)
        shutil.rmtree(checkpoint)  # all of it is in the .pte
        return result

    settings = {"export": c.export, "tokenizer": c.tokenizer, "model": c.model} | gate_settings(run)
    return run.stage(f"export_{name}", on_rank_zero(build), settings, inputs)


def export_checked(
    run: Run, checkpoint: Path, pte_file: Path, make: Callable[[], CausalLM], context: int,
    methods: dict[str, Path] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Export a checkpoint; hold its constants and its logits against what they should be.

    Args:
        run: the run.
        checkpoint: in Meta's layout.
        pte_file: to write.
        make: builds the same model as llamaq computes it; it is gone from memory when the export begins.
        context: tokens in a short context of the gates.
        methods: checkpoints of further methods.

    Returns:
        hand_overs, constants (how many tensors were found in the file bit for bit), bytes, parts, sha256, metadata.
    """
    e, tokenizer, tokens = run.config.export, tokenizer_of(run.config), gate_tokens(run)
    quantized = "quantization_args" in json.loads((checkpoint / "params.json").read_text())
    options = options_of(run.config) if quantized else replace(options_of(run.config), dtype=e.baseline_dtype)
    trained = Expected.of(partial(eager_logits, make().eval()), tokens, context)
    say(f"exporting {pte_file} with ExecuTorch (up to a minute for a tiny model, 10 for 1B) …")
    metadata = {"get_bos_id": tokenizer.bos_id, "get_eos_ids": list(tokenizer.stop_tokens)}
    export_pte(checkpoint, pte_file, e.max_seq_length, e.max_context_length, metadata, options, methods)
    pte = Pte(pte_file)
    result: dict[str, Any] = {
        "bytes": pte_file.stat().st_size, "sha256": sha256_file(pte_file), "metadata": metadata,
    }  # fmt: skip
    if not quantized:
        floats = agreement(trained.long, pte.logits(tokens))
        say(f"float32 → {pte_file.parent.name} in {e.baseline_dtype}: KL {floats['kl']:.3g}, top1 {floats['top1']:.3g}")
        return result | {"hand_overs": {"pte_float": floats}}
    result["constants"] = check_constants(checkpoint, pte_file)
    say(f"{pte_file.name} holds all {result['constants']} tensors of the checkpoint bit for bit")
    gated = trained
    if e.quantize_kv_cache:  # the file is held against the same cache; what the cache itself costs is said, not gated
        gated = Expected.of(lambda contexts: eager_cached_logits(checkpoint, contexts, options), tokens, context)
    hand_overs = pte_gates(run, pte, tokens, gated, context)
    if e.quantize_kv_cache:
        hand_overs["kv_cache"] = agreement(trained.long, pte.logits(tokens))
    return result | {"hand_overs": hand_overs, "parts": size_parts(checkpoint, pte_file)}


def options_of(c: Config) -> PteOptions:
    """The run's choices for a quantized .pte."""
    e = c.export
    return PteOptions(e.quantize_kv_cache, e.dynamic_shape, e.full_logits)


def with_adapters(checkpoint: Path, adapter: Path, folder: Path) -> Path:
    """A checkpoint's codes with the adapters of a PEFT folder, written to `folder`.

    Raises:
        UserError: the adapters do not fit, or were trained on another backbone.
    """
    backbone = json.loads((adapter / BACKBONE).read_text())["sha256"] if (adapter / BACKBONE).is_file() else None
    if backbone is not None and backbone != backbone_hash(checkpoint):
        raise UserError(f"{adapter} was trained on another quantized backbone than {checkpoint}: it would not fit")
    tensors = torch.load(checkpoint / "consolidated.00.pth", weights_only=True)
    params = json.loads((checkpoint / "params.json").read_text())
    tensors |= load_peft(adapter, params, tensors)
    folder.mkdir(parents=True)
    save_pth(folder / "consolidated.00.pth", tensors)
    shutil.copyfile(checkpoint / "params.json", folder / "params.json")
    return folder


def check_method(run: Run, checkpoint: Path, pte_file: Path, name: str, context: int) -> dict[str, float]:
    """A further method of a .pte against ExecuTorch's eager model of its checkpoint."""
    windows = windows_of(gate_tokens(run), context)
    pte = Pte(pte_file, name)
    expected = torch.cat(eager_cached_logits(checkpoint, windows, options_of(run.config)))
    result = agreement(expected, torch.cat([pte.logits(w) for w in windows]))
    return check_gate(run, f"adapters {name} → method {name}", result, "token_error", "top1")


def gate_settings(run: Run) -> dict[str, Any]:
    e = run.config.export
    return {
        "gates": [e.gate_tokens, e.max_relative_error, e.min_top1_agreement, e.max_kl],
        "heldout": run.config.evaluate.dataset,
    }


def copy_tokenizer(c: Config, folder: Path) -> None:
    for key in ("path", "special_tokens_path"):
        if c.tokenizer.get(key):
            name = "tokenizer.model" if key == "path" else Path(c.tokenizer[key]).name
            shutil.copyfile(c.tokenizer[key], folder / name)
