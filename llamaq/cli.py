"""The `tune` command: torchtune's, plus our recipes, configs and commands, plus Ray's own handed to Ray (`OVERVIEW`).

Ray and torchtune install a script of the same name; `llamaq …` and `python -m llamaq …` are this one for sure.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from llamaq.config import Config, load, packaged_configs, parse_arguments, recipes_dir
from llamaq.config.arguments import HELP
from llamaq.errors import UserError
from llamaq.runs import signals

# A config file serves the chain and each of its stages, so `tune ls` lists configs under the chain and SpinQuant only.
RECIPES = ["qat_lora_dpo", "qat", "qat_lora", "qat_dpo", "spinquant", "export_executorch", "evaluate", "chat"]
# commands that are neither torchtune's nor Ray's: the module whose `main` takes the arguments
OWN_COMMANDS = {
    "submit": "llamaq.cluster.submit",
    "inspect": "llamaq.plan.inspect",
    "compare": "llamaq.report.compare",
    "publish": "llamaq.report.hub",
}
TORCHTUNES_COMMANDS = ("download", "ls", "cp", "run", "validate", "cat")
RAY_COMMANDS = ("lsx", "list-trials", "list-experiments", "add-note")

OVERVIEW = """\
usage: tune COMMAND …        (llamaq COMMAND … and python -m llamaq COMMAND … are the same)

