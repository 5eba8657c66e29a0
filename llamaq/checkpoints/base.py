"""Reading the checkpoint a run starts from: Hugging Face, Meta or torchtune layout → torchtune names, float32.

The layout is told by the files in the folder:
    config.json and *.safetensors          Hugging Face; q and k rows are un-permuted to Meta's RoPE order
    consolidated.00.pth                    Meta; `output.weight` may be there or not
    *.pt, *.bin or *.safetensors alone     torchtune, names already right

The head is tied in Llama 3.2, so a separate head is accepted only if it equals the embedding.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtune.models.convert_weights import hf_to_tune, meta_to_tune

from llamaq.errors import UserError

StateDict = dict[str, Tensor]


def load_checkpoint(folder: str | Path, decoder: nn.Module) -> StateDict:
    """Weights for `decoder` (a torchtune Llama) from a checkpoint folder, float32, keys as the decoder names them.

    Raises:
        UserError: folder or file missing or torn, an unknown layout, keys missing or left over, a wrong shape, or a
            head that differs from the embedding.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint_dir={folder} is not a folder; give the folder that holds the checkpoint's files")
    attn: Any = decoder.get_submodule("layers.0.attn")
    if (folder / "consolidated.00.pth").is_file():
        tensors = _to_tune(meta_to_tune, _read_pickle(folder / "consolidated.00.pth"), folder)
    elif (folder / "config.json").is_file():
        _check_hf_config(folder / "config.json", attn)
        tensors = _to_tune(
            lambda sd: hf_to_tune(sd, attn.num_heads, attn.num_kv_heads, attn.embed_dim, attn.head_dim),
            _read_safetensors(folder),
            folder,
        )
    else:
        tensors = _read_torchtune(folder)
    return _checked(tensors, decoder, folder)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The files whose content decides what `load_checkpoint` returns (a folder may hold much else)."""
    folder = Path(folder)
    if (folder / "consolidated.00.pth").is_file():
        return [folder / "consolidated.00.pth"]
    if (folder / "config.json").is_file():
        return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return [p for pattern in ("*.pt", "*.bin", "*.safetensors") for p in sorted(folder.glob(pattern))]


def _to_tune(convert: Any, tensors: StateDict, folder: Path) -> StateDict:
    try:
        return convert(tensors)
    except UserError:
        raise
    except Exception as e:  # torchtune raises a plain Exception for an unknown key, a RuntimeError for a wrong shape
        raise UserError(f"{folder} is not a Llama checkpoint of this model's shape: {e}") from e


def _read_pickle(path: Path) -> StateDict:
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as e:
        raise UserError(f"{path} cannot be read ({str(e).splitlines()[0]}); is the file whole?") from e
    loaded = loaded.get("model", loaded)
    if not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{path} holds more than tensors; expected a plain state dict")
    return loaded


def _read_safetensors(folder: Path) -> StateDict:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        raise UserError(f"{folder} has a config.json but no *.safetensors; download the weights too")
    tensors: StateDict = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, though {index.name} names it")
        tensors |= _load_safetensors(folder / name)
    return tensors


def _load_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except SafetensorError as e:
        raise UserError(f"{path} cannot be read ({e}); is the file whole?") from e


def _read_torchtune(folder: Path) -> StateDict:
    files = checkpoint_files(folder)
    if not files:
        raise UserError(
            f"checkpoint_dir={folder} has no checkpoint: expected consolidated.00.pth (Meta), config.json with "
            "*.safetensors (Hugging Face), or a .pt/.bin/.safetensors file (torchtune)"
        )
    tensors: StateDict = {}
    for path in files:
        tensors |= _load_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return tensors


def _check_hf_config(path: Path, attn: Any) -> None:
    hf = json.loads(path.read_text())
    expected = {
        "hidden_size": attn.embed_dim,
        "num_attention_heads": attn.num_heads,
        "num_key_value_heads": attn.num_kv_heads,
    }
    for key, value in expected.items():
        if key in hf and hf[key] != value:
            raise UserError(f"{path}: {key} is {hf[key]}, but the model of this config has {value}; choose its config")


def _checked(tensors: StateDict, decoder: nn.Module, folder: Path) -> StateDict:
    expected = {k: v.shape for k, v in decoder.state_dict().items()}
    head = tensors.pop("output.weight", None)
    if head is not None and not torch.equal(head, tensors.get("tok_embeddings.weight", torch.empty(0))):
        raise UserError(
            f"{folder}: the head (lm_head / output.weight) differs from the embedding; Llama 3.2 1B and 3B tie them, "
            "and so does the quantized layout: this checkpoint was untied in training and cannot be represented"
        )
    wrong = {k: (tuple(v.shape), tuple(expected[k])) for k, v in tensors.items() if expected.get(k, v.shape) != v.shape}
    if wrong:
        key, (got, want) = next(iter(wrong.items()))
        hint = "; the vocabulary was resized" if key.startswith("tok_embeddings") and got[1] == want[1] else ""
        raise UserError(f"{folder}: {key} has shape {got}, the model of this config {want}{hint}; choose its config")
    missing, left_over = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or left_over:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("keys missing", missing), ("keys not of this model", left_over))
            if keys
        ]
        raise UserError(f"{folder} does not fit the model of this config: {', '.join(parts)}; choose its config")
    return {k: v.float() for k, v in tensors.items()}
