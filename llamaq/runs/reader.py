"""A run that is only read, perhaps while another process trains in the same folder."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from llamaq.config import Config, ExportConfig
from llamaq.config.load import with_overrides
from llamaq.errors import UserError
from llamaq.families.tokenizer_files import FILES
from llamaq.runs.manifest import MANIFEST, read_manifest
from llamaq.runs.run import Run


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


def recorded_config(folder: Path, stages: list[str] | None, overrides: list[str]) -> Config:
    """Return what a run's config said, as far as these stages read it, with overrides.

    Args:
        folder: of the run.
        stages: those to ask, the last word last; None asks all that are finished, the newest last.
        overrides: `key=value` settings.

    Raises:
        UserError: there is no such run.
    """
    marker = folder / "run.json"
    found = [folder / stage for stage in stages or [] if (folder / stage / MANIFEST).is_file()]
    if stages is None:
        found = [path.parent for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.endswith(".partial")]
        found.sort(key=lambda stage: read_manifest(stage)["finished"])
    if not marker.is_file() or not found:
        raise UserError(
            f"{folder} is not the folder of a run, so nothing says which tokenizer the model takes; give the run's "
            "config and the file: --config NAME chat.model=PATH.pte"
            if stages is not None
            else f"{folder} holds no finished stage of a run, so nothing says how it was made; give --config"
        )
    start = json.loads(marker.read_text())["starts_from"]
    settings = [read_manifest(stage)["settings"] for stage in found]
    here = {
        "output_dir": str(folder),
        "checkpoint_dir": start if Path(start).is_absolute() else str(folder / "base" / "model"),
    }
    raw: Any = OmegaConf.create(_found_again(_merged(settings) | here, folder))
    for key, path in (raw.get("tokenizer") or {}).items():
        names = [files[key] for files in FILES.values() if key in files]  # that copies beside the codes have
        if names and path and not Path(path).is_file():
            raw.tokenizer[key] = str(_kept_copy(folder, [*names, Path(path).name]) or path)
    export, call = raw.get("export") or {}, ExportConfig.max_seq_length
    if "max_seq_length" not in export:  # only the stage `export` reads it; the default has to fit what others recorded
        OmegaConf.update(raw, "export.max_seq_length", min(call, export.get("max_context_length", call)))
    return with_overrides(raw, overrides, str(folder))


def _merged(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what several stages have recorded in one; of a setting that differs, all of the last one's value."""
    known = {f.name for f in fields(Config)}  # older versions of llamaq recorded other sections
    merged: dict[str, Any] = {}
    for section, value in (item for s in settings for item in s.items() if item[0] in known):
        before = merged.get(section)
        if isinstance(before, dict) and isinstance(value, dict) and "_component_" not in value:
            value = before | value
        merged[section] = value
    return merged


def _found_again(node: Any, folder: Path) -> Any:
    """Return settings in which the run's own data files are where the run is now; it may have been moved."""
    if isinstance(node, dict):
        return {k: _found_again(v, folder) for k, v in node.items()}
    if isinstance(node, list):
        return [_found_again(v, folder) for v in node]
    if isinstance(node, str) and Path(node).parent.name == "corpus" and not Path(node).exists():
        here = folder / "corpus" / Path(node).name
        return str(here) if here.is_file() else node
    return node


def _kept_copy(folder: Path, names: list[str]) -> Path | None:
    """Return a file of the tokenizer from beside the codes; for a run that was moved or is seen from elsewhere."""
    copies = (folder / stage / "model" / name for name in names for stage in ("convert", "spinquant"))
    return next((path for path in copies if path.is_file()), None)
