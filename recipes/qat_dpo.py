"""Stage 3, DPO: preferences over the quantized model, backbone and adapters trained together.

    tune run qat_dpo --config llama3_2/1B_qat_lora_dpo [key=value …]         (after `tune run qat_lora`)

The reference is the stage-2 model with its adapters. Its log-probabilities of every pair are computed once, as a
stage of their own (`reference/`), so no second model is in memory and another learning rate does not compute them
again. At step 0 policy and reference are the same numbers, so the loss is ln 2.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from llamaq.config import DPOConfig
from llamaq.data.datasets import (
    SampleOrder,
    build_dataset,
    collate_pairs,
    micro_batch_size,
    micro_batches,
    usable_pairs,
)
from llamaq.model.causal_lm import CausalLM, build_model, instantiate, pick_device
from llamaq.runs.main import main
from llamaq.runs.run import Run, rank, say, world_size
from llamaq.runs.tracking import progress
from llamaq.train.loop import train
from llamaq.train.objectives import DPO, answer_logprobs
from llamaq.train.resume import save_tensors
from llamaq.train.sft import identity, save_weights, tokenizer_of, weights_of


def reference(run: Run) -> Path:
    """Log-probabilities of chosen and rejected answers under the stage-2 model: `logprobs` float32 [pairs, 2]."""
    c = run.config
    backbone, adapters = run.need("qat"), run.need("qat_lora")

    def build(folder: Path) -> dict[str, Any]:
        model = stage_two(run)
        pairs, skipped, pad_id = preference_pairs(run)
        logprobs = reference_logprobs(model, pairs, pad_id, c.dpo, c.seed, c.dtype)
        if rank() == 0:
            save_tensors(folder / "reference.safetensors", {"logprobs": logprobs})
        return {"pairs": len(pairs), "skipped_pairs": skipped}

    settings = {k: v for k, v in identity(c, c.dpo).items() if k != "training"}
    settings |= {"dataset": c.dpo.dataset, "global_batch_size": c.dpo.global_batch_size}
    return run.stage("reference", build, settings, [backbone, adapters])


def stage_two(run: Run) -> CausalLM:
    """The model after stage 2: frozen backbone and trained adapters."""
    c = run.config
    weights = weights_of(run.need("qat"), run.need("qat_lora"))
    model = build_model(c.model, weights, run.scheme, (c.adapters.rank, c.adapters.alpha), frozen=True)
    return model.eval().to(pick_device(c.device))


def preference_pairs(run: Run) -> tuple[list[dict[str, Any]], list[int], int]:
    """Tokenized pairs, the indices of those without room for an answer, and the padding id."""
    c = run.config
    tokenizer = tokenizer_of(c)
    pairs, skipped = usable_pairs(build_dataset(c.dpo.dataset, tokenizer, "qat_dpo.dataset"), "qat_dpo.dataset")
    return pairs, skipped, tokenizer.pad_id


@torch.no_grad()
def reference_logprobs(
    model: CausalLM, pairs: list[dict[str, Any]], pad_id: int, training: DPOConfig, seed: int, dtype: str
) -> torch.Tensor:
    """[pairs, 2]: chosen, rejected; nats. Ranks share the work, and all of them get all of it.

    Pairs are taken in the very batches that training takes them in: in another batch, float32 sums are added in
    another order, which now and then moves an activation to the next int8 level and the log-probability by 1e-3.
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


def qat_dpo(run: Run) -> Path:
    """The stage: latent backbone of stage 1, adapters of stage 2, both trained."""
    c = run.config
    inputs = [run.need("qat"), run.need("qat_lora"), reference(run)]

    def build(folder: Path) -> dict[str, Any]:
        pairs, skipped, pad_id = preference_pairs(run)
        logprobs = load_file(inputs[2] / "reference.safetensors")["logprobs"].tolist()
        samples = [pair | {"reference": r} for pair, r in zip(pairs, logprobs, strict=True)]
        adapters = (c.adapters.rank, c.adapters.alpha)
        model = build_model(c.model, weights_of(*inputs), run.scheme, adapters)
        objective = DPO(pad_id, instantiate(c.dpo.loss, setting="qat_dpo.loss"))
        metrics, weights = train(run, "qat_dpo", folder, model, objective, c.dpo, samples)
        save_weights(folder, weights)
        return metrics | {"skipped_pairs": skipped}

    return run.stage("qat_dpo", build, identity(c, c.dpo), inputs)


def recipe(run: Run) -> None:
    say(f"backbone and adapters: {qat_dpo(run)}")


if __name__ == "__main__":
    main(recipe, __doc__)
