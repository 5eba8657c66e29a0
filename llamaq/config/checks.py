"""The checks that the sections of the config share. Each raises a `UserError` that names the setting."""

from typing import Any

from llamaq.errors import UserError


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


def has_component(setting: str, section: dict[str, Any] | None) -> None:
    """Check that a component section, if there is one, names its function or class."""
    named = section is None or isinstance(section.get("_component_"), str)
    require(named, f"{setting} has no _component_: name the function or class to use, e.g. torch.optim.AdamW")
