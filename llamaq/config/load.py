"""Reading a config: from a packaged name or a YAML file, with overrides, to a checked `Config`."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llamaq.config.installed import packaged_configs
from llamaq.config.schema import Config
from llamaq.config.values import check_texts, expand_home, holds_text, text_value
from llamaq.errors import UserError


def load(name: str, overrides: list[str] | None = None) -> Config:
    """Read a packaged config or a YAML file, apply `key=value` overrides and check every key and value.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one), a wrong type or value, a
            setting missing.
    """
    path = _find(name)
    try:
        raw = OmegaConf.load(path)
    except Exception as e:  # PyYAML raises many kinds; all of them name the line
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, DictConfig):
        raise UserError(f"{path} holds no settings")
    return with_overrides(raw, overrides or [], str(path))


def with_overrides(raw: DictConfig, overrides: list[str], source: str) -> Config:
    """Apply `key=value` overrides to a raw config and check it; see `resolve`."""
    for item in overrides:
        _override(raw, item)
    return resolve(raw, source)


def resolve(raw: DictConfig, source: str = "config") -> Config:
    """Check a raw config against the schema and resolve its `${…}` references.

    Args:
        raw: as it stands in the YAML file.
        source: the file, for errors.

    Raises:
        UserError: as `load`.
    """
    _check_keys(raw, Config, "", source)
    check_texts(OmegaConf.to_container(raw, resolve=False), source)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), raw))
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", None) or ""
        if isinstance(e, MissingMandatoryValue):
            raise UserError(f"{source}: setting '{key}' is required and has no value") from e
        raise UserError(f"{source}: {key}: {str(e).splitlines()[0]}") from e
    assert isinstance(config, Config)
    expand_home(config)
    config.check()
    return config


def check_sections(config: Config, needed: Sequence[str], name: str) -> None:
    """Check that a config has the sections that a recipe needs.

    Args:
        config: the settings.
        needed: names of sections.
        name: of the config, for the error.

    Raises:
        UserError: naming the first section that is missing, and packaged configs that have all of them.
    """
    missing = [section for section in needed if getattr(config, section) is None]
    if missing:
        have = [n for n, path in packaged_configs().items() if set(needed) <= set(OmegaConf.load(path))]
        raise UserError(
            f"--config {name} has no section '{missing[0]}', which this recipe needs; write it, or take a config that "
            f"has it: {', '.join(have)}"
        )


def without(config: Config, *sections: str) -> Config:
    """Return a config without sections that a recipe does not run: one config may hold training and SpinQuant."""
    return replace(config, **dict.fromkeys(sections))


def section_type(annotation: Any) -> Any:
    """Return the dataclass in a field's type (`TrainingConfig | None`, `list[CalibrationPart]`), or None."""
    candidates = getattr(annotation, "__args__", None) or (annotation,)
    return next((t for t in candidates if is_dataclass(t)), None)


def _find(name: str) -> Path:
    packaged = packaged_configs()
    path = packaged.get(name, Path(name).expanduser())
    if not path.is_file():
        near = difflib.get_close_matches(name, packaged, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; packaged configs: {', '.join(packaged)}"
        raise UserError(f"config '{name}' is neither a packaged config nor a file{hint}")
    return path


def _override(raw: DictConfig, item: str) -> None:
    if item.startswith("~"):
        _delete(raw, item[1:])
        return
    setting, separator, typed = item.partition("=")
    try:
        _own_what_is_referred_to(raw, setting)
        if separator and holds_text(setting):
            OmegaConf.update(raw, setting, text_value(setting, typed))
        else:
            raw.merge_with_dotlist([item])
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"cannot apply '{item}': {str(e).splitlines()[0]}") from e


def _delete(raw: DictConfig, setting: str) -> None:
    parent, _, key = setting.rpartition(".")
    node = OmegaConf.select(raw, parent) if parent else raw
    if node is None or key not in node:
        raise UserError(f"~{setting}: there is no such setting to delete")
    del node[key]


def _own_what_is_referred_to(raw: DictConfig, key: str) -> None:
    """Copy sections on the way to `key` that are references (`dataset: ${qat.dataset}`), so that a part can change."""
    path = key.split(".")
    for i in range(1, len(path)):
        prefix, parent = ".".join(path[:i]), OmegaConf.select(raw, ".".join(path[: i - 1])) if i > 1 else raw
        node = parent._get_node(path[i - 1]) if isinstance(parent, DictConfig) else None
        if node is not None and node._is_interpolation():
            section = OmegaConf.to_container(OmegaConf.select(raw, prefix), resolve=False)
            OmegaConf.update(raw, prefix, section, force_add=True)


def _check_keys(node: DictConfig, schema: Any, prefix: str, source: str) -> None:
    known = {f.name: f for f in fields(schema)}
    for key in node:
        full = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(known)}"
            raise UserError(f"{source}: unknown setting '{full}'{hint}")
        section = section_type(known[str(key)].type)
        if section is not None:
            for path, child in _written_out(node._get_node(key), full):
                _check_keys(child, section, f"{path}.", source)


def _written_out(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Yield the sections that stand at a place in the file: one, or those of a list; no reference, no null."""
    if node._is_none() or node._is_interpolation():
        return
    if isinstance(node, DictConfig):
        yield path, node
    elif isinstance(node, ListConfig):
        for i in range(len(node)):
            yield from _written_out(node._get_node(i), f"{path}.{i}")
