"""The `deepspeed` section, and the DeepSpeed JSON settings that follow from it."""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from llamaq.config.checks import positive, require
from llamaq.config.installed import cluster_dir
from llamaq.errors import UserError

if TYPE_CHECKING:
    from llamaq.config.schema import Config

# Top-level DeepSpeed settings that a run may choose. The others are llamaq's to set, or are not for training.
DEEPSPEED_SETTINGS = (
    "zero_optimization",
    "communication_data_type",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "dump_state",
)
# DeepSpeed settings that llamaq sets → the llamaq setting they follow from
SET_BY_LLAMAQ = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_clipping": "clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "bf16": "dtype",
    "fp16": "dtype",
    "torch_autocast": "dtype",
    "amp": "dtype",
    "activation_checkpointing": "activation_checkpointing",
}


@dataclass
class DeepSpeedConfig:
    """What DeepSpeed shards and offloads when it trains (see `engine`)."""

    config: str = "zero1"
    """What to shard over the ranks: `zero0` to `zero3`, or a file. `zero0` shards nothing, `zero1` the optimizer state,
    `zero2` also the gradients, `zero3` also the weights. `zero2_offload` and `zero3_offload` move the optimizer state
    (and with 3 the weights) to CPU memory. Raise it if a rank runs out of memory; higher stages communicate more. A
    file is DeepSpeed JSON, as those in `cluster/deepspeed/`."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Single DeepSpeed settings that replace the file's. Example:
    `deepspeed.settings.zero_optimization.reduce_bucket_size=50000000`. What llamaq sets itself (batch sizes, optimizer,
    dtype, clipping) is refused here."""

    def check(self, name: str) -> None:
        """Check that the file exists and that every setting is known and free to choose."""
        self.resolved()

    def resolved(self) -> dict[str, Any]:
        """Return DeepSpeed's settings: those of the file, with `settings` replacing some.

        Raises:
            UserError: no such file, not JSON, or a setting that is unknown or set by llamaq.
        """
        path = _settings_file(self.config)
        try:
            from_file = json.loads(path.read_text())
        except ValueError as e:
            raise UserError(f"deepspeed.config={path} is not valid JSON: {e}") from e
        if not isinstance(from_file, dict):
            raise UserError(f"deepspeed.config={path} holds no settings: it has to be a JSON object")
        merged = OmegaConf.to_container(OmegaConf.merge(from_file, self.settings))
        assert isinstance(merged, dict)
        for key in merged:
            _check_key(str(key))
        settings = {str(k): v for k, v in merged.items()}
        _check_ranges(settings.get("zero_optimization") or {})
        return settings


def deepspeed_settings(c: "Config") -> dict[str, Any]:
    """Return the run's DeepSpeed settings; see `DeepSpeedConfig.resolved`."""
    return c.deepspeed.resolved()


def _settings_file(name: str) -> Path:
    path = cluster_dir() / "deepspeed" / f"{name}.json"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (cluster_dir() / "deepspeed").glob("*.json")))
        raise UserError(f"deepspeed.config={name} is neither a file nor one of {known}")
    return path


def _check_ranges(zero: dict[str, Any]) -> None:
    """Check the stage and sizes of ZeRO, of which DeepSpeed itself takes some that make no sense."""
    if not isinstance(zero, dict):
        raise UserError(f"deepspeed.settings.zero_optimization={zero}: it is a section, with stage and so on")
    where, stage = "deepspeed.settings.zero_optimization", zero.get("stage", 0)
    require(type(stage) is int and 0 <= stage <= 3, f"{where}.stage={stage}: choose 0, 1, 2 or 3")
    for key, value in zero.items():
        if key.endswith("bucket_size") and value != "auto":
            positive(f"{where}.{key}", value)


def _check_key(key: str) -> None:
    if key in SET_BY_LLAMAQ:
        raise UserError(f"deepspeed.settings.{key}: llamaq sets it, from {SET_BY_LLAMAQ[key]}; change that")
    if key not in DEEPSPEED_SETTINGS:
        near = difflib.get_close_matches(key, DEEPSPEED_SETTINGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(DEEPSPEED_SETTINGS)}"
        raise UserError(f"deepspeed.settings.{key}: unknown setting; {hint}")
