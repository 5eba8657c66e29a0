"""Say where a model came from, and under which licence: what the checkpoint's own folder says."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

Facts = dict[str, Any]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TRAINED_HERE = "a model trained here"  # on a generated corpus, from random weights
TEXTS = {  # how the text of a licence begins → the hub's name of it
    r"LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE": "llama{}",
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"MIT License": "mit",
}


def origin_of(checkpoint: Path | None) -> Facts:
    """Return what is known of the model that a run started from.

    Args:
        checkpoint: its folder; None for a model that was trained from random weights.

    Returns:
        base: its name; base_id: its id on a hub, or None; license: its licence's name on a hub, or None where the
        folder does not say; license_name: what the folder calls a licence that hubs have no name for.
    """
    if checkpoint is None:
        return {"base": TRAINED_HERE, "base_id": None, "license": "other", "license_name": None}
    front = front_matter(checkpoint / "README.md")
    licence = front.get("license")
    return {
        "base": checkpoint.name,
        "base_id": _hub_id(checkpoint),
        "license": licence if isinstance(licence, str) else _licence_of_text(checkpoint),
        "license_name": front.get("license_name"),
    }


def front_matter(card: Path) -> Facts:
    """Return the YAML between the lines `---` at the top of a model card; nothing if there is none."""
    if not card.is_file():
        return {}
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _hub_id(checkpoint: Path) -> str | None:
    """Return the id under which a hub has the model, if config.json or the folder's name tells."""
    try:
        name = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        name = None
    if isinstance(name, str) and HUB_ID.fullmatch(name):
        return name
    return f"meta-llama/{checkpoint.name}" if checkpoint.name.startswith("Llama-3.") else None


def _licence_of_text(checkpoint: Path) -> str | None:
    for file in sorted(checkpoint.glob("LICENSE*")):
        beginning = file.read_text(encoding="utf-8", errors="replace")[:2000] if file.is_file() else ""
        for pattern, name in TEXTS.items():
            if found := re.search(pattern, beginning, re.I):
                return name.format(*found.groups())
    return None
