"""The checks that the sections of the config share. Each raises a `UserError` that names the setting."""

import math
from collections.abc import Iterator
from typing import Any

from llamaq.errors import UserError

INFINITE = ("nan", "inf", "-inf")  # as Python writes them; YAML reads `nan` without a dot as a word


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_of(setting: str, value: Any, *choices: str) -> None:
    """Check that a setting has one of the values it can have."""
    require(value in choices, f"{setting}={value}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def at_least(smallest: int, section: Any, name: str, *keys: str) -> None:
    """Check the lower bound of several settings of a section. A setting that is unset (None) passes."""
    for key in keys:
        value = getattr(section, key)
        wanted = "must not be negative" if smallest == 0 else f"must be at least {smallest}"
        require(value is None or value >= smallest, f"{name}.{key}={value}: {wanted}")


def at_most(largest: int, section: Any, name: str, *keys: str) -> None:
    """Check the upper bound of several settings of a section. A setting that is unset (None) passes."""
    for key in keys:
        value = getattr(section, key)
        require(value is None or value <= largest, f"{name}.{key}={value}: must be at most {largest}")


def positive(setting: str, value: Any) -> None:
    """Check that a number, if there is one, is finite and above 0."""
    fits = value is None or (is_number(value) and 0 < value < math.inf)
    require(fits, f"{setting}={value}: must be a number above 0")


def not_negative(setting: str, value: Any) -> None:
    """Check that a number, if there is one, is finite and 0 or more."""
    fits = value is None or (is_number(value) and 0 <= value < math.inf)
    require(fits, f"{setting}={value}: must be a number, 0 or more")


def fraction(setting: str, value: float) -> None:
    """Check that a number lies between 0 and 1, the bounds included."""
    require(is_number(value) and 0 <= value <= 1, f"{setting}={value}: must be between 0 and 1")


def is_number(value: Any) -> bool:
    """Tell whether it is an integer or a float, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def has_component(setting: str, section: dict[str, Any] | None) -> None:
    """Check that a component section, if there is one, names its function or class, and that its numbers are finite."""
    named = section is None or "_component_" in section
    require(named, f"{setting} has no _component_: name the function or class to use, e.g. torch.optim.AdamW")
    is_component(setting, section or {})


def is_component(setting: str, section: dict[str, Any]) -> None:
    """Check a component section that need not name its function or class, and that its numbers are finite."""
    name = section.get("_component_", "")
    require(isinstance(name, str), f"{setting}._component_={name}: name a function or class")
    for path, value in _leaves(section, setting):
        require(str(value).lower() not in INFINITE, f"{path}={value}: must be a finite number")


def has_data(setting: str, section: dict[str, Any]) -> None:
    """Check that a dataset is a component, and that one of JSON files names some."""
    has_component(setting, section)
    files, is_json = section.get("data_files"), section.get("source") == "json" and "data_dir" not in section
    require(bool(files) or (files is None and not is_json), f"{setting}.data_files={files}: names no file")


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{path}.{key}")
    else:
        yield path, node
