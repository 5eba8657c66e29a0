"""Objectives: what a stage minimizes.

An objective turns a batch into sums over its units (tokens or pairs); the loop divides by the global count.

Sums, not means: added over micro-batches and ranks and divided once, they give the same loss however the global batch
is split (torchtune's DPO recipes log world_size times the true loss because they add means).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llamaq.data.batches import IGNORE, Batch, collate_pairs, collate_sft
from llamaq.model.causal_lm import CausalLM

Sums = dict[str, Tensor]


class SFT:
    """Next-token cross-entropy over labelled tokens; optionally mixed with KL(BF16 teacher ‖ student).

    Units are labelled tokens; the loss is in nats a token.
    """

    unit = "token"

    def __init__(self, pad_id: int, teacher: CausalLM | None = None, distill_weight: float = 0.0):
        self.pad_id, self.teacher, self.distill_weight = pad_id, teacher, distill_weight

    def collate(self, samples: list[Any]) -> Batch:
        return collate_sft(samples, self.pad_id)

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORE).sum())

    def __call__(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Sums]:
        inputs = {k: batch.get(k) for k in ("labels", "mask", "input_pos")}
        logprobs, kl = model(batch["tokens"], teacher=self.teacher, **inputs)
        nll = -logprobs.sum()
        if kl is None:
            return nll, {"loss": nll.detach()}
        loss = (1 - self.distill_weight) * nll + self.distill_weight * kl.sum()
        return loss, {"loss": loss.detach(), "nll": nll.detach(), "distill_kl": kl.sum().detach()}


class DPO:
    """Direct preference optimization with torchtune's loss; the reference's log-probabilities come with the data.

    Units are pairs; rewards are beta · (log-probability − reference's), log-probabilities sums over the answer, nats.
    """

    unit = "pair"

    def __init__(self, pad_id: int, loss: Callable[..., tuple[Tensor, Tensor, Tensor]]):
        self.pad_id, self.loss = pad_id, loss

    def collate(self, samples: list[Any]) -> Batch:
        return collate_pairs(samples, self.pad_id)

    def count(self, batch: Batch) -> int:
        return len(batch["tokens"]) // 2

    def __call__(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Sums]:
        chosen, rejected = answer_logprobs(model, batch).chunk(2)
        reference_chosen, reference_rejected = batch["reference"].chunk(2)
        losses, reward_chosen, reward_rejected = self.loss(chosen, rejected, reference_chosen, reference_rejected)
        sums = {
            "loss": losses,
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/margin": reward_chosen - reward_rejected,
            "rewards/accuracy": (reward_chosen > reward_rejected).float(),
            "logprobs/chosen": chosen,
            "logprobs/rejected": rejected,
        }
        return losses.sum(), {k: v.detach().sum() for k, v in sums.items()}


def answer_logprobs(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Return the log-probability of each row's answer, summed over its tokens: [rows], nats, float32."""
    logprobs, _ = model(batch["tokens"], labels=batch["labels"])
    return torch.as_tensor(logprobs).sum(-1)
