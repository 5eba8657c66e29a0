"""The checkpoint a run starts from: Hugging Face, Meta or torchtune layout → torchtune names, float32.

`llamaq.families.describe` tells the layout and what model the folder says it is:
    config.json and weights                Hugging Face (llamaq.checkpoints.hugging_face)
    consolidated.00.pth                    Meta (llamaq.checkpoints.meta)
    *.pt, *.bin or *.safetensors alone     torchtune (llamaq.checkpoints.torchtune)

Where the model ties its head to the embedding, a separate head is accepted only if it equals the embedding.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaq.checkpoints.hugging_face import in_row_order, torchtune_name
from llamaq.checkpoints.tensors import read_tensors
from llamaq.config import Config
from llamaq.errors import UserError
from llamaq.families import Described, describe
from llamaq.families.architecture import SPELLINGS
from llamaq.families.weight_files import check_distinct, quantized
from llamaq.model.architecture import architecture_of
from llamaq.model.build import StateDict, meta_decoder
from llamaq.model.names import EMBEDDING, HEAD, torchtune_key
from llamaq.runs.files import LARGE
from llamaq.runs.manifest import MANIFEST
from llamaq.runs.tracking import progress

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RENAME: dict[str, Callable[[str], str | None]] = {
    "hugging_face": torchtune_name,
    "meta": lambda key: None if key == "rope.freqs" else torchtune_key(key),
    "torchtune": lambda key: key,
}


def start_weights(c: Config) -> StateDict:
    """Read the BF16 model that a run starts from, as float32 weights with torchtune names."""
    return load_checkpoint(c.checkpoint_dir, meta_decoder(c.model))


def start_inputs(c: Config) -> list[Path]:
    """List what a run starts from, as inputs of a stage: the base stage's folder, or the checkpoint's files."""
    folder = Path(c.checkpoint_dir)
    stage = folder.parent
    return [stage] if (stage / MANIFEST).is_file() else checkpoint_files(folder)


def load_checkpoint(folder: str | Path, decoder: nn.Module) -> StateDict:
    """Read a checkpoint folder into weights for `decoder` (of torchtune's modules): float32, keys as the decoder's.

    Raises:
        UserError: folder or file missing or torn, an unknown layout, numbers that contradict the decoder's, keys
            missing or left over, a wrong shape, weights that are quantized or not finite, or a head that differs from
            the embedding where the model ties them.
    """
    found = describe(folder)
    _check_agreement(found, decoder)
    read = {file: read_tensors(file) for file in found.weights}
    check_distinct({file: list(tensors) for file, tensors in read.items()})
    tensors, names = _renamed({k: v for part in read.values() for k, v in part.items()}, found)
    del read  # `_floats` lets go of each tensor in its turn
    _check_fit(tensors, names, decoder, found)
    if HEAD in tensors and HEAD not in decoder.state_dict():
        _check_tied(tensors.pop(HEAD), tensors[EMBEDDING], found)
    if found.layout == "hugging_face":
        tensors = in_row_order(tensors, decoder)
    return _floats(tensors, names, found.folder)


def check_start(folder: str | Path, decoder: nn.Module) -> None:
    """Check that a folder's weights go into a decoder, as far as headers tell; no weight is read.

    Raises:
        UserError: as `load_checkpoint`.
    """
    found = describe(folder)
    _check_agreement(found, decoder)
    if None not in found.headers.values():
        header = {k: v for part in found.headers.values() for k, v in (part or {}).items()}
        _check_fit(*_renamed(header, found), decoder, found)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """List the files whose content decides what `load_checkpoint` returns; a folder may hold much else."""
    found = describe(folder)
    return [*([found.source] if found.source and found.layout == "hugging_face" else []), *found.weights]


def _renamed(tensors: Mapping[str, Any], found: Described) -> tuple[dict[str, Any], dict[str, str]]:
    """Return tensors, or what a header says of them, by torchtune's names; and the names that they have in the file."""
    names = {new: key for key in tensors if (new := RENAME[found.layout](key)) is not None}
    return {new: tensors[key] for new, key in names.items()}, names


# --- what the folder says, and what the decoder is -------------------------------------------------------------------


def _check_agreement(found: Described, decoder: nn.Module) -> None:
    """Check every number in config.json or params.json against the decoder's.

    Raises:
        UserError: naming the first that differs, with both values.
    """
    if found.codes:
        raise UserError(quantized(found.folder, f"llamaq: {found.codes}"))
    if found.architecture is None:
        return
    for field, said, ours in found.architecture.differences(architecture_of(decoder)):
        if field == "tie_word_embeddings" and ours:
            continue  # the weights decide: a head that equals the embedding is as good as tied
        if field == "max_seq_len" and (ours < said or found.layout == "meta"):
            continue  # fewer positions are a user's choice, and Meta's files do not say how many there are
        spelled = SPELLINGS.get(field, (field, field))[found.layout == "meta"]
        raise UserError(
            f"{found.source}: {spelled} is {said}, but the model of this config has {field} {ours}; leave out the "
            "section model (~model), and all of it is taken from the folder"
        )


def _check_fit(tensors: Mapping[str, Any], names: dict[str, str], decoder: nn.Module, found: Described) -> None:
    """Check names and shapes of tensors, or of what a header says of them, against a decoder's parameters.

    Raises:
        UserError: naming the first that does not fit.
    """
    model = "the model of this config" if found.source is None else f"the model of {found.source.name}"
    expected = {k: tuple(v.shape) for k, v in decoder.state_dict().items()}
    left_over = [names[k] for k in sorted(tensors.keys() - expected.keys() - {HEAD})]
    missing = sorted(expected.keys() - tensors.keys())
    if missing or left_over:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("keys missing", missing), ("keys not of this model", left_over))
            if keys
        ]
        raise UserError(f"{found.folder} does not fit {model}: {', '.join(parts)}; choose the one that belongs to it")
    for key, want in expected.items():
        got = tuple(tensors[key].shape)
        if got != want:
            hint = "; the vocabulary was resized" if key == EMBEDDING and got[1:] == want[1:] else ""
            raise UserError(
                f"{found.folder}: {names[key]} has shape {got}, {model} {want}{hint}; choose the one that belongs to it"
            )


