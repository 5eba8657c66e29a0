"""Check everything that a run will read before its first step: settings of every stage, data files, model, disk."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.checkpoints.load import check_start
from llamaq.checkpoints.meta import model_params
from llamaq.checkpoints.peft_config import check_peft
from llamaq.config import Component, Config, TrainingConfig
from llamaq.config.components import instantiate
from llamaq.data.batches import check_ranks
from llamaq.data.datasets import build_on_all_ranks, cache_of, check_files, training_samples
from llamaq.data.prepare import keep_only
from llamaq.data.tokenizer import build_tokenizer, prompt_tokens, tokenizer_of
from llamaq.errors import UserError
from llamaq.model.build import meta_decoder, pick_device, scheme_of
from llamaq.model.shape import Shape
from llamaq.plan.memory import plan_length, state_plan
from llamaq.quant.prepare import prepare
from llamaq.runs.ranks import from_rank_zero, world_size
from llamaq.train.deepspeed import check_deepspeed, check_optimizer, uses_deepspeed
from llamaq.train.loop import total_steps

TRAINING_STAGES = ("qat", "qat_lora", "qat_dpo", "base")


def preflight(c: Config) -> str:
    """Check a run and return its plan of memory and disk, to be printed.

    Raises:
        UserError: the first thing that would stop one of the stages.
    """
    device = check_device(c.device)
    if uses_deepspeed(c):
        check_deepspeed(c, device.type)
    decoder = check_model(c)
    if c.base is None:
        check_start(c.checkpoint_dir, decoder)
    check_lengths(c, decoder)
    prepare(decoder, scheme_of(c))
    model_params(decoder)
    tokenizer = build_tokenizer(c.tokenizer, Shape.of(decoder).vocab)
    check_prompt(c, tokenizer)
    check_adapters(c)
    stages = [name for name in TRAINING_STAGES if getattr(c, name) is not None]
    for name in stages:
        check_training(c, name)
    others = other_data(c)
    for setting, dataset in others.items():
        check_files(dataset, setting)
    plan = state_plan(c, plan_length(c))
    check_all_data(c, stages, others, tokenizer)
    return plan


def check_device(name: str) -> torch.device:
    """Return the device that a config names.

    Raises:
        UserError: there is no such GPU.
    """
    device = pick_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}, but PyTorch sees {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


# --- the model and lengths -------------------------------------------------------------------------------------------


def check_model(c: Config) -> Any:
    """Return the decoder on the meta device: torchtune's builder takes the sizes, and they make a model.

    Raises:
        UserError: they do not.
    """
    try:
        decoder = meta_decoder(c.model)
        shape = Shape.of(decoder)
    except UserError:
        raise
    except Exception as e:  # ValueError, AssertionError, RuntimeError, ZeroDivisionError, …
        said = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"model: {c.model['_component_']} cannot build a model of these sizes: {said}") from e
    if c.adapters.rank > shape.dim:
        raise UserError(
            f"adapters.rank={c.adapters.rank} is above the model's width, {shape.dim}: adapters would be larger than "
            "what they adapt; lower it"
        )
    return decoder


def check_lengths(c: Config, decoder: Any) -> None:
    """Check that samples and the KV cache are no longer than the positions that the model has.

    Raises:
        UserError: naming the setting that is too large.
    """
    longest = decoder.max_seq_len
    lengths = {
        "tokenizer.max_seq_len": c.tokenizer.get("max_seq_len") or 0,
        "export.max_context_length": c.export.max_context_length,
    }
    for setting, length in lengths.items():
        if length > longest:
            raise UserError(f"{setting}={length} is above the model's max_seq_len={longest}; lower it")


def check_prompt(c: Config, tokenizer: Any = None) -> None:
    """Check that the exported file can take the whole of `export.prompt`.

    Args:
        c: the run's settings.
        tokenizer: of the run, if it is there already.

    Raises:
        UserError: the context has no room for it, or a chat template is asked for and there is none.
    """
    e, tokenizer = c.export, tokenizer or tokenizer_of(c)
    length = len(prompt_tokens(tokenizer, e.prompt, e.chat))
    if c.evaluate.tasks and c.evaluate.tasks_chat:
        prompt_tokens(tokenizer, e.prompt, chat=True)
    if length > e.room_for_prompt:
        raise UserError(
            f"export.prompt={e.prompt[:40]!r}{'…' * (len(e.prompt) > 40)} has {length} tokens, and "
            f"export.max_context_length={e.max_context_length} leaves room for {e.room_for_prompt} beside "
            f"export.max_new_tokens={e.max_new_tokens}; shorten it, or change these"
        )


def check_adapters(c: Config) -> None:
    """Check the adapters to be exported with the model; the run may still make those in its own folder.

    Raises:
        UserError: naming the folder that is missing or cannot be applied.
    """
    own = Path(c.output_dir).absolute()
    for name, folder in c.export.adapters.items():
        if own not in Path(folder).absolute().parents:
            try:
                check_peft(Path(folder), c.adapters.rank, c.export.trust_adapters)
            except UserError as e:
                raise UserError(f"export.adapters.{name}={e}") from e


# --- a training stage ------------------------------------------------------------------------------------------------


def check_stage(c: Config, name: str) -> None:
    """Check a training stage and every row of its data.

    Raises:
        UserError: the first thing that would stop it.
    """
    check_training(c, name)
    check_training_data(c, name, tokenizer_of(c))


def check_training(c: Config, name: str) -> None:
    """Check what is quickly checked of a training stage: ranks, data files, optimizer, schedule and loss.

    Raises:
        UserError: the first thing that would stop it.
    """
    training: TrainingConfig = c.section(name)
    check_ranks(training, name, world_size())
    check_files(training.dataset, f"{name}.dataset")
    optimizer = try_optimizer(training.optimizer, f"{name}.optimizer", vectors=name != "qat_lora", c=c)
    if uses_deepspeed(c):
        check_optimizer(optimizer, c)
    if training.lr_scheduler is not None:
        instantiate(training.lr_scheduler, optimizer, num_training_steps=1, setting=f"{name}.lr_scheduler")
    if training.max_steps is not None:
        check_warmup(training, name, training.max_steps)
    if name == "qat_dpo":
        instantiate(c.section(name).loss, setting="qat_dpo.loss")


def try_optimizer(component: Component, setting: str, vectors: bool, c: Config) -> torch.optim.Optimizer:
    """Return the optimizer after a step on two small weights, whose state then shows whether it can be resumed.

    Args:
        component: the optimizer's section.
        setting: its name, for errors.
        vectors: whether the stage trains vectors (norms) beside matrices; some optimizers take matrices only.
        c: the run's settings.

    Raises:
        UserError: arguments out of range, a step that needs a closure, or a state that checkpoints cannot hold.
    """
    device = pick_device(c.device)
    shapes = [(64, 64), (64,)] if vectors else [(64, 64)]
    weights = [nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    name = component["_component_"]
    try:
        optimizer = instantiate(component, weights, setting=setting)
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(f"{setting}: {name} takes a closure in each step, and no stage has one; use another")
        for w in weights:
            w.grad = torch.full_like(w, 1e-3)
        optimizer.step()
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{setting}: {name}: {' '.join(str(e).split()) or type(e).__name__}") from e
    for w in weights:
        for kind, value in optimizer.state[w].items():
            if not _can_be_kept(value, w):
                raise UserError(
                    f"{setting}: {name} keeps '{kind}', which is not one number a weight: such an optimizer cannot be "
                    "resumed; use another, e.g. torch.optim.AdamW"
                )
    return optimizer


def _can_be_kept(value: Any, weight: Tensor) -> bool:
    """Tell whether a checkpoint can hold a part of an optimizer's state; see `Engine.state`."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter)
        return plain and (value.ndim == 0 or (value.shape == weight.shape and value.is_floating_point()))
    return value is None or isinstance(value, (int, float))


