"""The sections of the training stages: `base`, `qat`, `qat_lora` and `qat_dpo`."""

import math
from dataclasses import dataclass

from omegaconf import MISSING

from llamaq.config.checks import at_least, at_most, fraction, has_component, has_data, not_negative, positive, require
from llamaq.config.components import Component

DISTILLED = ("qat", "qat_lora")  # stages with a BF16 model to learn from and a loss to mix with its KL
MOST_IN_A_STEP = 2**20  # sequences; no run comes near, and a step takes every one of them


@dataclass
class TrainingConfig:
    """One training stage."""

    dataset: Component = MISSING
    """The training data, e.g. `torchtune.datasets.chat_dataset`. For `qat_dpo` it is pairs, e.g.
    `torchtune.datasets.preference_dataset`. `source: json` reads the files, folders or patterns in `data_files`
    (docs/data.md). Every row is checked and tokenized before the first step. Samples longer than
    `tokenizer.max_seq_len` are cut."""

    optimizer: Component = MISSING
    """The optimizer, e.g. `torch.optim.AdamW` with `lr: 1.0e-5`. `_component_` is a `torch.optim.Optimizer`, called
    with the parameters; `lr`, `weight_decay` (both 0 or more), `fused` and so on stand beside it. Its state has to be
    one number a weight, so that it can be resumed: AdamW, Adam, SGD, …, not LBFGS or Adafactor. Under ZeRO 1 to 3 it
    has to be elementwise."""

    lr_scheduler: Component | None = None
    """The learning-rate schedule; unset keeps the rate constant. `_component_` is a function called with the optimizer
    and `num_training_steps` (the stage's optimizer steps), e.g.
    `torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup` with `num_warmup_steps: 100`. The stage has to
    have more steps than the warm-up."""

    batch_size: int = 1
    """Sequences in one forward pass of one rank. In `qat_dpo` it counts pairs of two sequences. Lower it if memory runs
    out, raise it for speed: results stay the same up to rounding, because `global_batch_size` stays the same. If
    `global_batch_size` divided by the number of ranks is less, that is used. In `qat_dpo`, another value computes the
    stage `reference` again."""

    global_batch_size: int = 16
    """Sequences (or pairs) per optimizer step, over all ranks, at most 1048576. It has to be a multiple of `batch_size`
    and at least the number of ranks. Gradients are accumulated as needed, so any number of ranks gives the same losses
    up to rounding."""

    epochs: int = 1
    """Passes over the dataset, at least 1. Each pass has a new order, drawn from `seed`."""

    max_steps: int | None = None
    """Optimizer steps after which to stop, even within an epoch. The learning-rate schedule ends with it. Unset: all
    epochs."""

    clip_grad_norm: float | None = 1.0
    """Largest norm of the gradient, above 0; longer gradients are scaled down. Unset: no clipping. The norm before
    clipping is logged as `grad_norm`."""

    checkpoint_every_n_steps: int = 100
    """Optimizer steps between two checkpoints. A killed run repeats at most this many steps. A checkpoint takes 12
    bytes per trained parameter with Adam."""

    keep_checkpoints: int = 2
    """How many checkpoints to keep on disk. Older ones are deleted, and all of them when the stage is finished."""

    distill_weight: float = 0.0
    """Weight of distillation from the BF16 model, 0 to 1. The loss is (1 − w) · cross-entropy + w · KL(BF16 model ‖
    this model), where the BF16 model is the one the run starts from. For `qat` and `qat_lora` only; a second model is
    held in memory (4 bytes per parameter)."""

    def check(self, name: str) -> None:
        """Check the ranges, and that the global batch can be cut into forward passes."""
        for key in ("optimizer", "lr_scheduler"):
            has_component(f"{name}.{key}", getattr(self, key))
        has_data(f"{name}.dataset", self.dataset)
        counts = ("batch_size", "global_batch_size", "epochs", "checkpoint_every_n_steps", "keep_checkpoints")
        at_least(1, self, name, *counts, "max_steps")
        at_most(MOST_IN_A_STEP, self, name, "global_batch_size")
        fraction(f"{name}.distill_weight", self.distill_weight)
        require(
            not self.distill_weight or name in DISTILLED,
            f"{name}.distill_weight={self.distill_weight}: only {' and '.join(DISTILLED)} distill; leave it at 0",
        )
        clip = self.clip_grad_norm
        require(
            clip is None or 0 < clip < math.inf,
            f"{name}.clip_grad_norm={clip}: must be above 0 (0 would keep every weight as it is); null turns it off",
        )
        require(
            self.global_batch_size % self.batch_size == 0,
            f"{name}.global_batch_size={self.global_batch_size} is not a multiple of "
            f"{name}.batch_size={self.batch_size}",
        )
        for key in ("lr", "weight_decay"):
            not_negative(f"{name}.optimizer.{key}", self.optimizer.get(key))
        not_negative(f"{name}.lr_scheduler.num_warmup_steps", self.warmup_steps)

    @property
    def warmup_steps(self) -> int:
        """Return the steps in which the learning rate rises, 0 without a warm-up."""
        return (self.lr_scheduler or {}).get("num_warmup_steps") or 0


@dataclass
class DPOConfig(TrainingConfig):
    """The preference stage."""

    loss: Component = MISSING
    """The preference loss, e.g. `torchtune.rlhf.loss.DPOLoss` with `beta: 0.1` (above 0). `_component_` is called with
    the answers' log-probabilities (policy chosen, policy rejected, reference chosen, reference rejected) and returns
    losses, chosen rewards and rejected rewards."""

    def check(self, name: str) -> None:
        """Check what every training stage has, and the loss."""
        super().check(name)
        has_component(f"{name}.loss", self.loss)
        positive(f"{name}.loss.beta", self.loss.get("beta"))
        not_negative(f"{name}.loss.label_smoothing", self.loss.get("label_smoothing"))
