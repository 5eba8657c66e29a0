"""What stands behind a recipe's name on the command line: `--config NAME`, `key=value` settings, or `--help`."""

import sys

from llamaq.config.installed import packaged_configs
from llamaq.errors import UserError

HELP = ("-h", "--help")


def parse_arguments(argv: list[str], usage: str) -> tuple[str, list[str]]:
    """Split a recipe's command line into the config's name and the overrides; with `--help` print help and exit.

    Args:
        argv: what follows the recipe's name.
        usage: the recipe's docstring, which begins its help.

    Raises:
        UserError: an option that does not exist, or no config.
    """
    if any(word in HELP for word in argv):
        print(help_text(argv, usage))
        sys.exit(0)
    config, overrides, others = split_arguments(argv)
    for word in others:
        if word.startswith("-"):
            raise UserError(f"unknown option {word}: settings are given as key=value, without dashes")
        raise UserError(f"'{word}' is neither --config nor key=value")
    if config is None:
        raise UserError(f"--config is required: one of {', '.join(packaged_configs())}, or a YAML file")
    return config, overrides


def help_text(argv: list[str], usage: str) -> str:
    """Return the help that a command line with `--help` asks for: of the recipe, or of the settings it names.

    Raises:
        UserError: there is no setting of a name, or the config is wrong.
    """
    from llamaq.config.help import about, overview
    from llamaq.config.load import load

    name, overrides, others = split_arguments([word for word in argv if word not in HELP])
    config = load(name, overrides) if name is not None else None
    if others:
        return about(others, config)
    return overview(usage, config, name)


def split_arguments(argv: list[str]) -> tuple[str | None, list[str], list[str]]:
    """Split words into the config's name (or None), the overrides (`key=value`, `~key`) and all others.

    Raises:
        UserError: `--config` is the last word.
    """
    config: str | None = None
    overrides: list[str] = []
    others: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--config":
            config = next(rest, None)
            if config is None:
                raise UserError("--config needs a name or a file after it")
        elif word.startswith("--config="):
            config = word.removeprefix("--config=")
        elif not word.startswith("-") and ("=" in word or word.startswith("~")):
            overrides.append(word)
        else:
            others.append(word)
    return config, overrides, others
