"""The tokenizer of a run, and prompts as the model saw them in training.

Whatever the component, `build_tokenizer` returns a `ChatTokenizer` (`llamaq/data/chat_tokenizer.py`).
"""

import os
import shutil
from pathlib import Path
from typing import Any

from llamaq.config import Component, Config
from llamaq.config.components import instantiate
from llamaq.data.llama3_tokenizer import Llama3Tokenizer
from llamaq.errors import UserError
from llamaq.families.tokenizer_files import FILES, HUGGING_FACE
from llamaq.families.tokenizer_files import META as LLAMA3
from llamaq.model.shape import shape_of

OURS = ("template", "date")  # keys of a section with torchtune's component that llamaq reads itself
# The tokenizer names these ids, but a text model has no rows for them; they never occur in text.
_NOT_IN_TEXT = ("<|image|>", "<|video|>")


def tokenizer_of(c: Config) -> Any:
    """Return the run's tokenizer; see `build_tokenizer`."""
    return build_tokenizer(c.tokenizer, shape_of(c.model).vocab)


def build_tokenizer(component: Component, vocab_size: int) -> Any:
    """Build the tokenizer and check it against the model's vocabulary.

    For Llama 3's own tokenizer the section may have two keys of llamaq's beside torchtune's: `template`, the form of
    the chat template, and `date`.

    Raises:
        UserError: file missing or not of its kind, or token ids the model has no row for.
    """
    name = component["_component_"]
    for key in FILES.get(name, ()):
        _check_file(component, key)
    # tiktoken caches files by their path alone, in the temporary folder and across runs: a tokenizer that changed
    # at the same path would be read as it was before; an empty folder name turns that off
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ours = {k: v for k, v in component.items() if k in OURS} if name == LLAMA3 else {}
    try:
        tokenizer = instantiate({k: v for k, v in component.items() if k not in ours}, setting="tokenizer")
    except (ValueError, KeyError, IndexError) as e:
        if isinstance(e, UserError):
            raise
        said = " ".join(str(e).split())[:120]
        raise UserError(f"tokenizer.path={component.get('path')}: not a tokenizer of this kind ({said})") from e
    if name == LLAMA3:
        form, day, prompts = ours.get("template", "torchtune"), ours.get("date"), component.get("prompt_template")
        dated = {"date": day} if day else {}
        tokenizer = Llama3Tokenizer(tokenizer, component["path"], form, **dated, prompts=prompts)
    elif not hasattr(tokenizer, "fingerprint"):
        raise UserError(f"tokenizer._component_={name}: use {HUGGING_FACE} for a tokenizer.json, or {LLAMA3}")
    _check_ids(tokenizer, vocab_size)
    return tokenizer


def _check_file(component: Component, key: str) -> None:
    """Check that a file is there and of the right kind.

    Raises:
        UserError: it is not, with what to use instead.
    """
    path = component.get(key)
    if not path:
        return
    file, tool = Path(path), component["_component_"]
    if not file.is_file():
        near = [f for f in (file.parent, file.parent.parent) if (f / "tokenizer.json").is_file()]
        hint = (
            f"; {near[0]}/tokenizer.json is there: use _component_: {HUGGING_FACE} with it, or leave the section "
            "tokenizer out"
            if tool == LLAMA3 and key == "path" and near
            else ""
        )
        raise UserError(f"tokenizer.{key}={path}: no such file{hint}")
    with file.open("rb") as f:
        begins_as_json = f.read(64).lstrip()[:1] == b"{"
    if tool == LLAMA3 and key == "path" and begins_as_json:
        raise UserError(
            f"tokenizer.path={path}: a tokenizer.json of Hugging Face, and {LLAMA3} reads Meta's tokenizer.model; use "
            f"_component_: {HUGGING_FACE}, or leave the section tokenizer out"
        )


def _check_ids(tokenizer: Any, vocab_size: int) -> None:
    """Check that the model has a row for every id.

    Raises:
        UserError: naming the first token without one.
    """
    special = {i: t for t, i in tokenizer.special_tokens.items() if t not in _NOT_IN_TEXT}
    largest = max([tokenizer.base_vocab_size - 1, *special])
    if largest < vocab_size:
        return
    named = [f"{special[i]} is {i}" for i in sorted(special) if i >= vocab_size]
    raise UserError(
        f"the tokenizer has ids up to {largest}{f' ({named[0]})' if named else ''}, the model only {vocab_size} rows "
        "(model.vocab_size): they do not belong together, or tokens were added to the tokenizer and the model was not "
        "resized, or special_tokens_path is missing"
    )


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Tokenize a prompt as in training: a user's turn and the start of the answer, or plain text."""
    if not chat:
        return tokenizer.encode(prompt, add_bos=True, add_eos=False)
    return tokenizer.prompt([{"role": "user", "content": prompt}])


def text_opening(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts in front of plain text: BOS, or nothing."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    """Decode tokens. Ids that only round up the size of the model's vocabulary have no text."""
    known, special = tokenizer.base_vocab_size, set(tokenizer.special_tokens.values())
    return tokenizer.decode([t for t in tokens if t < known or t in special])


def copy_tokenizer(component: Component, folder: Path) -> list[str]:
    """Copy the tokenizer's files into a folder, under the names that loaders look for; return the names."""
    names = FILES.get(component["_component_"], {})
    copied = [key for key in names if component.get(key)]
    for key in copied:
        shutil.copyfile(component[key], folder / names[key])
    return [names[key] for key in copied]