llamaq: torchtune's command line with the quantized training chain added.

  run RECIPE --config CONFIG [key=value …]   run a recipe; torchrun options go before RECIPE (--nproc_per_node 2)
  run RECIPE --help [SETTING …]              what it does, and every setting or some
  inspect FOLDER | FILE …                    what a model folder or a data file is, and what llamaq makes of it
  submit RECIPE --config CONFIG …            run a recipe on a Ray cluster
  compare RUN RUN …                          runs side by side on one page
  publish RUN --repo NAME [--dry-run]        send what a run ships to the Hugging Face Hub
  ls                                         list recipes and configs
  cp NAME FILE                               copy a config or recipe to edit it; an existing file is kept
  cat CONFIG                                 print a config
  validate CONFIG                            check a config
  download REPO …                            download a model from the Hugging Face Hub or Kaggle (torchtune's)

Ray Tune's: lsx, list-trials, list-experiments, add-note, ls FOLDER. More on each: tune COMMAND --help.

examples:
  tune run qat_lora_dpo --config tiny
  tune run qat --help qat.optimizer
  tune compare runs/a runs/b"""


def register_recipes() -> None:
    """Put our recipes in front of torchtune's, so that `ls`, `cp`, `cat` and `run` find them. Idempotent."""
    from llamaq import torchao_compat  # noqa: F401  (first: torchtune does not import without it)

    # isort: split
    from torchtune import _recipe_registry as registry

    if any(r.name == RECIPES[0] for r in registry._ALL_RECIPES):
        return
    # pathlib lets an absolute path win over torchtune's own recipe folder, everywhere it joins them
    configs = [registry.Config(name=name, file_path=str(path)) for name, path in packaged_configs().items()]
    listed = {
        "qat_lora_dpo": [c for c in configs if not c.name.endswith("spinquant")],
        "spinquant": [c for c in configs if c.name.endswith("spinquant") or c.name == "llama"],  # it serves both
    }
    ours = [
        registry.Recipe(
            name=name,
            file_path=str(recipes_dir() / f"{name}.py"),
            configs=listed.get(name, []),
            supports_distributed=True,
        )
        for name in RECIPES
    ]
    registry._ALL_RECIPES[:0] = ours


def main() -> None:
    """Run a command of `tune`, `llamaq` or `python -m llamaq`."""
    stages = sys.argv[1:2] == ["run"] and sys.argv[2:3] != ["chat"]  # chat has its own use for Ctrl-C
    with signals.handled() if stages else contextlib.nullcontext():
        _main()


def _main() -> None:
    command = next(iter(sys.argv[1:]), "--help")
    if command in HELP:
        print(OVERVIEW)
        return
    if command not in (*OWN_COMMANDS, *TORCHTUNES_COMMANDS, *RAY_COMMANDS):
        near = difflib.get_close_matches(command, [*OWN_COMMANDS, *TORCHTUNES_COMMANDS], n=1)
        hint = f"did you mean {near[0]}?" if near else "tune --help lists the commands"
        _refuse(f"no command '{command}'; {hint}")
    if _is_for_ray(sys.argv[1:]):
        _ray()
        return
    if asked := _help_asked_for(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `tune run qat --help | head` ends without a traceback
        _print_help(*asked)
        return
    if module := OWN_COMMANDS.get(command):
        sys.exit(importlib.import_module(module).main(sys.argv[2:]))
    sys.argv = _with_config(sys.argv) + ["--no-clobber"] * (command == "cp")  # an edited copy is not overwritten
    _check_words(sys.argv[1:])
    register_recipes()
    _patch_torchtune()
    from torchtune._cli.tune import TuneCLIParser

    parser = TuneCLIParser()
    parser.run(parser.parse_args())


def _check_words(argv: list[str]) -> None:
    """Answer what torchtune answers without a name: a recipe without a config, a config that is not known."""
    command, words = argv[0], argv[1:]
    at = _recipe_at(words) if command == "run" else None
    if at is not None and "--config" not in words:
        _refuse(f"which config? tune run {words[at]} --config NAME; {', '.join(packaged_configs())}, or a YAML file")
    name = next((w for w in words if not w.startswith("-")), None) if command == "cat" else None
    if not name or name in packaged_configs() or Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        return
    if near := difflib.get_close_matches(name, packaged_configs(), n=1):
        _refuse(f"no config '{name}'; did you mean {near[0]}?")


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _with_config(argv: list[str]) -> list[str]:
    """Put --config, without which torchtune runs nothing, before what says itself how it was made.

    That is the file in `tune run chat MODEL.pte`, and a file or a folder in `tune run evaluate PATH` or `tune run
    evaluate output_dir=RUN`.
    """
    at = _recipe_at(argv[2:]) if argv[1:2] == ["run"] else None
    if at is None or "--config" in argv:
        return argv
    recipe, rest = argv[at + 2], argv[at + 3 :]
    named = bool(rest) and not rest[0].startswith(("-", "~")) and "=" not in rest[0]
    if named and (recipe == "evaluate" or (recipe == "chat" and rest[0].endswith(".pte"))):
        return [*argv[: at + 3], "--config", *rest]
    runs = [word.partition("=")[2] for word in rest if word.startswith("output_dir=")]
    return [*argv, "--config", runs[-1]] if recipe == "evaluate" and runs else argv


def _recipe_at(words: list[str]) -> int | None:
    """Return where a recipe of ours stands among the words after `run`; None if it is not one of ours.

    It is the first word that is neither a torchrun option nor an option's value.
    """
    for i, word in enumerate(words):
        if word in RECIPES:
            return i
        if not word.startswith("-") and not (i and words[i - 1].startswith("-")):
            return None
    return None


def _help_asked_for(argv: list[str]) -> tuple[str, list[str]] | None:
    """Return the recipe of ours whose help is asked for, and the words after it; else None."""
    words = argv[1:] if argv[:1] == ["run"] else []
    if (at := _recipe_at(words)) is None or not set(HELP) & set(words[at + 1 :]):
        return None
    return words[at], words[at + 1 :]


def _print_help(recipe: str, arguments: list[str]) -> None:
    """Print help from the recipe's source: importing the recipe, and torch with it, would take seconds."""
    usage = ast.get_docstring(ast.parse((recipes_dir() / f"{recipe}.py").read_text(encoding="utf-8")))
    try:
        parse_arguments(arguments, usage or "")
    except UserError as e:
        sys.exit(f"error: {e}")


def _is_for_ray(argv: list[str]) -> bool:
    ls_of_a_folder = argv[:1] == ["ls"] and len(argv) > 1 and argv[1] not in ("-h", "--help")
    return bool(argv) and (argv[0] in RAY_COMMANDS or ls_of_a_folder)


def _ray() -> None:
    try:
        from ray.tune.cli.scripts import cli
    except ImportError:
        sys.exit(f"tune {sys.argv[1]} is Ray Tune's command, and Ray is not installed: pip install 'llamaq[cluster]'")
    cli()


def _status_of_stop(e: Exception) -> int | None:
    """Return the exit status if torchrun ended because of a signal, to itself or to its ranks; else None."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(e, SignalException):
        return 128 + e.sigval
    if isinstance(e, ChildFailedError):
        statuses = {failure.exitcode for failure in e.failures.values()}
        return max(statuses) if statuses <= {128 + s for s in signals.SIGNALS} else None
    return None


def _check_with_checkpoint(config: Config) -> None:
    """Check a config against its checkpoint, if that is on this machine."""
    from llamaq.checkpoints.load import check_start
    from llamaq.families import complete
    from llamaq.model.build import meta_decoder

    if config.base is None and Path(config.checkpoint_dir).is_dir():
        check_start(config.checkpoint_dir, meta_decoder(complete(config).model))


def _patch_torchtune() -> None:
    """Change torchtune's `run` and `validate`, in ways small enough to read here."""
    from torchtune._cli.run import Run
    from torchtune._cli.validate import Validate

    run_distributed, run_single, validate = Run._run_distributed, Run._run_single_device, Validate._validate_cmd

    def through_launch(self: Run, args: argparse.Namespace, is_builtin: bool) -> None:
        # torchrun starts fresh interpreters, which know neither the compatibility names nor our registry
        args.recipe_args = [str(args.recipe), *args.recipe_args]
        args.recipe = "llamaq.launch"
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")  # torchrun kills ranks that need longer to stop
        with signals.patient():
            try:
                run_distributed(self, args, is_builtin=False)
            except Exception as e:
                if (status := _status_of_stop(e)) is None:
                    raise
                sys.exit(status)

    def with_known_recipe(self: Run, args: argparse.Namespace, is_builtin: bool) -> None:
        if not is_builtin and "." not in args.recipe and not Path(f"{args.recipe}.py").exists():
            self._parser.error(f"no recipe or module '{args.recipe}' (tune ls lists the recipes)")
        run_single(self, args, is_builtin)

    def names_too(self: Validate, args: argparse.Namespace) -> None:
        from omegaconf import OmegaConf

        path = packaged_configs().get(str(args.config), Path(args.config))
        if not path.is_file():
            self._parser.error(f"no config file or packaged config '{args.config}'")
        if not {"qat", "scheme", "export"}.isdisjoint(OmegaConf.load(path)):  # one of ours
            try:
                _check_with_checkpoint(load(str(path)))
            except UserError as e:
                self._parser.error(str(e))
            print("Config is well-formed!")
            return
        validate(self, args)

    Run._run_distributed = through_launch
    Run._run_single_device = with_known_recipe
    Validate._validate_cmd = names_too
