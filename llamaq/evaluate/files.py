"""Measure exported files: held-out text through a .pte, and how much the forms of one model differ.

The model that ships exists as a fake-quantized model, as a checkpoint of integer codes and as a .pte. All of them
should give the same logits, up to the order in which float32 sums are added.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.evaluate.scores import Collate, score_file, score_model
from llamaq.evaluate.sensitivity import divergence
from llamaq.export.pte import Pte
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import agreement, perturbed
from llamaq.runs.files import sha256_file


def score_pte(
    file: Path,
    own: CausalLM,
    bf16: CausalLM,
    samples: Sequence[Any],
    collate: Collate,
    max_tokens: int,
    batch_size: int,
    name: str,
) -> dict[str, Any]:
    """Score a .pte on held-out text, and on the same text the model it was made from.

    Args:
        file: the .pte.
        own: the model it was made from, as llamaq computes it.
        bf16: the model that the run starts from.
        samples: what to read, up to `max_tokens` tokens.
        collate: makes a batch of samples.
        max_tokens: see `score_file`.
        batch_size: samples in a forward pass of `own`.
        name: of the model.

    Returns:
        The file's means (`Scores.means`, references bf16 and own), eager_nll, samples, tokens, sha256.
    """
    pte = Pte(file)
    references = {"bf16": bf16, "own": own}
    read = score_file(pte.logits, references, samples, collate, max_tokens, pte.max_context_length, f"{name}.pte")
    n = len(read.tokens)
    eager = score_model(own, {}, samples[:n], collate, batch_size, name)
    return read.means() | {
        "eager_nll": eager.means()["nll"],
        "samples": n,
        "tokens": int(read.tokens.sum()),
        "sha256": sha256_file(file),
    }


@torch.no_grad()
def compare_forms(
    bf16: CausalLM, shipped: CausalLM, converted: nn.Module, pte: Path | None, tokens: list[int]
) -> dict[str, Any]:
    """Compare every form of the model that ships with every other, on the logits of one context.

    Args:
        bf16: the model that the run starts from.
        shipped: the fake-quantized model.
        converted: its checkpoint in ExecuTorch's eager model (`llamaq.export.exporter.load_eager`).
        pte: its exported file, if there is one.
        tokens: the context.

    Returns:
        pairs (form → form → `agreement`), blocks (hand-over → relative error of the residual stream after each block)
        and numerics.
    """
    t = torch.tensor([tokens])
    logits = {"bf16": bf16(t)[0], "fake-quantized": shipped(t)[0], "converted": converted(t)[0]}
    if pte is not None:
        logits[".pte"] = Pte(pte).logits(tokens)
    blocks = {
        "BF16 → fake-quantized": divergence(bf16, shipped, ("decoder.layers", "decoder.layers"), t),
        "fake-quantized → converted": divergence(shipped, converted, ("decoder.layers", "layers"), t),
    }
    pairs = {a: {b: agreement(logits[a], logits[b]) for b in logits} for a in logits}
    return {"pairs": pairs, "blocks": blocks, "numerics": numerics(shipped, t)}


@torch.no_grad()
def numerics(model: CausalLM, tokens: Tensor) -> dict[str, dict[str, float]]:
    """Compare a model with itself on tokens [1, s] when only the arithmetic changes.

    Returns:
        Two results of `agreement`. `float32`: every linear's output is perturbed by one float32 ulp (up, down or not
        at all), as summing in another order does; no export can be expected to be closer. `bf16`: under bf16
        autocast, as in training with `dtype=bf16`.
    """
    exact = model(tokens)[0]
    with torch.autocast(tokens.device.type, torch.bfloat16):
        bf16 = model(tokens)[0].float()
    with perturbed(model.decoder):
        float32 = model(tokens)[0]
    return {"float32": agreement(exact, float32), "bf16": agreement(exact, bf16)}