def check_warmup(training: TrainingConfig, stage: str, steps: int) -> None:
    """Check that the stage goes on after the warm-up.

    Raises:
        UserError: its learning rate would never be reached.
    """
    if training.warmup_steps and training.warmup_steps >= steps:
        raise UserError(
            f"{stage}.lr_scheduler.num_warmup_steps={training.warmup_steps}, but {stage} has only {steps} steps: it "
            "would end before its learning rate is reached; lower it, or train longer"
        )


# --- data ------------------------------------------------------------------------------------------------------------


def other_data(c: Config) -> dict[str, Component]:
    """Return the datasets that no stage trains on, by setting."""
    parts = c.spinquant.calibration if c.spinquant else []
    calibration = {f"spinquant.calibration[{i}].dataset": part.dataset for i, part in enumerate(parts)}
    return calibration | {"evaluate.dataset": c.evaluate.dataset}


def check_all_data(c: Config, stages: list[str], others: dict[str, Component], tokenizer: Any) -> None:
    """Check and tokenize every row that the run reads; drop what its cache holds of data that it reads no longer.

    Raises:
        UserError: rows that are wrong, or samples longer than the model.
    """
    read = [check_training_data(c, name, tokenizer) for name in stages]
    for setting, dataset in others.items():
        read.append(build_on_all_ranks(dataset, tokenizer, setting, cache_of(c)))
        check_longest(c, read[-1], setting)
    used = {samples.prepared.folder.name for samples in read if hasattr(samples, "prepared")}
    from_rank_zero(lambda: keep_only(cache_of(c), used))


def check_training_data(c: Config, name: str, tokenizer: Any) -> Any:
    """Check every row of a training stage's data, and that there are steps enough; return the samples.

    Raises:
        UserError: a row that is wrong, samples longer than the model, or a warm-up longer than the stage.
    """
    training: TrainingConfig = c.section(name)
    samples = training_samples(training, tokenizer, name, cache_of(c))
    check_longest(c, samples, f"{name}.dataset")
    check_warmup(training, name, total_steps(training, len(samples)))
    return samples


def check_longest(c: Config, samples: Any, setting: str) -> None:
    """Check that no sample has more tokens than the model has positions.

    Raises:
        UserError: one has, which only `tokenizer.max_seq_len` can be to blame for.
    """
    positions = meta_decoder(c.model).max_seq_len
    longest = samples.prepared.meta["longest"] if hasattr(samples, "prepared") else 0
    if longest > positions:
        raise UserError(
            f"{setting}: a sample has {longest} tokens, and the model's max_seq_len is {positions}; set "
            f"tokenizer.max_seq_len={positions}, which cuts longer ones"
        )
