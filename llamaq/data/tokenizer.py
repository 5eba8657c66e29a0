"""The tokenizer of a run, and prompts as the model saw them in training."""

import copy
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
    template = Template(tokenizer, chat)
    return template.opening + template.turn(prompt)


def chat_tokens(tokenizer: Any, *turns: tuple[str, str]) -> list[int]:
    """Tokenize turns (role, text) as in training, the last of them left open for the model to go on.

    Nothing is cut off: `tokenizer.max_seq_len` is for training samples.
    """
    from torchtune.data import Message

    unlimited = copy.copy(tokenizer)
    unlimited.max_seq_len = None
    messages = [Message(role=role, content=text) for role, text in turns]  # pyright: ignore[reportArgumentType]
    return unlimited.tokenize_messages(messages, add_end_tokens=False)[0]


class Template:
    """Turn a conversation into tokens piece by piece.

    `opening`, then for each turn `turn(question)`, the tokens of the answer and `closing`: joined, the pieces are what
    the tokenizer makes of the whole conversation, because it encodes message by message. Plain text opens with BOS, and
    a line break stands between turns.
    """

    def __init__(self, tokenizer: Any, chat: bool, system: str | None = None):
        """Work out the pieces.

        Args:
            tokenizer: of the run.
            chat: whether to use the tokenizer's chat template.
            system: a system prompt, which becomes part of the opening.
        """
        self._tokenizer, self._chat = tokenizer, chat
        if not chat:
            self.opening, self.closing = [tokenizer.bos_id], self.turn("\n")
            return
        answer, turn = ("assistant", ""), self.turn("")
        before = [] if system is None else [("system", system)]
        self.opening = chat_tokens(tokenizer, *before, ("user", ""), answer)[: -len(turn)]
        after_answer = chat_tokens(tokenizer, answer, ("user", ""), answer)
        self.closing = after_answer[len(chat_tokens(tokenizer, answer)) : -len(turn)]

    def turn(self, text: str) -> list[int]:
        """Return the tokens of a question, up to where its answer begins."""
        if not self._chat:
            return self._tokenizer.encode(text, add_bos=False, add_eos=False)
        return chat_tokens(self._tokenizer, ("user", text), ("assistant", ""))[1:]  # without BOS


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    """Decode tokens. Ids that only round up the size of the model's vocabulary have no text."""
    known, special = tokenizer.base_vocab_size, set(getattr(tokenizer, "special_tokens", {}).values())
    return tokenizer.decode([t for t in tokens if t < known or t in special])


def copy_tokenizer(component: Component, folder: Path) -> None:
    """Copy the tokenizer's files into a checkpoint's folder, under the name that loaders look for."""
    if component.get("path"):
        shutil.copyfile(component["path"], folder / "tokenizer.model")
    if component.get("special_tokens_path"):
        shutil.copyfile(component["special_tokens_path"], folder / Path(component["special_tokens_path"]).name)
