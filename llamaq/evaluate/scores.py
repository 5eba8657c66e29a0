"""Held-out negative log-likelihood, and agreement with a reference model, token by token.

Everything is summed per sample (a conversation, or a window of text), so that differences between models can be
compared sample by sample: the differences are far steadier than the losses themselves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamaq.data.datasets import IGNORE, Batch
from llamaq.model.causal_lm import HEAD_CHUNK_TOKENS, CausalLM
from llamaq.runs.tracking import progress


@dataclass
class Scores:
    """Per-sample sums over labelled tokens, each a float64 tensor [samples].

    nll in nats; kl maps a reference's name to KL(reference ‖ model) in nats, top1 to the count of equal argmaxes, top5
    to how often the reference's argmax is among the model's five most likely tokens.
    """

    tokens: Tensor
    nll: Tensor
    kl: dict[str, Tensor]
    top1: dict[str, Tensor]
    top5: dict[str, Tensor] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Token means: nll, perplexity, kl/REFERENCE, top1/REFERENCE, top5/REFERENCE."""
        n = float(self.tokens.sum())
        nll = float(self.nll.sum()) / n
        result = {"nll": nll, "perplexity": math.exp(nll)}
        for name in self.kl:
            result[f"kl/{name}"] = float(self.kl[name].sum()) / n
            result[f"top1/{name}"] = float(self.top1[name].sum()) / n
            if name in self.top5:
                result[f"top5/{name}"] = float(self.top5[name].sum()) / n
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
    top5 = {name: torch.zeros(len(samples), dtype=torch.float64) for name in references}
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
                    best = target.argmax(-1)
                    _add(top1[name], sample[rows], best == logprobs.argmax(-1))
                    _add(top5[name], sample[rows], in_top5(best, logprobs))
    return Scores(totals["tokens"], totals["nll"], kl, top1, top5)


@torch.no_grad()
def score_file(
    logits_of: Callable[[list[int]], Tensor], references: dict[str, CausalLM], samples: Sequence[Any],
    collate: Callable[[list[Any]], Batch], max_tokens: int, max_length: int, title: str,
) -> Scores:  # fmt: skip
    """Score an exported file as `score` does a model, one sample at a time, up to `max_tokens` tokens read.

    Args:
        logits_of: tokens → logits [len(tokens), vocab].
        references: models to compare with, on the CPU.
        samples: what is read; a longer one than max_length is cut.
        collate: makes a batch of samples; labels in it are shifted.
        max_tokens: stop before the sample that would exceed it; at least one is read.
        max_length: of the file's context.
        title: on the progress bar.
    """
    rows: list[list[float]] = []
    kl, top1, top5 = ({name: [] for name in references} for _ in range(3))
    read = 0
    with progress(samples, f"evaluate {title}", unit="sample") as bar:
        for sample in bar:
            batch = collate([sample])
            tokens, labels = batch["tokens"][:, :max_length], batch["labels"][0, :max_length]
            if rows and read + tokens.shape[1] > max_tokens:
                break
            read += tokens.shape[1]
            scored = labels != IGNORE
            logprobs = logits_of(tokens[0].tolist())[scored].float().log_softmax(-1)
            nll = -logprobs.gather(-1, labels[scored][:, None])
            rows.append([float(scored.sum()), float(nll.double().sum())])
            for name, model in references.items():
                target = model.head(model.hidden(tokens)[0, scored]).float().log_softmax(-1)
                best = target.argmax(-1)
                kl[name].append(float((target.exp() * (target - logprobs)).sum().double()))
                top1[name].append(float((best == logprobs.argmax(-1)).sum()))
                top5[name].append(float(in_top5(best, logprobs).sum()))
    tokens_of, nll_of = torch.tensor(rows, dtype=torch.float64).unbind(1)
    as_tensors = [{k: torch.tensor(v, dtype=torch.float64) for k, v in part.items()} for part in (kl, top1, top5)]
    return Scores(tokens_of, nll_of, *as_tensors)


def in_top5(token: Tensor, logits: Tensor) -> Tensor:
    """Whether each token [n] is among the five with the largest logits [n, vocab]."""
    return (logits > logits.gather(-1, token[:, None])).sum(-1) < 5


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
        max_abs_error, sqnr_db (infinite if equal), kl (nats a token), top1 (share of equal argmaxes) and top5 (share of
        reference's argmaxes among the other's five largest).
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
        "top5": float(in_top5(reference.argmax(-1), other).double().mean()),
    }
