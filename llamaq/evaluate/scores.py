"""Scores on held-out text: negative log-likelihood, and agreement with reference models, token by token.

Everything is summed per sample (a conversation, or a window of text), so that models can be compared sample by sample.
Such paired differences vary much less than the losses themselves, which is what makes the intervals of `share_of_kl`
and `share_won_back` narrow.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamaq.data.batches import IGNORE, Batch
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import chunks, in_top5, kl_divergence
from llamaq.runs.tracking import progress

BOOTSTRAP_DRAWS = 2000

Collate = Callable[[list[Any]], Batch]


@dataclass
class Scores:
    """Per-sample sums over labelled tokens, each a float64 tensor [samples] on the CPU.

    nll is in nats. kl maps a reference's name to KL(reference ‖ model) in nats, top1 to the count of equal argmaxes,
    top5 to how often the reference's argmax is among the model's five most likely tokens.
    """

    tokens: Tensor
    nll: Tensor
    kl: dict[str, Tensor]
    top1: dict[str, Tensor]
    top5: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, samples: int, references: Sequence[str]) -> "Scores":
        """Return scores of so many samples, to be filled by `add_tokens` and `add_reference`."""
        tokens, nll = torch.zeros(2, samples, dtype=torch.float64)
        by_reference = [{name: torch.zeros_like(nll) for name in references} for _ in range(3)]
        return cls(tokens, nll, *by_reference)

    def add_tokens(self, sample: Tensor, labels: Tensor, logprobs: Tensor) -> None:
        """Add tokens with their samples [n], labels [n] and log-probabilities [n, vocab] under the model."""
        nll = -logprobs.gather(-1, labels[:, None])[:, 0]
        _add(self.tokens, sample, torch.ones_like(nll))
        _add(self.nll, sample, nll)

    def add_reference(self, name: str, sample: Tensor, target: Tensor, logprobs: Tensor) -> None:
        """Add the comparison of the same tokens with a reference's log-probabilities `target` [n, vocab]."""
        best = target.argmax(-1)
        _add(self.kl[name], sample, kl_divergence(target, logprobs))
        _add(self.top1[name], sample, best == logprobs.argmax(-1))
        _add(self.top5[name], sample, in_top5(best, logprobs))

    def first(self, samples: int) -> "Scores":
        """Return the scores of the first so many samples."""
        by_reference = [{k: v[:samples] for k, v in part.items()} for part in (self.kl, self.top1, self.top5)]
        return Scores(self.tokens[:samples], self.nll[:samples], *by_reference)

    def means(self) -> dict[str, float]:
        """Return means over tokens: nll, perplexity, kl/REFERENCE, top1/REFERENCE, top5/REFERENCE."""
        n = float(self.tokens.sum())
        nll = float(self.nll.sum()) / n
        result = {"nll": nll, "perplexity": math.exp(nll)}
        for name in self.kl:
            result[f"kl/{name}"] = float(self.kl[name].sum()) / n
            result[f"top1/{name}"] = float(self.top1[name].sum()) / n
            if name in self.top5:
                result[f"top5/{name}"] = float(self.top5[name].sum()) / n
        return result


def _add(total: Tensor, sample: Tensor, values: Tensor) -> None:
    total.index_add_(0, sample, values.double().cpu())


@torch.no_grad()
def score_model(
    model: CausalLM,
    references: Mapping[str, CausalLM],
    samples: Sequence[Any],
    collate: Collate,
    batch_size: int,
    title: str,
) -> Scores:
    """Score a model on samples, against each reference.

    Args:
        model: in eval mode, float32.
        references: the models to compare with, in eval mode, float32, on the model's device.
        samples: of a dataset, with `tokens` and `labels`.
        collate: makes a batch of samples, with shifted labels.
        batch_size: samples in a forward pass.
        title: on the progress bar.
    """
    device = next(t.device for t in [*model.parameters(), *model.buffers()])
    scores = Scores.zeros(len(samples), list(references))
    head = model.head.quantized_weight()
    reference_heads = {name: r.head.quantized_weight() for name, r in references.items()}
    with progress(range(0, len(samples), batch_size), f"evaluate {title}", unit="batch") as bar:
        for start in bar:
            batch = {k: v.to(device) for k, v in collate(list(samples[start : start + batch_size])).items()}
            inputs = (batch["tokens"], batch.get("mask"), batch.get("input_pos"))
            scored = batch["labels"] != IGNORE
            sample = (torch.arange(len(scored)) + start)[:, None].expand(scored.shape)[scored.cpu()]  # [n]
            labels, h = batch["labels"][scored], model.hidden(*inputs)[scored]  # [n], [n, dim]
            hidden = {name: r.hidden(*inputs)[scored] for name, r in references.items()}
            for rows in chunks(len(labels)):
                logprobs = model.head(h[rows], head).float().log_softmax(-1)  # [n, vocab]
                scores.add_tokens(sample[rows], labels[rows], logprobs)
                for name, r in references.items():  # one at a time: their logits are as large as the model's
                    target = r.head(hidden[name][rows], reference_heads[name]).float().log_softmax(-1)
                    scores.add_reference(name, sample[rows], target, logprobs)
    return scores


