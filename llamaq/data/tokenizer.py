"""The tokenizer of a run, and prompts as the model saw them in training."""

import os
import shutil
from pathlib import Path
from typing import Any

from llamaq.config import Component, Config
from llamaq.config.components import instantiate
from llamaq.errors import UserError
from llamaq.model.shape import shape_of

# Llama's tokenizer names these ids, but a text model has no rows for them; they never occur in text.
_NOT_IN_TEXT = ("<|image|>", "<|video|>")


def tokenizer_of(c: Config) -> Any:
    """Return the run's tokenizer; see `build_tokenizer`."""
    return build_tokenizer(c.tokenizer, shape_of(c.model).vocab)


def build_tokenizer(component: Component, vocab_size: int) -> Any:
    """Build the tokenizer and check it against the model's vocabulary.

    Raises:
        UserError: file missing or not a tiktoken file, or token ids the model has no row for.
    """
    for key in ("path", "special_tokens_path"):
        path = component.get(key)
        if path and not Path(path).is_file():
            raise UserError(f"tokenizer.{key}={path}: no such file")
    # tiktoken caches files by their path alone, in the temporary folder and across runs: a tokenizer that changed
    # at the same path would be read as it was before; an empty folder name turns that off
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        tokenizer = instantiate(component, setting="tokenizer")
    except (ValueError, KeyError, IndexError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"tokenizer.path={component.get('path')}: not a tokenizer of this kind ({e})") from e
    special = getattr(tokenizer, "special_tokens", {})
    largest = max([tokenizer.base_vocab_size - 1, *(i for t, i in special.items() if t not in _NOT_IN_TEXT)])
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, the model only {vocab_size} rows (model.vocab_size); "
            "tokenizer and model do not belong together (or special_tokens_path is missing)"
        )
    return tokenizer


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Tokenize a prompt as in training: a user's turn and the start of the answer, or plain text after BOS."""
    if not chat:
        return tokenizer.encode(prompt, add_bos=True, add_eos=False)
    from torchtune.data import Message

    messages = [Message(role="user", content=prompt), Message(role="assistant", content="")]
    return tokenizer.tokenize_messages(messages, add_end_tokens=False)[0]


def copy_tokenizer(component: Component, folder: Path) -> None:
    """Copy the tokenizer's files into a checkpoint's folder, under the name that loaders look for."""
    if component.get("path"):
        shutil.copyfile(component["path"], folder / "tokenizer.model")
    if component.get("special_tokens_path"):
        shutil.copyfile(component["special_tokens_path"], folder / Path(component["special_tokens_path"]).name)
