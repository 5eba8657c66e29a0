"""What a stage may read of a config, and which settings cannot change what a stage leaves.

A stage declares the sections it reads and gets a view that holds nothing else:

    c = only(run.config, "model", "tokenizer", "qat", "seed")
    c.qat.optimizer        # declared
    c.device               # cannot change a result: always there
    c.export               # AssertionError: the stage has to declare it

The stage's identity is made from the view, so it cannot leave out a setting that the stage reads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, cast

from llamaq.config.schema import Config

_OF_TRAINING = ("batch_size", "checkpoint_every_n_steps", "keep_checkpoints")

# Settings that change speed, memory, logs or where files lie, but not a result, by full path. Batches only change the
# order of float32 sums; a stage for which that matters names the setting itself, and then it counts.
NEUTRAL = frozenset(
    [
        "output_dir",
        "data_dir",
        "checkpoint_dir",  # its files enter by content, as an input of the stages that read them
        "wandb",
        "engine",
        "deepspeed",
        "device",
        "activation_checkpointing",
        "compile",  # the same quantizer bit for bit; see model/build.py
        "evaluate.batch_size",
        "export.trust_adapters",  # lets a folder in or not; what it holds is an argument of its own
        *(f"{stage}.{key}" for stage in ("base", "qat", "qat_lora", "qat_dpo") for key in _OF_TRAINING),
    ]
)

# What a stage and the stages it reads must have been made with alike, where both declare it. A training sample's length
# is no part of the tokenizer.
MUST_AGREE = ("model", "scheme", "adapters", "tokenizer")
MAY_DIFFER = frozenset(["tokenizer.max_seq_len"])


def only(config: Config, *declared: str) -> Config:
    """Return a view of the config that holds the declared sections and settings (dotted paths) and `NEUTRAL`."""
    return cast(Config, View(config, frozenset(declared)))


def disagreement(made_with: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first setting of `MUST_AGREE` that two stages declare with different values, and both values.

    Args:
        made_with: the settings of a stage that is read, as its manifest has them.
        now: the settings of the stage that reads it.
    """
    both = [section for section in MUST_AGREE if section in made_with and section in now]
    found = (d for section in both for d in _differences(made_with[section], now[section], section))
    return next((d for d in found if d[0] not in MAY_DIFFER), None)


def _differences(before: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        whole = "_component_" in before and "_component_" in now  # else a stage may declare some of the settings
        for key in sorted(before.keys() | now.keys() if whole else before.keys() & now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}")
    elif before != now:
        yield path, before, now


class View:
    """A config limited to what a stage declared. Use `only`."""

    def __init__(self, node: Any, declared: frozenset[str], prefix: str = ""):
        self._node, self._declared, self._prefix = node, declared, prefix

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value, path = getattr(self._node, name), self._prefix + name
        if _covers(self._declared, path) or _covers(NEUTRAL, path):
            return value
        inside = [p for p in (*self._declared, *NEUTRAL) if p.startswith(f"{path}.")]
        if inside and value is None:
            return None
        if inside and is_dataclass(value):
            return View(value, self._declared, f"{path}.")
        if inside and isinstance(value, dict):  # a component, of which single arguments are declared
            return {k: v for k, v in value.items() if f"{path}.{k}" in inside}
        raise AssertionError(f"'{path}' is read by a stage that does not declare it: add it to the stage's `only(…)`")

    def section(self, name: str) -> Any:
        """Return an optional section; see `Config.section`."""
        return Config.section(cast(Config, self), name)

    def settings(self) -> dict[str, Any]:
        """Return what enters a stage's identity: the declared settings, nested as in the config, without neutral ones.

        A neutral setting that is declared by its own full path does enter.
        """
        found: dict[str, Any] = {}
        for path in sorted(self._declared):
            *parents, leaf = path.split(".")
            into, value = found, self._node
            for part in parents:
                into, value = into.setdefault(part, {}), _item(value, part)
            into[leaf] = _without_neutral(_item(value, leaf), path)
        return found


def _item(node: Any, name: str) -> Any:
    if node is None:
        return None
    return node.get(name) if isinstance(node, dict) else getattr(node, name)


def _covers(paths: Iterable[str], path: str) -> bool:
    """Tell whether one of the paths is this one or leads to it."""
    return any(path == p or path.startswith(f"{p}.") for p in paths)


def _without_neutral(value: Any, path: str) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if f"{path}.{k}" not in NEUTRAL}
        return {k: _without_neutral(v, f"{path}.{k}") for k, v in kept.items()}
    if isinstance(value, list):  # of sections, such as spinquant.calibration
        return [asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for v in value]
    return value
