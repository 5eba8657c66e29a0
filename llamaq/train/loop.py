"""The one training loop. Stages differ in the model they prepare and the objective they use, in nothing else."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from llamaq.config import Config, TrainingConfig
from llamaq.data.batches import Batch, SampleOrder, check_ranks, micro_batch_size, micro_batches, num_micro_batches
from llamaq.errors import UserError
from llamaq.model.build import pick_device
from llamaq.model.causal_lm import CausalLM, torchtune_name
from llamaq.runs import signals
from llamaq.runs.manifest import CHECKPOINTS
from llamaq.runs.ranks import rank, say, world_size
from llamaq.runs.run import Session
from llamaq.runs.tracking import METRICS, progress, read_metrics
from llamaq.train import resume
from llamaq.train.deepspeed import DeepSpeedEngine, uses_deepspeed
from llamaq.train.engine import Engine, TorchEngine, load_weights


class Objective(Protocol):
    """Batch in, sums over its units out; see `llamaq.train.objectives`."""

    unit: str

    def collate(self, samples: list[Any]) -> Batch: ...
    def count(self, batch: Batch) -> int: ...
    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...


def total_steps(training: TrainingConfig, num_samples: int) -> int:
    """Return the optimizer steps of a stage: its epochs, or fewer if `max_steps` says so."""
    steps = math.ceil(training.epochs * num_samples / training.global_batch_size)
    return min(steps, training.max_steps) if training.max_steps is not None else steps


def make_engine(
    model: CausalLM, training: TrainingConfig, stage: str, total_steps: int, c: Config, device: torch.device
) -> Engine:
    """Return the engine that the config asks for; `auto` is DeepSpeed as soon as there is a process group."""
    kind = DeepSpeedEngine if uses_deepspeed(c) else TorchEngine
    return kind(model, training, stage, total_steps, c, device)


def train(
    session: Session,
    c: Config,
    training: TrainingConfig,
    model: CausalLM,
    objective: Objective,
    samples: Sequence[Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train `model` on `samples`, from the newest checkpoint in the session's folder if there is one.

    Args:
        session: where the stage's checkpoints and numbers go.
        c: the run's settings: seed, device, dtype, engine.
        training: the stage's settings.
        model: what to train; it is used up.
        objective: what to minimize.
        samples: the data, taken by global index.

    Returns:
        Metrics for the manifest (rank 0): steps, samples, and the first and last rows of metrics.jsonl; and the
        trained weights, float32 on the CPU (rank 0).
    """
    stage, device = session.stage, pick_device(c.device)
    steps, checkpoints = total_steps(training, len(samples)), session.folder / CHECKPOINTS
    check_ranks(training, stage, world_size())
    if training.warmup_steps >= steps:
        say(
            f"{stage}: warning: its warm-up has {training.warmup_steps} steps (lr_scheduler.num_warmup_steps), and it "
            f"ends after {steps}, before its learning rate is reached; lower it"
        )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(c.seed)
    found = resume.newest(checkpoints)
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
        signals.deferred(),
        session.tracker(done) as tracker,
        progress(range(done + 1, steps + 1), stage, steps, done, "step") as bar,
    ):
        for step in bar:
            start = time.perf_counter()
            batches = [objective.collate(s) for s in _my_share(samples, order, step, training)]
            metrics, warned = one_step(engine, objective, batches, training, device, session.hooks.due)
            if step == done + 1:
                engine.state()  # an optimizer that cannot be resumed is refused now, not at the first checkpoint
            last = metrics | _speed(metrics.pop("tokens_read"), time.perf_counter() - start, device)
            tracker.log(step, last)
            bar.set_postfix(loss=f"{last['loss']:.4f}", tokens_s=f"{last['tokens_per_second']:.0f}", refresh=False)
            in_time = warned and session.hooks.preempted()
            if in_time or (step % training.checkpoint_every_n_steps == 0 and step < steps):
                resume.save(checkpoints, step, *engine.state(), keep=training.keep_checkpoints)
                session.hooks.checkpointed(stage, step, last)
                if in_time:
                    say(f"{stage}: checkpoint of step {step} written just in time")
        if last:
            tracker.summary({"final_loss": last["loss"]})
    weights = {torchtune_name(name): w for name, w in engine.weights().items()}
    engine.close()
    rows = read_metrics(session.folder / METRICS) if rank() == 0 else []
    return {"steps": steps, "samples": len(samples), "first": rows[0], "last": rows[-1]} if rows else {}, weights


def _my_share(samples: Sequence[Any], order: SampleOrder, step: int, training: TrainingConfig) -> Iterator[list[Any]]:
    """Yield this rank's micro-batches of an optimizer step, counted from 1."""
    size, ranks = training.global_batch_size, world_size()
    return micro_batches(samples, order, (step - 1) * size, size, micro_batch_size(training, ranks), rank(), ranks)


def _speed(tokens: float, seconds: float, device: torch.device) -> dict[str, float]:
    """Return what a step's row says of speed and memory."""
    speed = {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "ranks": world_size()}
    if device.type == "cuda":
        speed["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return speed


def one_step(
    engine: Engine,
    objective: Objective,
    batches: list[Batch],
    training: TrainingConfig,
    device: torch.device,
    due: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], bool]:
    """Run forward, backward and update over this rank's micro-batches; metrics are means over the global batch.

    Every rank makes the same number of forward passes. A rank with fewer micro-batches repeats its last one with a
    loss of 0, since ranks gather sharded parameters together.

    Args:
        engine: holds the model.
        objective: gives the loss.
        batches: this rank's; at least one.
        training: the stage's settings.
        device: to compute on.
        due: tells whether this rank wants something done after the step; asked late in it.

    Returns:
        Metrics, and whether any rank is `due`.
    """
    passes = num_micro_batches(training, world_size())
    counts = [sum(objective.count(b) for b in batches), sum(b["tokens"].numel() for b in batches)]
    count, tokens = _sum_over_ranks(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
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
    asked = torch.tensor(float(due()), dtype=torch.float64, device=device)
    *sums, any_due = _sum_over_ranks(torch.stack([*totals.values(), asked])).tolist()
    metrics = {name: total / count for name, total in zip(totals, sums, strict=True)}
    if not math.isfinite(metrics["loss"]):
        raise UserError(f"the loss is {metrics['loss']}: training diverged; lower the learning rate")
    return metrics | engine.step() | {f"{objective.unit}s": count, "tokens_read": tokens}, any_due > 0


def _sum_over_ranks(x: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
    return x
