"""Help on settings, made from the texts in the schema: for the terminal, and as docs/settings.md.

tune run qat --help                        a recipe and all settings, a line each
tune run qat --help qat.optimizer export   all about a setting or a section
python -m llamaq.config.help > docs/settings.md
"""

import difflib
import re
import textwrap
from typing import Any

from omegaconf import MISSING, OmegaConf

from llamaq.config.describe import Section, Setting, sections
from llamaq.config.installed import packaged_configs
from llamaq.config.schema import Config
from llamaq.errors import UserError

WIDTH = 100
NAMES = 36  # columns of a setting's name and value
HOW = """
Settings stand in the YAML file of `--config`. On the command line `key=value` changes one, `key=null` unsets it, and
`~key` deletes it or a whole section: `qat.max_steps=100`, `evaluate.tasks=[mmlu,gsm8k]`, `~base`. In a value,
`${data_dir}` stands for another setting. Text is taken as it is typed, and `~/` in a path is your home
folder. `tune cp tiny mine.yaml` copies a config to edit.
"""
COMPONENTS = """
`_component_` names a function or class by its Python path: one of torchtune, of torch, or of a module of your own in
the current folder. The other keys of the section are its arguments.
"""


# --- the terminal ----------------------------------------------------------------------------------------------------


def overview(usage: str, config: Config | None = None, config_name: str | None = None) -> str:
    """Return a recipe's help: its docstring, how to set settings, and all settings with a line each.

    Args:
        usage: the recipe's docstring.
        config: if given, its values stand beside the names, and only the sections it has are listed.
        config_name: its name.
    """
    configs = f"Configs: {', '.join(packaged_configs())}, or a YAML file."
    more = "With --config NAME, --help shows that config's values; --help qat.optimizer export shows the full text."
    brackets = f"In brackets: the values of {config_name}." if config else "In brackets: the defaults."
    parts = [_refilled(usage.strip()), "SETTINGS", *map(_wrapped, (HOW, configs, f"{more} {brackets}"))]
    if config is None:
        parts += [_table(group, _own(group), None) for group in _groups()]
    else:
        present = [s for s in sections() if not s.name or getattr(config, s.name) is not None]
        parts += [_table([s], s.settings, config) for s in present]
    return "\n\n".join([*parts, _wrapped(f"* {COMPONENTS.strip()}")])


def about(topics: list[str], config: Config | None = None) -> str:
    """Return the full text on sections, on settings, or on all settings whose names begin with a topic.

    Args:
        topics: e.g. `export`, `qat.optimizer`, `evaluate.speed`.
        config: if given, its values are shown too.

    Raises:
        UserError: nothing has such a name; the message says what comes nearest.
    """
    blocks: list[str] = []
    found: list[Setting] = []
    for topic in topics:
        name = re.sub(r"\[\d+\]|\.\d+\b", ".N", topic)
        section = next((s for s in sections() if s.name == name), None)
        settings = section.settings if section else _matching(name)
        if not settings:
            raise UserError(f"--help {topic}: there is no setting or section of this name; {_nearest(name)}")
        blocks += [f"{section.name}\n{_wrapped(section.text, '    ')}"] if section else []
        blocks += [_block(s, config) for s in settings]
        found += settings
    if any(s.is_component for s in found):
        blocks.append(_wrapped(COMPONENTS))
    return "\n\n".join(blocks)


def _matching(name: str) -> list[Setting]:
    every = [s for section in sections() for s in section.settings]
    inside = [s for s in every if f"{s.path}.".startswith(f"{name}.")]
    around = [s for s in every if name.startswith(f"{s.path}.") and (s.is_component or s.default == {})]
    return inside or around or [s for s in every if s.path.startswith(name)]


def _nearest(name: str) -> str:
    known: dict[str, list[str]] = {s.name: [s.name] for s in sections() if s.name}
    for setting in (s for section in sections() for s in section.settings):
        known.setdefault(setting.path, []).append(setting.path)
        if setting.name != setting.path:
            known.setdefault(setting.name, []).append(setting.path)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {' or '.join(known[near[0]])}?"
    return f"sections: {', '.join(s.name for s in sections() if s.name)}"


def _table(group: list[Section], settings: tuple[Setting, ...], config: Config | None) -> str:
    """Return a heading, what the sections are for, and a line for each setting."""
    lines = [", ".join(f"{s.name}.*" for s in group)] if group[0].name else []
    lines += [_wrapped(text, "  ") for text in _purposes(group)] if group[0].name else []
    for s in settings:
        value, meaning = _value(s, config), _first_sentence(s.text)
        if config is not None and value != s.default and s.default not in (MISSING, None):
            meaning += f" (default: {_shown(s.default)})"
        label = f"  {_label(s.name, value)}{' *' if s.is_component else ''}"
        if len(label) > NAMES - 2:
            lines.append(label)
            label = ""
        lines.append(_wrapped(f"{label:{NAMES}}{meaning}", hanging=" " * NAMES))
    return "\n".join(lines)


