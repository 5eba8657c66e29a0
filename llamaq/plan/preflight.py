"""Check everything that a run will read before its first step: settings of every stage, data files, model, disk."""

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.checkpoints.meta import model_params
from llamaq.config import Component, Config, TrainingConfig
from llamaq.config.components import instantiate
from llamaq.data.batches import check_ranks
from llamaq.data.datasets import check_files
from llamaq.data.tokenizer import build_tokenizer, prompt_tokens, tokenizer_of
from llamaq.errors import UserError
from llamaq.model.build import meta_decoder, pick_device, scheme_of
from llamaq.model.shape import Shape, shape_of
from llamaq.plan.memory import plan_length, state_plan
from llamaq.quant.prepare import prepare
from llamaq.runs.ranks import world_size
from llamaq.train.deepspeed import check_deepspeed, check_optimizer, uses_deepspeed
from llamaq.train.loop import total_steps

# datasets that make one sample of each line of a JSON-lines file
LINE_BY_LINE = ("chat_dataset", "instruct_dataset", "preference_dataset", "text_completion_dataset")


def preflight(c: Config) -> str:
    """Check a run and return its plan of memory and disk, to be printed.

    Raises:
        UserError: the first thing that would stop one of the stages.
    """
    device = check_device(c.device)
    if uses_deepspeed(c):
        check_deepspeed(c, device.type)
    decoder = check_model(c)
    check_lengths(c, decoder)
    prepare(decoder, scheme_of(c))
    model_params(decoder)
    check_prompt(c, build_tokenizer(c.tokenizer, shape_of(c.model).vocab))
    check_adapters(c)
    for name in ("qat", "qat_lora", "qat_dpo", "base"):
        if getattr(c, name) is not None:
            check_stage(c, name)
    for i, part in enumerate(c.spinquant.calibration if c.spinquant else []):
        check_files(part.dataset, f"spinquant.calibration[{i}].dataset")
    check_files(c.evaluate.dataset, "evaluate.dataset")
    return state_plan(c, plan_length(c))


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
    """Check that the adapters to be exported with the model are there; the run may still make those in its own folder.

    Raises:
        UserError: naming the folder that is missing.
    """
    own = Path(c.output_dir).absolute()
    for name, folder in c.export.adapters.items():
        if not Path(folder).is_dir() and own not in Path(folder).absolute().parents:
            raise UserError(f"export.adapters.{name}={folder}: no such folder; give one that PEFT has written")


# --- a training stage ------------------------------------------------------------------------------------------------


def check_stage(c: Config, name: str) -> None:
    """Check a training stage: ranks, data files, optimizer, schedule and loss.

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
    check_warmup(training, name)
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


def check_warmup(training: TrainingConfig, stage: str) -> None:
    """Check that the stage goes on after the warm-up, as far as its number of steps is known before it reads its data.

    Raises:
        UserError: its learning rate would never be reached.
    """
    samples = count_samples(training.dataset)
    known = [training.max_steps, None if samples is None else total_steps(training, samples)]
    steps = min((n for n in known if n is not None), default=math.inf)
    if training.warmup_steps and training.warmup_steps >= steps:
        raise UserError(
            f"{stage}.lr_scheduler.num_warmup_steps={training.warmup_steps}, but {stage} has only {steps} steps: it "
            "would end before its learning rate is reached; lower it, or train longer"
        )


def count_samples(dataset: Component) -> int | None:
    """Return the most samples that a dataset of local JSON-lines files can have, None if it cannot be told quickly."""
    files = dataset.get("data_files")
    files = [files] if isinstance(files, str) else files
    kind = dataset["_component_"].rsplit(".", 1)[-1]
    if kind not in LINE_BY_LINE or dataset.get("packed") or dataset.get("source") != "json" or not files:
        return None
    counts = [_count_lines(Path(file)) for file in files]
    return None if None in counts else sum(n for n in counts if n is not None)


def _count_lines(path: Path) -> int | None:
    """Return the number of lines that are not blank; None for a file with one JSON array."""
    with path.open(encoding="utf-8") as f:
        if f.read(1) == "[":
            return None
        f.seek(0)
        return sum(1 for line in f if line.strip())
