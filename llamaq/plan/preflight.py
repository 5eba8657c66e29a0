"""Everything that can be found wrong before the first step is: settings of every stage, data files, model, disk."""

import torch
from torch import nn

from llamaq.checkpoints.quantized import model_params
from llamaq.config import Config, TrainingConfig
from llamaq.data.datasets import build_tokenizer, check_files, check_ranks
from llamaq.model.causal_lm import instantiate, meta_decoder, pick_device
from llamaq.plan.memory import plan_length, shape_of, state_plan
from llamaq.quant.prepare import prepare
from llamaq.quant.scheme import Scheme
from llamaq.runs.run import world_size
from llamaq.train.engine import check_deepspeed, check_optimizer, uses_deepspeed


def preflight(c: Config) -> str:
    """Check a run and return its plan of memory and disk, to be printed.

    Raises:
        UserError: the first thing that would stop one of the stages.
    """
    device = pick_device(c.device)
    if uses_deepspeed(c):
        check_deepspeed(c, device.type)
    decoder = meta_decoder(c.model)
    prepare(decoder, Scheme(group_size=c.scheme.group_size))
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
