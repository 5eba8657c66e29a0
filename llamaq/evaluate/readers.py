"""Read text with a model or with a .pte: log-likelihoods of continuations, and greedy continuations.

lm-evaluation-harness asks nothing else of a model, so both readers answer its tasks (`llamaq.evaluate.harness`).
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from llamaq.export.pte import Pte
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import chunks
from llamaq.runs.tracking import progress

Pair = tuple[list[int], list[int]]  # context, continuation; neither is empty


class Reader(Protocol):
    """What the harness needs of a model."""

    max_length: int  # tokens that a context and its continuation may have together

    def loglikelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Return for each pair log P(continuation | context) in nats, and whether it is the greedy continuation."""
        ...

    def continuation(self, context: list[int]) -> Iterator[int]:
        """Yield greedy tokens after a context, for as long as the caller asks."""
        ...


class EagerReader:
    """A model as llamaq computes it: batches of similar length, padded on the right, which causal attention ignores."""

    def __init__(self, model: CausalLM, max_length: int, batch_size: int):
        self.model, self.max_length, self.batch_size = model.eval(), max_length, batch_size
        self.device = next(t.device for t in [*model.parameters(), *model.buffers()])

    @cached_property
    def _head(self) -> Tensor:
        return self.model.head.quantized_weight()

    @torch.no_grad()
    def loglikelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Score each continuation; see `Reader`."""
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # longest first: memory shows early
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with progress(range(0, len(order), self.batch_size), "reading", unit="batch") as bar:
            for start in bar:
                batch = order[start : start + self.batch_size]
                for i, result in zip(batch, self._batch([pairs[i] for i in batch]), strict=True):
                    results[i] = result
        return results

    def _batch(self, pairs: list[Pair]) -> Iterator[tuple[float, bool]]:
        inputs = [torch.tensor((context + continuation)[:-1]) for context, continuation in pairs]
        tokens = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(self.device)  # [b, s]
        hidden = self.model.hidden(tokens)
        for row, (context, continuation) in zip(hidden, pairs, strict=True):
            h = row[len(context) - 1 : len(context) + len(continuation) - 1]  # [n, dim]
            logits = [self.model.head(h[rows], self._head).float() for rows in chunks(len(h))]
            yield score_continuation(torch.cat(logits), continuation)

    @torch.no_grad()
    def continuation(self, context: list[int]) -> Iterator[int]:
        """Yield greedy tokens. There is no KV cache: every token reads the whole text again."""
        tokens = list(context)
        while True:
            h = self.model.hidden(torch.tensor([tokens], device=self.device))[0, -1:]
            tokens.append(int(self.model.head(h, self._head).argmax()))
            yield tokens[-1]


class PteReader:
    """A .pte that reads one text at a time through its KV cache, without what it shares with the text before."""

    def __init__(self, pte: Pte):
        self.pte, self.max_length = pte, pte.max_context_length
        self._read: list[int] = []  # what the cache holds

    def logits(self, tokens: list[int], last: int) -> Tensor:
        """Return the logits [last, vocab] after each of the last tokens."""
        wanted = len(tokens) - last  # the first token whose logits are wanted
        start = 0
        while start < min(len(self._read), wanted) and self._read[start] == tokens[start]:
            start += 1
        self._read = self._read[:start]  # should the call fail, the cache is known to hold this much
        if self.pte.full_logits:
            limit = self.pte.max_tokens_per_call
            calls = [self.pte.rows(tokens[at : at + limit], at) for at in range(start, len(tokens), limit)]
            rows = torch.cat(calls)[-last:]
        else:
            first = self.pte.step(tokens[start : wanted + 1], start)
            rest = [self.pte.step([tokens[i]], i) for i in range(wanted + 1, len(tokens))]
            rows = torch.stack([first, *rest])
        self._read = list(tokens)
        return rows

    def loglikelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Score each continuation; see `Reader`. Sorted, so that texts which begin alike follow each other."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with progress(sorted(range(len(pairs)), key=lambda i: pairs[i]), "reading", unit="request") as bar:
            for i in bar:
                context, continuation = pairs[i]
                logits = self.logits((context + continuation)[:-1], len(continuation))
                results[i] = score_continuation(logits, continuation)
        return results

    def continuation(self, context: list[int]) -> Iterator[int]:
        """Yield greedy tokens after a context."""
        tokens = list(context)
        while True:
            tokens.append(int(self.logits(tokens, 1).argmax()))
            yield tokens[-1]


def score_continuation(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Return the sum of the tokens' log-probabilities, and whether each is the most likely; logits are [n, vocab]."""
    wanted = torch.tensor(continuation, device=logits.device)
    logprobs = logits.log_softmax(-1).gather(-1, wanted[:, None]).double().sum()
    return float(logprobs), bool((logits.argmax(-1) == wanted).all())
