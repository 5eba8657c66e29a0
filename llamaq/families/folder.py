"""Look at a checkpoint folder: its layout, what model it is, where its weights and its tokenizer are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaq.config.components import Component
from llamaq.errors import UserError
from llamaq.families import llama, params_json, qwen2, qwen3
from llamaq.families.architecture import Architecture
from llamaq.families.config_json import ConfigJson, read_json
from llamaq.families.tokenizer_files import tokenizer_in
from llamaq.families.weight_files import (
    GGUF,
    META_PARAMS,
    META_WEIGHTS,
    Header,
    check_floats,
    check_no_adapter,
    headers_of,
    hugging_face_files,
    quantized,
    torchtune_files,
)

FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
SUPPORTED = "llama (Llama 3.x, SmolLM2, …), mistral without a sliding window, qwen2 (Qwen2.5) and qwen3"


@dataclass(frozen=True)
class Described:
    """A checkpoint folder, as its files describe it."""

    folder: Path
    layout: str  # hugging_face, meta or torchtune
    headers: dict[Path, Header | None]  # of each file with weights; None where a header does not tell
    source: Path | None = None  # config.json or params.json
    architecture: Architecture | None = None  # None if no file says what model it is
    recorded: Component | None = None  # the `model` section that a stage of llamaq has recorded
    codes: str | None = None  # the scheme of a quantized checkpoint that llamaq wrote
    tokenizer: Component | None = None

    @property
    def weights(self) -> list[Path]:
        """Return the files with weights."""
        return list(self.headers)

    @property
    def model(self) -> Component | None:
        """Return the `model` section that builds it, None if the folder does not say."""
        if self.architecture is None:
            return self.recorded
        return FAMILIES[self.architecture.family].component(self.architecture)


def describe(folder: str | Path) -> Described:
    """Look at a checkpoint folder; no weight is read.

    Raises:
        UserError: it is not a folder, holds no checkpoint, a torn one, or one that is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint_dir={folder} is not a folder; {_where(folder)}")
    if (folder / META_WEIGHTS).is_file():
        return _meta(folder)
    check_no_adapter(folder)
    if (folder / "config.json").is_file():
        return _hugging_face(folder)
    return _torchtune(folder)


def _where(folder: Path) -> str:
    if folder.is_file():
        return f"it is a file: give the folder it lies in, {folder.parent}"
    is_hub_name = not folder.is_absolute() and len(folder.parts) == 2 and not folder.parent.exists()
    hint = f" (is it the name of a model on the Hub? download it first: hf download {folder})" if is_hub_name else ""
    return f"give the folder that holds the checkpoint's files{hint}"


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _hugging_face(folder: Path) -> Described:
    path = folder / "config.json"
    values = read_json(path)
    family = _family_of(path, values)
    if quantization := values.get("quantization_config") or values.get("compression_config"):
        method = quantization.get("quant_method", "of an unnamed method") if isinstance(quantization, dict) else "?"
        raise UserError(quantized(folder, f"config.json has a quantization_config: {method}"))
    headers = headers_of(hugging_face_files(folder))
    check_floats(headers)
    architecture = family.read(ConfigJson(path, values, _has_head(headers)))
    return Described(folder, "hugging_face", headers, path, architecture, tokenizer=tokenizer_in(folder))


def _family_of(path: Path, values: dict[str, Any]) -> Any:
    """Return the module of the family that a config.json names.

    Raises:
        UserError: it is not supported.
    """
    kind, names = values.get("model_type"), values.get("architectures") or []
    found = next((family for family in FAMILIES.values() if kind in family.MODEL_TYPES), None)
    if found is None:
        what = f"model_type is {kind}" if kind else "names no model_type"
        raise UserError(f"{path}: {what}, which is not supported; supported are {SUPPORTED}")
    if names and not any(str(name).endswith("ForCausalLM") for name in names):
        raise UserError(
            f"{path}: architectures is {', '.join(map(str, names))}; only causal language models are supported"
        )
    if "AutoModelForCausalLM" in (values.get("auto_map") or {}):
        raise UserError(f"{path}: the model brings code of its own (auto_map), which is not supported")
    return found


def _has_head(headers: dict[Path, Header | None]) -> bool | None:
    """Tell whether there is a head beside the embedding; torch's files list a tied one under both names."""
    if None in headers.values():
        return None
    entries = {key: entry for header in headers.values() for key, entry in (header or {}).items()}
    head, embedding = entries.get("lm_head.weight"), entries.get("model.embed_tokens.weight")
    return head is not None and (head.crc is None or head != embedding)


# --- Meta, and what llamaq quantizes ---------------------------------------------------------------------------------


def _meta(folder: Path) -> Described:
    weights = folder / META_WEIGHTS
    if (folder / "consolidated.01.pth").is_file():
        raise UserError(f"{folder} holds a model in parallel parts (consolidated.01.pth); give its Hugging Face folder")
    headers, path = headers_of([weights]), folder / META_PARAMS
    header, params = headers[weights] or {}, read_json(path) if path.is_file() else {}
    codes = params.get("quantization_args")
    if not codes:
        check_floats(headers)
    return Described(
        folder,
        "meta",
        headers,
        path if params else None,
        params_json.read(path, params, header) if params and header else None,
        codes=f"{codes.get('scheme')}, groups of {codes.get('group_size')}" if codes else None,
        tokenizer=tokenizer_in(folder),
    )


# --- torchtune, and llamaq's training stages -------------------------------------------------------------------------


def _torchtune(folder: Path) -> Described:
    files = torchtune_files(folder)
    if not files:
        raise UserError(f"checkpoint_dir={folder} has no checkpoint: {_expected(folder)}")
    headers = headers_of(files)
    check_floats(headers)
    manifest = folder / "manifest.json"  # of a training stage of llamaq; `runs` is a floor above
    settings = read_json(manifest).get("settings") or {} if manifest.is_file() else {}
    tokenizer = settings.get("tokenizer") or tokenizer_in(folder)
    return Described(folder, "torchtune", headers, recorded=settings.get("model"), tokenizer=tokenizer)


def _expected(folder: Path) -> str:
    snapshots = sorted((folder / "snapshots").glob("*/config.json"))
    if snapshots:
        return f"it is a folder of the Hub's cache; give the snapshot in it, {snapshots[-1].parent}"
    if any(folder.glob("*.gguf")):
        return GGUF
    return (
        f"expected {META_WEIGHTS} (Meta), config.json with *.safetensors (Hugging Face), or a .pt/.bin/.safetensors "
        "file (torchtune)"
    )
