"""Which files of a folder hold the model's weights, and which only lie beside them."""

from pathlib import Path

from llamaq.errors import UserError
from llamaq.families.config_json import read_json
from llamaq.families.headers import FLOATS, Entry, read_header

META_WEIGHTS, META_PARAMS = "consolidated.00.pth", "params.json"
GGUF = "its .gguf file is quantized for llama.cpp; download the original weights"
# what training leaves beside a model, by the beginning of its name
NO_WEIGHTS = (
    "adapter",
    "optimizer",
    "scheduler",
    "scaler",
    "training_args",
    "trainer_state",
    "recipe_state",
    "rng_state",
    "random_states",
)
Header = dict[str, Entry]


def hugging_face_files(folder: Path) -> list[Path]:
    """List the weight files of a Hugging Face folder: safetensors, or else what torch wrote.

    Raises:
        UserError: there are none, or the index names a file that is missing.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        files = _indexed(index) if index.is_file() else _weights(folder, f"*{suffix}")
        single = folder / f"{stem}{suffix}"
        if files:
            # a whole model beside the parts of another: `check_distinct` finds what both hold
            return sorted({*files, *([single] if single.is_file() else [])})
    raise UserError(f"{folder} has a config.json but no *.safetensors; {_no_weights(folder)}")


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return GGUF
    if (folder / "original" / META_WEIGHTS).is_file():
        return f"give checkpoint_dir={folder / 'original'}, which holds Meta's"
    return "download the weights too"


def torchtune_files(folder: Path) -> list[Path]:
    """List the weight files of a folder that torchtune or a training stage of llamaq wrote."""
    return [p for suffix in ("pt", "bin", "safetensors") for p in _weights(folder, f"*.{suffix}")]


def _weights(folder: Path, pattern: str) -> list[Path]:
    return [p for p in sorted(folder.glob(pattern)) if not p.name.startswith(NO_WEIGHTS)]


def _indexed(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index} has no weight_map, so it names no weights; download it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though {index.name} names it; download it too")
    return files


def headers_of(files: list[Path]) -> dict[Path, Header | None]:
    """Read the header of each file, and check that no tensor is in two of them.

    Raises:
        UserError: a file is torn, or a tensor is in two.
    """
    headers = {file: read_header(file) for file in files}
    check_distinct({file: list(header or ()) for file, header in headers.items()})
    return headers


def check_distinct(names: dict[Path, list[str]]) -> None:
    """Check that no tensor is in two files, where one would win by chance.

    Raises:
        UserError: naming both.
    """
    first: dict[str, Path] = {}
    for file, keys in names.items():
        for key in keys:
            if (other := first.setdefault(key, file)) != file:
                raise UserError(
                    f"{other.parent}: {other.name} and {file.name} both have {key}; keep the files of one model, and "
                    "move the others away"
                )


def check_floats(headers: dict[Path, Header | None]) -> None:
    """Check that all weights are floating-point numbers of 16 bits or more.

    Raises:
        UserError: naming the first that is not.
    """
    for file, header in headers.items():
        for key, entry in (header or {}).items():
            if entry.dtype not in FLOATS:
                raise UserError(quantized(file.parent, f"{file.name} has {key} as {entry.dtype.lower()}"))


def quantized(folder: Path, how: str) -> str:
    """Return the error about a checkpoint that is quantized already."""
    return (
        f"{folder} is quantized already ({how}); llamaq quantizes by itself and starts from BF16, FP16 or FP32: give "
        "the folder of the original model"
    )


def check_no_adapter(folder: Path) -> None:
    """Check that no LoRA adapter is in the folder, instead of a model or beside one.

    Raises:
        UserError: naming its file, and the model that it belongs to.
    """
    found = next((p for p in sorted(folder.glob("adapter_*")) if p.suffix in (".json", ".safetensors", ".bin")), None)
    if found is None:
        return
    config = folder / "adapter_config.json"
    base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    of = f" for {base}" if base else ""
    beside = any((folder / name).is_file() for name in ("config.json", META_WEIGHTS))
    what = "a model and beside it a LoRA adapter" if beside else "a LoRA adapter and no model"
    remedy = "or move the adapter away" if beside else "and give the result"
    raise UserError(f"{folder} holds {what}{of} ({found.name}); merge them (PEFT: merge_and_unload), {remedy}")
