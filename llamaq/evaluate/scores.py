"""Held-out negative log-likelihood, and agreement with a reference model, token by token.

Everything is summed per sample (a conversation, or a window of text), so that differences between models can be
compared sample by sample: the differences are far steadier than the losses themselves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamaq.tracking import progress
from llamaq.train.data import IGNORE, Batch
from llamaq.train.model import HEAD_CHUNK_TOKENS, CausalLM


@dataclass
class Scores:
    """Per-sample sums over labelled tokens, each a float64 tensor [samples].

    nll in nats; kl maps a reference's name to KL(reference ‖ model) in nats, top1 to the count of equal argmaxes.
    """

    tokens: Tensor
    nll: Tensor
    kl: dict[str, Tensor]
    top1: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """Token means: nll, perplexity, kl/REFERENCE, top1/REFERENCE."""
        n = float(self.tokens.sum())
        nll = float(self.nll.sum()) / n
        result = {"nll": nll, "perplexity": math.exp(nll)}
        for name in self.kl:
            result[f"kl/{name}"] = float(self.kl[name].sum()) / n
            result[f"top1/{name}"] = float(self.top1[name].sum()) / n
        return result


@torch.no_grad()
def score(
    model: CausalLM, references: dict[str, CausalLM], samples: Sequence[Any],
    collate: Callable[[list[Any]], Batch], batch_size: int, title: str,
) -> Scores:  # fmt: skip
    """Score `model` on samples, against each reference. Models are in eval mode, float32, on one device."""
    device = next(t.device for t in [*model.parameters(), *model.buffers()])
    totals = {k: torch.zeros(len(samples), dtype=torch.float64) for k in ("tokens", "nll")}
    kl = {name: torch.zeros(len(samples), dtype=torch.float64) for name in references}
    top1 = {name: torch.zeros(len(samples), dtype=torch.float64) for name in references}
    head = model.head.quantized_weight()
    reference_heads = {name: r.head.quantized_weight() for name, r in references.items()}
    with progress(range(0, len(samples), batch_size), f"evaluate {title}", unit="batch") as bar:
        for start in bar:
            batch = collate([samples[i] for i in range(start, min(start + batch_size, len(samples)))])
            batch = {k: v.to(device) for k, v in batch.items()}
            inputs = (batch["tokens"], batch.get("mask"), batch.get("input_pos"))
            scored = batch["labels"] != IGNORE
            sample = (torch.arange(len(scored)) + start)[:, None].expand(scored.shape)[scored.cpu()]
            labels, h = batch["labels"][scored], model.hidden(*inputs)[scored]
            hidden = {name: r.hidden(*inputs)[scored] for name, r in references.items()}
            for i in range(0, len(labels), HEAD_CHUNK_TOKENS):
                rows = slice(i, i + HEAD_CHUNK_TOKENS)
                logprobs = model.head(h[rows], head).float().log_softmax(-1)
                nll = -logprobs.gather(-1, labels[rows, None])[:, 0]
                _add(totals["tokens"], sample[rows], torch.ones_like(nll))
                _add(totals["nll"], sample[rows], nll)
                for name, r in references.items():
                    target = r.head(hidden[name][rows], reference_heads[name]).float().log_softmax(-1)
                    _add(kl[name], sample[rows], (target.exp() * (target - logprobs)).sum(-1))
                    _add(top1[name], sample[rows], target.argmax(-1) == logprobs.argmax(-1))
    return Scores(totals["tokens"], totals["nll"], kl, top1)


def _add(total: Tensor, index: Tensor, values: Tensor) -> None:
    total.index_add_(0, index, values.double().cpu())


def share_of_kl(ptq: Scores, model: Scores, reference: str, seed: int = 0) -> dict[str, float]:
    """1 − KL(reference ‖ model) / KL(reference ‖ PTQ), with a paired 95 % interval, as `share_won_back`."""
    lost, left = ptq.kl[reference], model.kl[reference]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(lost), (2000, len(lost)), generator=generator)
    shares = 1 - left[draws].sum(1) / lost[draws].sum(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"share": 1 - float(left.sum() / lost.sum()), "low": low, "high": high}


def share_won_back(ptq: Scores, model: Scores, control: Scores, seed: int = 0) -> dict[str, float]:
    """(NLL[PTQ(control)] − NLL[model]) / (NLL[PTQ(control)] − NLL[control]), with a paired 95 % interval.

    1 means that all that quantization cost the control is won back; above 1, more. The interval resamples samples
    (2,000 bootstrap draws), taking the three models' values of a sample together.
    """
    lost = ptq.nll - control.nll
    won = ptq.nll - model.nll
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(lost), (2000, len(lost)), generator=generator)
    shares = won[draws].sum(1) / lost[draws].sum(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    n = float(ptq.tokens.sum())
    return {
        "share": float(won.sum() / lost.sum()),
        "low": low,
        "high": high,
        "lost_nats_per_token": float(lost.sum()) / n,
        "won_nats_per_token": float(won.sum()) / n,
    }


def agreement(reference: Tensor, other: Tensor) -> dict[str, float]:
    """How far `other` logits [n, vocab] are from `reference`'s.

    Returns:
        relative_error (‖difference‖ / ‖reference‖ over all tokens), token_error (the median token's own),
        max_abs_error, sqnr_db (infinite if equal), kl (nats a token) and top1 (share of equal argmaxes).
    """
    reference, other = reference.double(), other.double()
    error = float((other - reference).norm() / reference.norm())
    by_token = (other - reference).norm(dim=-1) / reference.norm(dim=-1)
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return {
        "relative_error": error,
        "token_error": float(by_token.median()),
        "max_abs_error": float((other - reference).abs().max()),
        "sqnr_db": -20 * math.log10(error) if error else math.inf,
        "kl": max(0.0, float((p.exp() * (p - q)).sum(-1).mean())),
        "top1": float((reference.argmax(-1) == other.argmax(-1)).double().mean()),
    }
