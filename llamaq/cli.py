"""The `tune` command: torchtune's, plus our recipes and configs, plus Ray's own subcommands handed to Ray.

    tune ls                                     recipes and configs, ours first
    tune run RECIPE --config CONFIG [k=v …]     run one; torchrun options go before RECIPE (--nproc_per_node 2)
    tune submit RECIPE --config CONFIG --address http://HEAD:8265 --num-workers N [k=v …]    the same on a Ray cluster
    tune cp | cat | validate | download …       as in torchtune
    tune lsx | list-trials | list-experiments | add-note | ls FOLDER …    Ray Tune's

Ray and torchtune install a script of the same name; `llamaq …` and `python -m llamaq …` are this one for sure.
"""

import argparse
import sys
from pathlib import Path

from llamaq import torchao_compat  # noqa: F401  (first: torchtune does not import without it)
from llamaq.config import load, packaged_configs, recipes_dir
from llamaq.errors import UserError

# recipe → the configs listed under it; a config file serves the chain and each of its stages
RECIPES = ["qat_lora_dpo", "qat", "qat_lora", "qat_dpo", "spinquant", "export_executorch", "evaluate"]
RAY_COMMANDS = ("lsx", "list-trials", "list-experiments", "add-note")


def register_recipes() -> None:
    """Put our recipes in front of torchtune's, so that `ls`, `cp`, `cat` and `run` find them. Idempotent."""
    from torchtune import _recipe_registry as registry

    if any(r.name == RECIPES[0] for r in registry._ALL_RECIPES):
        return
    # pathlib lets an absolute path win over torchtune's own recipe folder, everywhere it joins them
    configs = [registry.Config(name=name, file_path=str(path)) for name, path in packaged_configs().items()]
    ours = [
        registry.Recipe(
            name=name,
            file_path=str(recipes_dir() / f"{name}.py"),
            configs=[c for c in configs if c.name.endswith("spinquant") == (name == "spinquant")]
            if name in (RECIPES[0], "spinquant")
            else [],
            supports_distributed=True,
        )
        for name in RECIPES
    ]
    registry._ALL_RECIPES[:0] = ours


def main() -> None:
    """Entry point of `tune`, `llamaq` and `python -m llamaq`."""
    if _is_for_ray(sys.argv[1:]):
        _ray()
        return
    if sys.argv[1:2] == ["submit"]:
        from llamaq.cluster.submit import main as submit  # pyright: ignore[reportMissingImports]

        sys.exit(submit(sys.argv[2:]))
    register_recipes()
    _patch_torchtune()
    from torchtune._cli.tune import TuneCLIParser

    parser = TuneCLIParser()
    parser._parser.description = "llamaq: torchtune's command line with the quantized training chain added."
    parser._parser.epilog = "examples: tune run qat_lora_dpo --config tiny; tune submit --help (a Ray cluster)"
    parser.run(parser.parse_args())


def _is_for_ray(argv: list[str]) -> bool:
    ls_of_a_folder = argv[:1] == ["ls"] and len(argv) > 1 and argv[1] not in ("-h", "--help")
    return bool(argv) and (argv[0] in RAY_COMMANDS or ls_of_a_folder)


def _ray() -> None:
    try:
        from ray.tune.cli.scripts import cli
    except ImportError:
        sys.exit(f"tune {sys.argv[1]} is Ray Tune's command, and Ray is not installed: pip install 'llamaq[cluster]'")
    cli()


def _patch_torchtune() -> None:
    """Two changes to torchtune's commands, both small enough to read here."""
    from torchtune._cli.run import Run
    from torchtune._cli.validate import Validate

    run_distributed, run_single, validate = Run._run_distributed, Run._run_single_device, Validate._validate_cmd

    def through_launch(self: Run, args: argparse.Namespace, is_builtin: bool) -> None:
        # torchrun starts fresh interpreters, which know neither the compatibility names nor our registry
        args.recipe_args = [str(args.recipe), *args.recipe_args]
        args.recipe = "llamaq.launch"
        run_distributed(self, args, is_builtin=False)

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
                load(str(path))
            except UserError as e:
                self._parser.error(str(e))
            print("Config is well-formed!")
            return
        validate(self, args)

    Run._run_distributed = through_launch
    Run._run_single_device = with_known_recipe
    Validate._validate_cmd = names_too
