"""DPO's reference: log-probabilities of chosen and rejected answers, computed once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from llamaq.config import TrainingConfig
from llamaq.data.batches import SampleOrder, collate_pairs, micro_batch_size, micro_batches
from llamaq.model.causal_lm import CausalLM
from llamaq.runs.ranks import rank, world_size
from llamaq.runs.tracking import progress
from llamaq.train.objectives import answer_logprobs


@torch.no_grad()
def reference_logprobs(
    model: CausalLM, pairs: Sequence[dict[str, Any]], pad_id: int, training: TrainingConfig, seed: int, dtype: str
) -> torch.Tensor:
    """Return [pairs, 2]: log-probabilities of the chosen and the rejected answer, in nats.

    Ranks share the work, and all of them get all of it. Pairs are taken in the very batches in which training takes
    them: in another batch, float32 sums are added in another order, which now and then moves an activation to the next
    int8 level and the log-probability by 1e-3.
    """
    device = next(t.device for t in model.buffers())
    logprobs = torch.zeros(len(pairs), 2, device=device)
    order, step = SampleOrder(len(pairs), seed), training.global_batch_size
    batch_size = micro_batch_size(training, world_size())
    for start in progress(range(0, len(pairs), step), "reference", unit="step"):
        count = min(step, len(pairs) - start)
        for batch in micro_batches(pairs, order, start, count, batch_size, rank(), world_size()):
            tensors = {k: v.to(device) for k, v in collate_pairs(batch, pad_id).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                scores = answer_logprobs(model, tensors).chunk(2)
            logprobs[[pair["index"] for pair in batch]] = torch.stack(scores, dim=1)
    if world_size() > 1:
        dist.all_reduce(logprobs)
    return logprobs
