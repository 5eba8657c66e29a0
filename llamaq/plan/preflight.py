"""Check everything that a run will read before its first step: settings of every stage, data files, model, disk."""

import torch
from torch import nn

from llamaq.checkpoints.meta import model_params
from llamaq.config import Config, TrainingConfig
from llamaq.config.components import instantiate
from llamaq.data.batches import check_ranks
from llamaq.data.datasets import check_files
from llamaq.data.tokenizer import build_tokenizer
from llamaq.model.build import meta_decoder, pick_device, scheme_of
from llamaq.model.shape import shape_of
from llamaq.plan.memory import plan_length, state_plan
from llamaq.quant.prepare import prepare
from llamaq.runs.ranks import world_size
from llamaq.train.deepspeed import check_deepspeed, check_optimizer, uses_deepspeed


def preflight(c: Config) -> str:
    """Check a run and return its plan of memory and disk, to be printed.

    Raises:
        UserError: the first thing that would stop one of the stages.
    """
    device = pick_device(c.device)
    if uses_deepspeed(c):
        check_deepspeed(c, device.type)
    decoder = meta_decoder(c.model)
    prepare(decoder, scheme_of(c))
    model_params(decoder)
    build_tokenizer(c.tokenizer, shape_of(c.model).vocab)
    for name in ("qat", "qat_lora", "qat_dpo", "base"):
        training: TrainingConfig | None = getattr(c, name)
        if training is None:
            continue
        check_ranks(training, name, world_size())
        check_files(training.dataset, f"{name}.dataset")
        optimizer = instantiate(training.optimizer, [nn.Parameter(torch.zeros(1))], setting=f"{name}.optimizer")
        if uses_deepspeed(c):
            check_optimizer(optimizer, c)
        if training.lr_scheduler is not None:
            instantiate(training.lr_scheduler, optimizer, num_training_steps=1, setting=f"{name}.lr_scheduler")
    if c.qat_dpo is not None:
        instantiate(c.qat_dpo.loss, setting="qat_dpo.loss")
    for i, part in enumerate(c.spinquant.calibration if c.spinquant else []):
        check_files(part.dataset, f"spinquant.calibration[{i}].dataset")
    check_files(c.evaluate.dataset, "evaluate.dataset")
    return state_plan(c, plan_length(c))