def _check_tied(head: Tensor, embedding: Tensor, found: Described) -> None:
    """Check that a head that is not used equals the embedding, which is used in its place.

    Raises:
        UserError: it differs.
    """
    if torch.equal(head, embedding):
        return
    if found.architecture is not None and found.architecture.tie_word_embeddings:
        raise UserError(
            f"{found.source}: tie_word_embeddings is true, but lm_head.weight differs from the embedding: transformers "
            "4 ignores such a head and transformers 5 uses it; set the key to false to use it, or delete the tensor"
        )
    raise UserError(
        f"{found.folder}: the head (lm_head / output.weight) differs from the embedding, and the model of this config "
        "ties them; leave out the section model (~model), or set model.tie_word_embeddings=false"
    )


# --- what the weights are --------------------------------------------------------------------------------------------


def _floats(tensors: StateDict, names: dict[str, str], folder: Path) -> StateDict:
    """Return the tensors in float32, each read and checked in its turn, so that the file's own are not held beside.

    Raises:
        UserError: one holds integers, NaN or infinity.
    """
    keys: Any = list(tensors)
    if sum(v.nbytes for v in tensors.values()) >= LARGE:  # files that are mapped are read here
        keys = progress(keys, f"reading {folder.name}", unit="tensor")
    result = {}
    for key in keys:
        value = tensors.pop(key)
        if value.dtype not in FLOATS:
            raise UserError(quantized(folder, f"{names[key]} is {str(value.dtype).removeprefix('torch.')}"))
        result[key] = value.float()
        check_finite(f"{folder}: {names[key]}", result[key])
    return result


def check_finite(name: str, t: Tensor) -> None:
    """Check that a float tensor has neither NaN nor infinity.

    Raises:
        UserError: it has; says how many.
    """
    if t.numel() and not torch.stack(torch.aminmax(t)).isfinite().all():  # NaN is both minimum and maximum
        count = int((~t.isfinite()).sum())
        raise UserError(
            f"{name} has {count} of {t.numel()} values that are NaN or infinite; the checkpoint is damaged, or its "
            "training diverged: take an earlier one"
        )
