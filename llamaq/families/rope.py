"""RoPE in config.json: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`."""

from pathlib import Path
from typing import Any

from llamaq.config.checks import is_number
from llamaq.errors import UserError
from llamaq.families.architecture import DEFAULT, Scaling

THETA = 10_000.0  # transformers' default, of all families here
# rope_type → the numbers that its section of a config.json holds beside it
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(path: Path, values: dict[str, Any], positions: int) -> tuple[float, Scaling]:
    """Return RoPE's base and scaling, the latter without numbers that do nothing.

    Args:
        path: of the config.json, for errors.
        values: its content.
        positions: max_position_embeddings.

    Raises:
        UserError: a kind that is not supported, a number that is missing or none, or two that contradict each other.
    """
    sections = {key: values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)}
    for key, section in sections.items():
        if not isinstance(section, dict) or any(isinstance(v, dict) for v in section.values()):
            raise UserError(f"{path}: {key}={section}: one RoPE for all layers is supported, and this is not one")
    thetas = [v["rope_theta"] for v in (*sections.values(), values) if v.get("rope_theta") is not None] or [THETA]
    scalings = [_scaling(path, key, section, positions) for key, section in sections.items()] or [dict(DEFAULT)]
    for what, found in (("rope_theta", thetas), ("RoPE's scaling", scalings)):
        if found[0] != found[-1]:
            raise UserError(f"{path}: says of {what} {found[0]} and {found[-1]}; delete the one that is wrong")
    for part in (*sections.values(), values):
        if part.get("partial_rotary_factor", 1) not in (1, None):
            raise UserError(f"{path}: partial_rotary_factor={part['partial_rotary_factor']} is not supported, only 1")
    return number(path, "rope_theta", thetas[0]), scalings[0]


def _scaling(path: Path, key: str, section: dict[str, Any], positions: int) -> Scaling:
    kind = section.get("rope_type", section.get("type")) or "default"
    if kind not in SCALINGS:
        raise UserError(f"{path}: {key} is of type {kind}; supported are {', '.join(SCALINGS)}")
    numbers = dict(section)
    if kind == "llama3" and numbers.get("original_max_position_embeddings") is None:
        numbers["original_max_position_embeddings"] = positions  # as transformers does
    scaling = {name: number(path, f"{key}.{name}", numbers.get(name)) for name in SCALINGS[kind]}
    does_nothing = scaling.get("factor", 1) == 1
    return dict(DEFAULT) if does_nothing else {"rope_type": kind, **scaling}


def number(path: Path, key: str, value: Any) -> float:
    """Return a number above 0.

    Raises:
        UserError: it is none.
    """
    if not is_number(value) or value <= 0:
        raise UserError(f"{path}: {key} is {value}; it has to be a number above 0")
    return value
