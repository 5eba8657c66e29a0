"""The one training loop. Stages differ in the model they prepare and the objective they use, in nothing else."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from llamaq.config import TrainingConfig
from llamaq.errors import UserError
from llamaq.pipeline import CHECKPOINTS, METRICS, Run, rank, say, world_size
from llamaq.tracking import Tracker, progress, read_metrics
from llamaq.train import checkpoint
from llamaq.train.data import Batch, SampleOrder, micro_batches
from llamaq.train.engine import TorchEngine
from llamaq.train.model import CausalLM, pick_device, ready_to_train


class Objective(Protocol):
    """Batch in, sums over its units out; see `llamaq.train.objectives`."""

    unit: str

    def collate(self, samples: list[Any]) -> Batch: ...
    def count(self, batch: Batch) -> int: ...
    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...


def total_steps(training: TrainingConfig, num_samples: int) -> int:
    """Optimizer steps of a stage: its epochs, or fewer if `max_steps` says so."""
    steps = math.ceil(training.epochs * num_samples / training.global_batch_size)
    return min(steps, training.max_steps) if training.max_steps is not None else steps


def train(
    run: Run,
    stage: str,
    folder: Path,
    model: CausalLM,
    objective: Objective,
    training: TrainingConfig,
    samples: Sequence[Any],
) -> dict[str, Any]:
    """Train `model` in place on `samples`, from the newest checkpoint in `folder` if there is one.

    Returns:
        Metrics for the manifest (rank 0): steps, samples, and the first and last rows of metrics.jsonl.
    """
    c, device = run.config, pick_device(run.config.device)
    steps = total_steps(training, len(samples))
    per_pass = training.batch_size * world_size()
    if training.global_batch_size % per_pass:
        raise UserError(
            f"{stage}.global_batch_size={training.global_batch_size} is not a multiple of {stage}.batch_size="
            f"{training.batch_size} times {world_size()} ranks; change one of them"
        )
    torch.manual_seed(c.seed)
    engine = TorchEngine(ready_to_train(model, c, device), training, stage, steps, c, device)
    done = _restore(engine, folder, stage)
    order = SampleOrder(len(samples), c.seed)
    last: dict[str, float] = {}
    with (
        Tracker(c, run.id, stage, folder, done) as tracker,
        progress(range(done + 1, steps + 1), stage, steps, done, "step") as bar,
    ):
        for step in bar:
            start = time.perf_counter()
            batches = [
                objective.collate(s)
                for s in micro_batches(
                    samples, order, (step - 1) * training.global_batch_size, training.global_batch_size,
                    training.batch_size, rank(), world_size(),
                )
            ]  # fmt: skip
            metrics = one_step(engine, objective, batches, device)
            seconds = time.perf_counter() - start
            tokens = sum(b["tokens"].numel() for b in batches) * world_size()
            metrics |= {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
            if device.type == "cuda":
                metrics["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            tracker.log(step, metrics)
            bar.set_postfix(
                loss=f"{metrics['loss']:.4f}", tokens_s=f"{metrics['tokens_per_second']:.0f}", refresh=False
            )
            last = metrics
            if step % training.checkpoint_every_n_steps == 0 and step < steps:
                checkpoint.save(folder / CHECKPOINTS, step, *engine.state(), keep=training.keep_checkpoints)
        tracker.summary({"final_loss": last.get("loss")})
    model.eval()
    rows = read_metrics(folder / METRICS) if rank() == 0 else []
    return {"steps": steps, "samples": len(samples), "first": rows[0], "last": rows[-1]} if rows else {}


def one_step(engine: TorchEngine, objective: Objective, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Forward, backward and update over this rank's micro-batches; metrics are means over the global batch."""
    count = _sum_over_ranks(torch.tensor(float(sum(objective.count(b) for b in batches)), device=device)).item()
    if count == 0:
        raise UserError("no sample of this batch has a token to learn from; raise tokenizer.max_seq_len")
    totals: dict[str, Tensor] = {}
    for batch in batches:
        batch = {k: v.to(device) for k, v in batch.items()}
        loss, sums = objective(engine.forward, batch)
        engine.backward(loss / count)
        totals = {k: totals.get(k, 0) + v.double() for k, v in sums.items()}
    means = _sum_over_ranks(torch.stack(list(totals.values()))) / count
    metrics = dict(zip(totals, means.tolist(), strict=True))
    if not math.isfinite(metrics["loss"]):
        raise UserError(f"the loss is {metrics['loss']}: training diverged; lower the learning rate")
    return metrics | engine.step() | {f"{objective.unit}s": count}


def _restore(engine: TorchEngine, folder: Path, stage: str) -> int:
    found = checkpoint.newest(folder / CHECKPOINTS)
    if found is None:
        return 0
    step, tensors, scalars = found
    engine.load_state(tensors, scalars)
    say(f"{stage}: resuming after step {step}")
    return step


def _sum_over_ranks(x: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
    return x