def _block(s: Setting, config: Config | None) -> str:
    """Return everything about one setting."""
    value = _value(s, config)
    changed = config is not None and value != s.default and s.default != MISSING
    lines = [_label(s.path, value) + (f", default {_shown(s.default)}" if changed else "")]
    lines.append(_wrapped(s.text, "    "))
    if s.is_component and isinstance(value, dict):
        lines.append(textwrap.indent(OmegaConf.to_yaml(OmegaConf.create(value)).rstrip(), " " * 8))
    elif s.is_component and (example := re.search(r"`(\w+(?:\.\w+)+)`", s.text)):
        lines.append(f"    Example: {s.path.replace('.N.', '.0.')}._component_={example[1]}")
    return "\n".join(lines)


def _value(s: Setting, config: Config | None) -> Any:
    """Return a setting's value in the config, or its default where there is no config or no such place in it."""
    if config is None or ".N." in s.path:
        return s.default
    value: Any = config
    for part in s.path.split("."):
        if value is None:
            return s.default
        value = getattr(value, part)
    return value


def _label(name: str, value: Any) -> str:
    shown = _shown(value)
    return f"{name} {shown}" if shown.startswith(("[", "{")) else f"{name} [{shown}]"


def _shown(value: Any) -> str:
    """Return a value as it is written on the command line, components by the last part of their name."""
    if value == MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        name = value.get("_component_")
        return str(name).rpartition(".")[2] if name else f"{{{', '.join(value)}}}"
    if isinstance(value, list):  # of words, or of calibration's parts
        return f"[{', '.join(v if isinstance(v, str) else _shown(vars(v)['dataset']) for v in value)}]"
    return str(value)


# --- docs/settings.md ------------------------------------------------------------------------------------------------


def markdown() -> str:
    """Return docs/settings.md."""
    parts = [
        "<!-- Made by `python -m llamaq.config.help > docs/settings.md` from the texts in llamaq/config. -->",
        "# Settings",
        " ".join(HOW.split()),
        f"`tune run qat --help` prints these texts in the terminal, and `tune run qat --help export` one section. "
        f"Settings marked with * have a `_component_`. {' '.join(COMPONENTS.split())}",
        "[Running](running.md#settings-that-change-only-speed-and-memory) lists the settings that cannot change a "
        "result, and says what runs again after a change. [Export](export.md#lengths) compares the settings for "
        "lengths.",
    ]
    for group in _groups():
        title = ", ".join(f"`{s.name}`" for s in group) if group[0].name else "The run"
        rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
        for s in _own(group):
            name, default = f"`{s.name}`{' *' if s.is_component else ''}", _shown(s.default)
            default = default if default == "required" else f"`{default}`"
            rows.append(f"| {name} | {default} | {s.text.replace('|', chr(92) + '|')} |")
        parts += [f"## {title}", *_purposes(group), "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


# --- sections and text -----------------------------------------------------------------------------------------------


def _groups() -> list[list[Section]]:
    """Return the sections, those of the same class together: the training stages differ in nothing else."""
    groups: dict[type, list[Section]] = {}
    for section in sections():
        groups.setdefault(section.schema, []).append(section)
    return list(groups.values())


def _own(group: list[Section]) -> tuple[Setting, ...]:
    """Return the settings that a group does not share with one before it."""
    return tuple(s for s in group[0].settings if not s.inherited)


def _purposes(group: list[Section]) -> list[str]:
    """Return what each section of a group is for."""
    if len(group) > 1:
        return [f"`{s.name}`: {s.text}" for s in group]
    (section,) = group
    shared = [s.name for s in sections() if s.schema in section.schema.__mro__[1:]]
    return [section.text + (f" It also has all settings of {', '.join(shared)}." if shared else "")]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)(?<!e\.g\.)\s+(?=[A-Z`‖(])", text, maxsplit=1)[0]


def _wrapped(text: str, indent: str = "", hanging: str | None = None) -> str:
    text = text if hanging is not None else " ".join(text.split())
    hanging = indent if hanging is None else hanging
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )


def _refilled(docstring: str) -> str:
    """Fit a recipe's docstring into `WIDTH` columns: paragraphs are filled anew, lines of a table wrapped."""
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        lines = paragraph.splitlines()
        if any(line.startswith(" ") for line in lines):
            columns = [re.match(r"\s*(?:\S+(?: \S+)*\s{2,})?", line) for line in lines]
            hanging = [" " * len(m[0]) if m else "" for m in columns]
            lines = [_wrapped(line, hanging=h) for line, h in zip(lines, hanging, strict=True)]
            paragraphs.append("\n".join(lines))
        else:
            paragraphs.append(_wrapped(paragraph))
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    print(markdown(), end="")
