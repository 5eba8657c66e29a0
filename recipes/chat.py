"""Talk to a model of a finished run in the terminal, answer by answer, with the whole conversation in its KV cache.

    tune run chat --config llama3_2/1B_qat_lora_dpo [chat.model=bf16]      the exported .pte, or any model of the run
    tune run chat runs/1B/export/model.pte                                 the same; the run says how it was made
    tune run chat --config … chat.compare=bf16                             every question to both
    tune run chat --config … chat.once="What is a leap year?"              prints the answer and nothing else

It only reads the run, so another process may be training in it. Prompts go through the template of the training data
(plain text with `export.chat=false`). /help lists the commands.
"""

import difflib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from llamaq.chat.conversation import Conversation, Model
from llamaq.chat.eager import CachedModel
from llamaq.chat.terminal import answer_once, talk
from llamaq.config import Config, load, parse_arguments
from llamaq.data.tokenizer import tokenizer_of
from llamaq.errors import UserError
from llamaq.evaluate.models import Models
from llamaq.export.pte import Pte
from llamaq.families import complete
from llamaq.model.build import pick_device
from llamaq.recipes.evaluate import chain_models
from llamaq.recipes.spinquant import SHIPPED, models_of
from llamaq.runs.main import errors_on_one_line
from llamaq.runs.reader import RunReader, recorded_config


def configured(argv: list[str]) -> Config:
    """Return the settings: of `--config`, or those that a run has recorded where `--config` is a .pte of it."""
    if {"-h", "--help"} & set(argv):
        parse_arguments(argv, __doc__ or "")
    config, overrides = parse_arguments(argv, "")
    if not config.endswith(".pte"):
        return complete(load(config, overrides))
    if not (file := Path(config)).is_file():
        raise UserError(f"{file}: no such file")
    stage = file.absolute().parent
    if stage.name != "export":
        overrides = [f"chat.model={stage.name.removeprefix('export_')}", *overrides]
    return recorded_config(stage.parent, ["convert", "answer", stage.name], overrides)


def models_in(run: RunReader) -> Models:
    """Describe the models of the run, whichever recipe made it."""
    c = run.config
    rotated = (c.spinquant is not None and c.qat is None) or run.has(run.path(SHIPPED))
    return models_of(run) if rotated else chain_models(run)


def files_of(run: RunReader, models: Models) -> dict[str, tuple[Path, str]]:
    """Return file and method of everything that is exported, by the names that `chat.model` can have."""
    shipped = run.path("export") / "model.pte"
    files = {name: (run.path(f"export_{name}") / "model.pte", "forward") for name in models.known}
    files |= {models.shipped: (shipped, "forward")} | {m: (shipped, m) for m in run.config.export.adapters}
    return {name: where for name, where in files.items() if where[0].is_file()}


def open_model(run: RunReader, setting: str, name: str | None) -> tuple[str, Model]:
    """Return a model and its label: a .pte if there is one, else the model as llamaq computes it.

    Raises:
        UserError: an unknown name, or a model that the run has not made yet.
    """
    if name and name.endswith(".pte") and Path(name).is_file():
        return name, Pte(name)
    models = models_in(run)
    files = files_of(run, models)
    wanted = models.shipped if name is None else name.removesuffix(".pte")
    if wanted in files:
        file, method = files[wanted]
        if changed := run.changed_since(file.parent.name):
            print(f"note: stage {changed} has been run again since {file} was exported", file=sys.stderr)
        return f"{wanted}.pte", Pte(file, method)
    known = [*models.known, *(n for n in files if n not in models.known)]
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise UserError(f"{setting}={name}: this run has no model of this name; {hint}")
    missing = [p.name for p in models.known[wanted].inputs if not run.has(p)]
    if name != wanted or missing or not models.known[wanted].inputs:
        raise UserError(_not_yet(run, models, setting, name, missing))
    context = run.config.export.max_context_length
    return wanted, CachedModel(models.known[wanted].make(), context, pick_device(run.config.device))


def _not_yet(run: RunReader, models: Models, setting: str, name: str | None, missing: list[str]) -> str:
    """Say what has to be run before there is such a model, and which there are."""
    file = name is None or name.endswith(".pte")
    what = "has no exported file yet" if name is None else f"has no {name} yet"
    remedy = (
        "export it (tune run export_executorch, or the whole chain)"
        if file
        else f"run {', '.join(missing) or 'the chain'} first"
    )
    ready = [n for n, m in models.known.items() if m.inputs and all(map(run.has, m.inputs))]
    others = f", or choose {setting}={' or '.join(ready)}" if ready else ""
    return f"{run.folder} {what}; {remedy}{others}"


def sides(run: RunReader) -> Iterator[tuple[str, Conversation]]:
    """Yield the labels and conversations with the models that the config asks for."""
    c, tokenizer = run.config.chat, tokenizer_of(run.config)
    if c.system is not None and not run.config.export.chat:
        raise UserError("chat.system needs a chat template, and export.chat=false says that the model has none")
    wanted = {"chat.model": c.model} | ({"chat.compare": c.compare} if c.compare else {})
    for setting, name in wanted.items():
        label, model = open_model(run, setting, name)
        yield label, Conversation(model, tokenizer, c, run.config.export.chat)


def chat(run: RunReader) -> None:
    """Answer one question, or talk until the user leaves."""
    found = list(sides(run))
    if len({label for label, _ in found}) < len(found):
        raise UserError(f"chat.compare={run.config.chat.compare} is the same model as chat.model ({found[0][0]})")
    once = run.config.chat.once
    if once is None:
        talk(dict(found))
    else:
        answer_once(dict(found), sys.stdin.read().strip() if once == "-" else once)


if __name__ == "__main__":
    try:
        with errors_on_one_line():
            if os.environ.get("WORLD_SIZE", "1") != "1":
                raise UserError("chat runs in one process; leave --nproc_per_node out")
            chat(RunReader(configured(sys.argv[1:])))
    except KeyboardInterrupt:  # while a model is loaded, or with chat.once
        sys.exit(128 + signal.SIGINT)
