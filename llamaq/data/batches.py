"""Batches: which sample comes when, which rank takes it, and how samples are padded and labelled.

The order of samples is a function of the seed and the index alone: sample i of a run is the same on one rank or
sixteen, before and after a resume, so the losses are too.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtune.data import padded_collate_dpo, padded_collate_packed, padded_collate_sft

from llamaq.config import TrainingConfig
from llamaq.errors import UserError

IGNORE = -100  # the label of a position that predicts nothing
Batch = dict[str, Tensor]


def _shift(labels: Tensor) -> Tensor:
    """Shift labels left: labels[:, i] becomes what position i has to predict; the last one predicts nothing."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], dim=1)


def collate_sft(samples: list[dict[str, Any]], pad_id: int) -> Batch:
    """Return tokens and shifted labels [b, s], and for packed samples mask [b, s, s] and input_pos [b, s]."""
    if "seq_lens" in samples[0]:
        batch = padded_collate_packed(samples)
        starts = batch["input_pos"] == 0  # a packed sample's first token is no answer to the one before it
        batch["labels"] = _shift(torch.where(starts, IGNORE, batch["labels"]))
        return batch
    batch = padded_collate_sft([{k: s[k] for k in ("tokens", "labels")} for s in samples], padding_idx=pad_id)
    return {"tokens": batch["tokens"], "labels": _shift(batch["labels"])}  # pyright: ignore[reportReturnType]


def collate_pairs(samples: list[dict[str, Any]], pad_id: int) -> Batch:
    """Return tokens and shifted labels [2b, s], the chosen rows first, and reference [2b] if the pairs carry it."""
    tokens, labels = padded_collate_dpo(samples, padding_idx=pad_id)
    batch = {"tokens": tokens, "labels": _shift(labels)}
    if "reference" in samples[0]:
        batch["reference"] = torch.tensor([s["reference"] for s in samples]).T.reshape(-1)
    return batch


class SampleOrder:
    """Position in the run → index in the dataset: a fresh permutation every epoch, from the seed."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def __getitem__(self, position: int) -> int:
        epoch, i = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.num_samples, generator=generator)
        return int(self._permutation[i])


def micro_batch_size(training: TrainingConfig, world_size: int) -> int:
    """Return the samples of one forward pass: `batch_size`, or less where that would leave a rank without work."""
    return min(training.batch_size, max(1, training.global_batch_size // world_size))


def check_ranks(training: TrainingConfig, stage: str, world_size: int) -> None:
    """Check that every rank has something to do.

    Raises:
        UserError: there are more ranks than samples in an optimizer step.
    """
    if world_size > training.global_batch_size:
        raise UserError(
            f"{stage}: {world_size} ranks, but {stage}.global_batch_size={training.global_batch_size}: some would have "
            "nothing to do; raise it, or use fewer ranks"
        )


def num_micro_batches(training: TrainingConfig, world_size: int) -> int:
    """Return the forward passes of each rank in one optimizer step: the same number, so that ranks stay in step."""
    return math.ceil(math.ceil(training.global_batch_size / micro_batch_size(training, world_size)) / world_size)


def micro_batches(
    samples: Sequence[Any], order: SampleOrder, start: int, count: int, batch_size: int, rank: int, world_size: int
) -> Iterator[list[Any]]:
    """Yield this rank's share of the global batch [start, start + count): every world_size-th micro-batch of it.

    A micro-batch holds the same samples however many ranks there are, so its losses are the same bits.
    """
    for i in range(start + rank * batch_size, start + count, world_size * batch_size):
        yield [samples[order[p]] for p in range(i, min(i + batch_size, start + count))]
