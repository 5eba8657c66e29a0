"""A run that is only read, perhaps while another process trains in the same folder."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from llamaq.config import Config
from llamaq.config.load import with_overrides
from llamaq.errors import UserError
from llamaq.runs.manifest import MANIFEST, read_manifest
from llamaq.runs.run import Run

# the tokenizer's files, and the names that their copies beside the codes have (llamaq.data.tokenizer.copy_tokenizer)
KEPT = {
    "path": ["tokenizer.model", "tokenizer.json"],
    "special_tokens_path": ["special_tokens.json"],
    "config": ["tokenizer_config.json"],
    "chat_template": ["chat_template.jinja"],
    "generation_config": ["generation_config.json"],
}


class RunReader(Run):
    """A run that is opened without its lock and in which no stage can run."""

    def _open(self) -> None:
        marker = self.folder / "run.json"
        if not marker.is_file():
            raise UserError(
                f"output_dir={self.folder} holds no run yet; train one first, e.g. with tune run qat_lora_dpo"
            )
        if json.loads(marker.read_text())["model"] != self.config.model:
            raise UserError(f"output_dir={self.folder} holds a run of another model; give the config it was made with")

    def stage(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: whoever writes takes the lock."""
        raise AssertionError("this run is opened for reading")

    def has(self, path: Path) -> bool:
        """Tell whether a stage is finished, or a file is there."""
        return path.is_file() or (path / MANIFEST).is_file()

    def changed_since(self, stage: str) -> str | None:
        """Return the first stage that was run again after this one had read it, or None.

        Content is compared as the manifests record it; no file is read.
        """
        if not self.has(self.path(stage)):
            return None
        for name, content in read_manifest(self.path(stage))["identity"]["inputs"].items():
            if self.has(self.path(name)) and read_manifest(self.path(name)).get("content") != content:
                return name
            if earlier := self.changed_since(name):
                return earlier
        return None


def recorded_config(folder: Path, stages: list[str], overrides: list[str]) -> Config:
    """Return what a run's config said, as far as these stages read it, with overrides.

    Raises:
        UserError: there is no such run.
    """
    marker = folder / "run.json"
    found = [folder / stage for stage in stages if (folder / stage / MANIFEST).is_file()]
    if not marker.is_file() or not found:
        raise UserError(
            f"{folder} is not the folder of a run, so nothing says which tokenizer the model takes; give the run's "
            "config and the file: --config NAME chat.model=PATH.pte"
        )
    start = json.loads(marker.read_text())["starts_from"]
    settings = [read_manifest(stage)["settings"] for stage in found]
    here = {
        "output_dir": str(folder),
        "checkpoint_dir": start if Path(start).is_absolute() else str(folder / "base" / "model"),
    }
    known = {f.name for f in fields(Config)}  # older versions of llamaq recorded other sections
    raw: Any = OmegaConf.merge(*({k: v for k, v in s.items() if k in known} for s in settings), here)
    for key, path in (raw.get("tokenizer") or {}).items():
        if key in KEPT and path and not Path(path).is_file():
            raw.tokenizer[key] = str(_kept_copy(folder, [*KEPT[key], Path(path).name]) or path)
    return with_overrides(raw, overrides, str(folder))


def _kept_copy(folder: Path, names: list[str]) -> Path | None:
    """Return a file of the tokenizer from beside the codes; for a run that was moved or is seen from elsewhere."""
    copies = (folder / stage / "model" / name for stage in ("convert", "spinquant") for name in names)
    return next((path for path in copies if path.is_file()), None)
