"""How a setting's value is read: text stays as it was typed, and `~` stands for the home folder in paths.

YAML takes `yes`, `007`, `1e3` and `null` for a boolean, two numbers and nothing. A setting that holds text gets the
words of the command line as they are. In a YAML file such a value has to stand in quotes.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any

import yaml

from llamaq.config.schema import Config
from llamaq.errors import UserError

# settings that hold a path, or paths
PATHS = frozenset(
    [
        "output_dir",
        "data_dir",
        "checkpoint_dir",
        "deepspeed.config",
        "export.adapters",
        "evaluate.tasks_dir",
        "evaluate.perplexity_text",
        "chat.model",
        "chat.compare",
    ]
)
# arguments of components (tokenizers, datasets) that hold a path or the name of something, whatever it looks like
COMPONENT_PATHS = (
    *("path", "special_tokens_path", "merges_file", "config", "chat_template", "generation_config"),
    *("source", "data_files", "data_dir"),
)
MAY_BE_UNNAMED = ("model", "tokenizer")  # sections whose `_component_` may come from the checkpoint
COMPONENT_TEXTS = ("_component_", "date", *COMPONENT_PATHS)
TEXT = frozenset([str, list[str], dict[str, str]])


# --- from the command line -------------------------------------------------------------------------------------------


def holds_text(setting: str) -> bool:
    """Tell whether a setting holds text, a list of texts, or texts by name."""
    return not TEXT.isdisjoint(_types_at(setting))


def text_value(setting: str, typed: str) -> Any:
    """Return the value of a setting that holds text: what was typed.

    Args:
        setting: its full name, e.g. `export.prompt`.
        typed: what stands behind the equals sign. `null` is nothing; quotes around the whole are taken off, as in YAML.

    Raises:
        UserError: the setting holds a list, and this is none.
    """
    types = _types_at(setting)
    if typed == "null" or (typed == "" and NoneType in types):
        return None
    many = _without_types(typed) if typed[:1] in ("[", "{") else typed
    if str in types and not (list[str] in types and isinstance(many, list)):
        return _unquoted(typed)
    if list[str] in types and not isinstance(many, list):
        raise UserError(f"{setting}={typed}: give a list, e.g. {setting}=[{typed}]")
    return many


def _types_at(setting: str) -> set[Any]:
    """Return what a setting can hold, e.g. {str, NoneType}."""
    keys = [key for key in re.split(r"[.\[\]]+", setting) if key]
    types: set[Any] = {Config}
    for key in keys:
        (kind, *_) = types - {NoneType}
        if is_dataclass(kind):
            types = _alternatives({f.name: f.type for f in fields(kind)}.get(key, Any))
        elif getattr(kind, "__origin__", None) is list:  # the key is a position
            types = set(kind.__args__)
        elif kind == dict[str, str]:
            types = {str}
        else:  # an argument of a component
            name = next(k for k in reversed(keys) if not k.isdigit())
            return {str, list[str], NoneType} if name in COMPONENT_TEXTS else {Any}
    return types


def _alternatives(annotation: Any) -> set[Any]:
    return set(annotation.__args__) if isinstance(annotation, UnionType) else {annotation}


def _unquoted(typed: str) -> str:
    """Return the text without the quotes that are around all of it."""
    if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "\"'":
        text = _without_types(typed)
        return text if isinstance(text, str) else typed
    return typed


def _without_types(typed: str) -> Any:
    """Return what YAML makes of it, with every number and word as text; the words themselves if it is no YAML.

    A list of references, `[${data_dir}/a.jsonl, b.jsonl]`, is no YAML without quotes, but it is plain what it means.
    """
    try:
        return yaml.load(typed, yaml.BaseLoader)
    except yaml.YAMLError:
        is_list = typed.startswith("[") and typed.endswith("]")
        return [item.strip() for item in typed[1:-1].split(",")] if is_list else typed


# --- from a YAML file ------------------------------------------------------------------------------------------------


def check_texts(raw: Any, source: str) -> None:
    """Check that settings that hold text do so in a YAML file, where YAML reads some words as something else.

    Args:
        raw: the settings as plain containers, with `${…}` unresolved.
        source: the file, for errors.

    Raises:
        UserError: naming the first setting whose value YAML has read as a number or a boolean.
    """
    for setting, value in _scalars(raw, ""):
        if str in _types_at(setting) and not isinstance(value, (str, NoneType)):
            raise UserError(f"{source}: {setting} holds text, and YAML reads its value as {value}; write it in quotes")


def _scalars(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _scalars(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


# --- paths -----------------------------------------------------------------------------------------------------------


def expand_home(node: Any, prefix: str = "") -> None:
    """Replace `~` at the beginning of every path in a config's sections by the home folder, in place."""
    for f in fields(node):
        value, path = getattr(node, f.name), re.sub(r"\.\d+\.", ".", f"{prefix}{f.name}")
        if is_dataclass(value):
            expand_home(value, f"{path}.")
        elif isinstance(value, list) and any(map(is_dataclass, value)):
            for item in value:
                expand_home(item, f"{path}.")
        else:
            in_component = isinstance(value, dict) and ("_component_" in value or path in MAY_BE_UNNAMED)
            setattr(node, f.name, _expanded(value, path in PATHS, in_component))


def _expanded(value: Any, is_path: bool, in_component: bool) -> Any:
    """Expand a path, paths in a list or by name, and what begins like one among a component's arguments."""
    if isinstance(value, str):
        return os.path.expanduser(value) if is_path or (in_component and value.startswith("~/")) else value
    if isinstance(value, list):
        return [_expanded(v, is_path, in_component) for v in value]
    if isinstance(value, dict):
        named = COMPONENT_PATHS if in_component else ()
        return {k: _expanded(v, is_path or k in named, in_component) for k, v in value.items()}
    return value
