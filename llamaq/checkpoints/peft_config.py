"""PEFT's adapter_config.json: what of it llamaq can follow exactly, and what changes the function and is refused."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaq.checkpoints.quantized import EXECUTORCH_LORA_SCALE, backbone_hash
from llamaq.config.checks import is_number
from llamaq.errors import UserError
from llamaq.families.config_json import read_json
from llamaq.families.headers import FLOATS, read_header
from llamaq.model.names import LINEARS, hugging_face_name

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BACKBONE = "backbone.json"  # beside a set of adapters: the hash of what they were trained on
# keys that say nothing about the function, or that the tensors and the checks below cover
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "task_type",
    "base_model_name_or_path",
    "base_model_class",
    "parent_library",
    "revision",
    "inference_mode",
    "lora_dropout",
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "ephemeral_gpu_offload",
    "ensure_weight_tying",
    "megatron_core",
}
# beginnings of `init_lora_weights` that take something out of the base weights, on which the adapters then sit
CHANGES_BASE = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA adapter that llamaq can apply."""

    folder: Path
    rank: int
    scale: float
    values: dict[str, Any]

    def has(self, name: str) -> bool:
        """Tell whether the adapter sits on a linear, e.g. `layers.3.mlp.w1`."""
        module = f"model.{hugging_face_name(name)}"
        layers = self.values.get("layers_to_transform")
        if layers is not None and int(name.split(".")[1]) not in ([layers] if isinstance(layers, int) else layers):
            return False
        return _names(self.values.get("target_modules"), module) and not _names(
            self.values.get("exclude_modules"), module
        )


def read_peft_config(folder: Path) -> PeftConfig:
    """Read a PEFT folder's adapter_config.json and check that nothing in it changes the function.

    Raises:
        UserError: no such folder or file, a torn one, no LoRA, or something that llamaq cannot apply.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that PEFT has written, with {CONFIG} and {TENSORS}")
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}; give a folder that PEFT has written")
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {values.get('peft_type')}; only LORA is supported")
    _check_features(path, values)
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{path}: r is {rank}; it has to be the rank, a positive integer")
    if not is_number(alpha) or not 0 < alpha < math.inf:
        raise UserError(f"{path}: lora_alpha is {alpha}; it has to be a number above 0")
    for key, uniform in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        if any(value != uniform for value in (values.get(key) or {}).values()):
            raise UserError(f"{path}: {key}={values[key]} is not supported: ExecuTorch has one rank and one scale")
    scale = alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank
    return PeftConfig(folder, rank, scale, values)


def check_peft(folder: Path, rank: int, trusted: bool) -> None:
    """Check what can be checked of a PEFT folder before there is a checkpoint to put it on.

    Args:
        folder: of the adapters.
        rank: that they need to have.
        trusted: whether adapters that do not say what they were trained on are taken.

    Raises:
        UserError: they could not be applied.
    """
    config = read_peft_config(folder)
    check_rank(config, rank)
    scale_left_over(config)
    check_backbone(folder, None, trusted)
    check_tensors(folder)


def check_rank(config: PeftConfig, rank: int) -> None:
    """Check that adapters have the rank of the checkpoint's.

    Raises:
        UserError: they have another.
    """
    if config.rank != rank:
        raise UserError(
            f"{config.folder}: rank {config.rank}, but the checkpoint's adapters have {rank}; they must be equal"
        )


def scale_left_over(config: PeftConfig) -> float:
    """Return the part of the scale that goes into B: ExecuTorch multiplies by 2.0 whatever it is.

    Raises:
        UserError: it is no power of two.
    """
    left_over = config.scale / EXECUTORCH_LORA_SCALE
    if math.frexp(left_over)[0] != 0.5:
        formula = "lora_alpha / √r (use_rslora)" if config.values.get("use_rslora") else "lora_alpha / r"
        raise UserError(
            f"{config.folder}: {formula} is {config.scale:.6g}, no power of two, which bf16 weights cannot hold exactly"
        )
    return left_over


def check_backbone(folder: Path, checkpoint: Path | None, trusted: bool) -> None:
    """Check that adapters were trained on a backbone.

    Args:
        folder: of the adapters.
        checkpoint: with the backbone, None if it is not there yet.
        trusted: whether adapters that do not say what they were trained on are taken.

    Raises:
        UserError: they were trained on another one, or do not say on which.
    """
    path = folder / BACKBONE
    if not path.is_file():
        if not trusted:
            raise UserError(
                f"{folder} has no {BACKBONE}, so nothing says that it was trained on this quantized backbone; take "
                "convert/adapter of a run of llamaq, or set export.trust_adapters=true if you know that it was"
            )
        return
    recorded = read_json(path).get("sha256")
    if not isinstance(recorded, str):
        raise UserError(f"{path} names no sha256; copy the folder again")
    if checkpoint is not None and recorded != backbone_hash(checkpoint):
        raise UserError(f"{folder} was trained on another quantized backbone than {checkpoint}: it would not fit")


def check_tensors(folder: Path) -> None:
    """Check that the adapters' file is there, whole, and holds floats.

    Raises:
        UserError: naming the file.
    """
    path = folder / TENSORS
    if not path.is_file():
        old = " (adapter_model.bin is: save it again with safe_serialization=True)"
        raise UserError(f"{path} is missing{old if (folder / 'adapter_model.bin').is_file() else ''}")
    other = next((k for k, entry in (read_header(path) or {}).items() if entry.dtype not in FLOATS), None)
    if other is not None:
        raise UserError(f"{path}: {other} is quantized; adapters have to be BF16, FP16 or FP32")


def _check_features(path: Path, values: dict[str, Any]) -> None:
    """Refuse by name what changes the function: anything that is on and not in `READ`, and some values of what is."""
    if values.get("bias", "none") != "none":
        raise UserError(f"{path}: bias={values['bias']} is not supported: ExecuTorch's adapters have no biases")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise UserError(f"{path}: init_lora_weights={init} changes the base weights, so the adapters fit no other ones")
    for key, value in values.items():
        if key not in READ and value not in (None, False, 0, "", [], {}):
            raise UserError(f"{path}: {key}={json.dumps(value)} is not supported; train the adapters without it")


def _names(pattern: Any, module: str) -> bool:
    """Tell whether PEFT's target_modules or exclude_modules, a list of endings or one expression, names a module."""
    if pattern is None:
        return False
    if pattern == "all-linear":
        return module.endswith(tuple(f".{hugging_face_name(f'layers.0.{x}').rsplit('.', 1)[-1]}" for x in LINEARS))
    if isinstance(pattern, str):
        return re.fullmatch(pattern, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in pattern)
