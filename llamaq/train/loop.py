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
from llamaq.data.datasets import Batch, SampleOrder, check_ranks, micro_batch_size, micro_batches, num_micro_batches
from llamaq.errors import UserError
from llamaq.model.causal_lm import CausalLM, pick_device
from llamaq.runs.run import CHECKPOINTS, METRICS, Run, rank, say, world_size
from llamaq.runs.tracking import Tracker, progress, read_metrics
from llamaq.train import resume
from llamaq.train.engine import Engine, load_weights, make_engine


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
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train `model` on `samples`, from the newest resume in `folder` if there is one. The model is used up.

    Returns:
        Metrics for the manifest (rank 0): steps, samples, and the first and last rows of metrics.jsonl; and the
        trained weights, float32 on the CPU (rank 0).
    """
    c, device = run.config, pick_device(run.config.device)
    steps, ranks = total_steps(training, len(samples)), world_size()
    batch_size, passes = micro_batch_size(training, ranks), num_micro_batches(training, ranks)
    check_ranks(training, stage, ranks)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(c.seed)
    found = resume.newest(folder / CHECKPOINTS)
    if found is not None:
        load_weights(model, found)
    engine = make_engine(model, training, stage, steps, c, device)
    if found is not None:
        engine.load_state(found)
        say(f"{stage}: resuming after step {found.step}")
    done = found.step if found is not None else 0
    del found  # its files are mapped, and a network file system cannot drop the folder of a file that is
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
                    batch_size, rank(), ranks,
                )
            ]  # fmt: skip
            metrics, warned = one_step(engine, objective, batches, passes, device, run.hooks.due())
            if step == done + 1:
                engine.state()  # an optimizer that cannot be resumed is refused now, not at the first resume
            seconds = time.perf_counter() - start
            metrics |= {
                "tokens_per_second": metrics.pop("tokens_read") / seconds,
                "step_seconds": seconds,
                "ranks": ranks,
            }
            if device.type == "cuda":
                metrics["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            tracker.log(step, metrics)
            bar.set_postfix(
                loss=f"{metrics['loss']:.4f}", tokens_s=f"{metrics['tokens_per_second']:.0f}", refresh=False
            )
            last = metrics
            in_time = warned and run.hooks.preempted()
            if (in_time or step % training.checkpoint_every_n_steps == 0) and step < steps:
                resume.save(folder / CHECKPOINTS, step, *engine.state(), keep=training.keep_checkpoints)
                run.hooks.checkpointed(stage, step, metrics)
                if in_time:
                    say(f"{stage}: resume of step {step} written just in time")
        tracker.summary({"final_loss": last.get("loss")})
    weights = {name.removeprefix("decoder."): w for name, w in engine.weights().items()}
    engine.close()
    rows = read_metrics(folder / METRICS) if rank() == 0 else []
    return {"steps": steps, "samples": len(samples), "first": rows[0], "last": rows[-1]} if rows else {}, weights


def one_step(
    engine: Engine, objective: Objective, batches: list[Batch], passes: int, device: torch.device, due: bool = False
) -> tuple[dict[str, float], bool]:
    """Forward, backward and update over this rank's micro-batches; metrics are means over the global batch.

    Args:
        engine: holds the model.
        objective: gives the loss.
        batches: this rank's; at least one.
        passes: forward passes of every rank. A rank with fewer micro-batches repeats its last one for nothing, since
            sharded parameters are gathered by all ranks together.
        device: to compute on.
        due: whether this rank wants something done after the step.

    Returns:
        Metrics, and whether any rank is `due`.
    """
    counts = [sum(objective.count(b) for b in batches), sum(b["tokens"].numel() for b in batches), int(due)]
    count, tokens, any_due = _sum_over_ranks(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
    if count == 0:
        raise UserError("no sample of this batch has a token to learn from; raise tokenizer.max_seq_len")
    totals: dict[str, Tensor] = {}
    for i in range(passes):
        batch = {k: v.to(device) for k, v in batches[min(i, len(batches) - 1)].items()}
        loss, sums = objective(engine.forward, batch)
        mine = i < len(batches)
        engine.backward(loss / count if mine else loss * 0.0)
        if mine:
            totals = {k: totals.get(k, 0) + v.double() for k, v in sums.items()}
    means = _sum_over_ranks(torch.stack(list(totals.values()))) / count
    metrics = dict(zip(totals, means.tolist(), strict=True))
    if not math.isfinite(metrics["loss"]):
        raise UserError(f"the loss is {metrics['loss']}: training diverged; lower the learning rate")
    return metrics | engine.step() | {f"{objective.unit}s": count, "tokens_read": tokens}, any_due > 0


def _sum_over_ranks(x: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
    return x
