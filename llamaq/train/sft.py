"""Supervised fine-tuning, as stages 1 and 2, the BF16 control and the base model share it."""

from typing import Any

from llamaq.checkpoints.load import start_weights
from llamaq.config import Config, TrainingConfig
from llamaq.data.datasets import cache_of, skipped_rows, training_samples
from llamaq.data.tokenizer import tokenizer_of
from llamaq.model.build import StateDict, build_model, pick_device
from llamaq.model.causal_lm import CausalLM
from llamaq.runs.run import Session
from llamaq.train.loop import train
from llamaq.train.objectives import SFT


def train_sft(
    session: Session, c: Config, training: TrainingConfig, model: CausalLM, setting: str
) -> tuple[dict[str, Any], StateDict]:
    """Train a model on the next token of `training.dataset`, with the run's BF16 model as teacher if it distills.

    Args:
        session: where checkpoints and numbers go.
        c: the run's settings.
        training: the stage's settings.
        model: what to train; it is used up.
        setting: the section that `training` is, for errors.

    Returns:
        Metrics and trained weights; see `llamaq.train.loop.train`.
    """
    tokenizer = tokenizer_of(c)
    samples = training_samples(training, tokenizer, setting, cache_of(c))
    teacher = None
    if training.distill_weight:
        teacher = build_model(c.model, start_weights(c), scheme=None).eval().requires_grad_(False)
        teacher.to(pick_device(c.device))
    objective = SFT(tokenizer.pad_id, teacher, training.distill_weight)
    metrics, weights = train(session, c, training, model, objective, samples)
    return metrics | skipped_rows(samples), weights