@torch.no_grad()
def score_file(
    logits_of: Callable[[list[int]], Tensor],
    references: Mapping[str, CausalLM],
    samples: Sequence[Any],
    collate: Collate,
    max_tokens: int,
    max_length: int,
    title: str,
) -> Scores:
    """Score an exported file as `score_model` does a model, one sample at a time; return the scores of what was read.

    Args:
        logits_of: tokens → logits [len(tokens), vocab].
        references: models to compare with, on the CPU.
        samples: what to read; a sample longer than max_length is cut.
        collate: makes a batch of samples, with shifted labels.
        max_tokens: stop before the sample that would exceed it; at least one sample is read.
        max_length: of the file's context.
        title: on the progress bar.
    """
    scores = Scores.zeros(len(samples), list(references))
    tokens_read = samples_read = 0
    with progress(samples, f"evaluate {title}", unit="sample") as bar:
        for sample in bar:
            batch = collate([sample])
            tokens, labels = batch["tokens"][:, :max_length], batch["labels"][0, :max_length]
            if samples_read and tokens_read + tokens.shape[1] > max_tokens:
                break
            scored = labels != IGNORE
            index = torch.full((int(scored.sum()),), samples_read)
            logprobs = logits_of(tokens[0].tolist())[scored].float().log_softmax(-1)
            scores.add_tokens(index, labels[scored], logprobs)
            for name, model in references.items():
                target = model.head(model.hidden(tokens)[0, scored]).float().log_softmax(-1)
                scores.add_reference(name, index, target, logprobs)
            tokens_read, samples_read = tokens_read + tokens.shape[1], samples_read + 1
    return scores.first(samples_read)


def score_models(
    makers: Mapping[str, Callable[[], CausalLM]],
    references: Sequence[str],
    samples: Sequence[Any],
    collate: Collate,
    batch_size: int,
    device: torch.device,
) -> dict[str, Scores]:
    """Score models one after the other; only the references stay in memory.

    Args:
        makers: name → what builds the model, float32 on the CPU.
        references: names of those that every model is compared with.
        samples: see `score_model`, as are `collate` and `batch_size`.
        collate: see there.
        batch_size: see there.
        device: where to compute.
    """
    kept = {name: makers[name]().eval().to(device) for name in references}
    scores = {}
    for name, make in makers.items():
        model = kept[name] if name in kept else make().eval().to(device)
        scores[name] = score_model(model, kept, samples, collate, batch_size, name)
        del model
        gc.collect()
    return scores


def score_metrics(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Return what a manifest keeps of scores: how many samples and tokens, and each model's means."""
    tokens = next(iter(scores.values())).tokens
    return {
        "samples": len(tokens),
        "tokens": int(tokens.sum()),
        "scores": {name: s.means() for name, s in scores.items()},
    }


# --- what quantization costs, and what is won back -------------------------------------------------------------------


def share_of_kl(ptq: Scores, model: Scores, reference: str, seed: int = 0) -> dict[str, float]:
    """Return 1 − KL(reference ‖ model) / KL(reference ‖ PTQ), with a paired 95 % interval."""
    lost = ptq.kl[reference]
    return _share(lost - model.kl[reference], lost, seed)


def share_won_back(ptq: Scores, model: Scores, control: Scores, seed: int = 0) -> dict[str, float]:
    """Return (NLL[PTQ(control)] − NLL[model]) / (NLL[PTQ(control)] − NLL[control]), with a paired 95 % interval.

    1 means that training wins back all that quantization costs the control; above 1, more than that.
    """
    won, lost, n = ptq.nll - model.nll, ptq.nll - control.nll, float(ptq.tokens.sum())
    return _share(won, lost, seed) | {
        "lost_nats_per_token": float(lost.sum()) / n,
        "won_nats_per_token": float(won.sum()) / n,
    }


def _share(won: Tensor, lost: Tensor, seed: int) -> dict[str, float]:
    """Return Σ won / Σ lost over samples, and its 95 % interval by the bootstrap.

    A draw takes samples with replacement, and of each sample the values of all models together: that is the pairing.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(lost), (BOOTSTRAP_DRAWS, len(lost)), generator=generator)
    shares = won[draws].sum(1) / lost[draws].sum(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"share": float(won.sum() / lost.sum()), "low": low, "high": high}
