"""Hugging Face tokenizers: tokenizer.json, and the files beside it that say which tokens do what."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamaq.data.chat_template import DEFAULT_DATE, ChatTemplate
from llamaq.data.chat_tokenizer import ChatTokenizer
from llamaq.errors import UserError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]")  # where the files name no token for padding
VERSION = "1"  # raise it when other ids follow from the same files


def hf_tokenizer(
    path: str,
    config: str | None = None,
    chat_template: str | None = None,
    generation_config: str | None = None,
    max_seq_len: int | None = None,
    date: str = DEFAULT_DATE,
) -> "HFTokenizer":
    """Build a tokenizer from the files of a Hugging Face folder.

    Args:
        path: tokenizer.json.
        config: tokenizer_config.json, which names the special tokens and may hold the chat template.
        chat_template: a file with a chat template, which goes before that of `config`.
        generation_config: generation_config.json, which names the tokens that end an answer.
        max_seq_len: the most tokens of a training sample; None for no limit.
        date: the day that a chat template is told which asks for today's. Transformers says the true one; here it is
            fixed, so that a run that goes on tomorrow trains on the same tokens.

    Raises:
        UserError: a file that is missing or none of its kind.
    """
    return HFTokenizer(path, config, chat_template, generation_config, max_seq_len, date)


class HFTokenizer(ChatTokenizer):
    """A `tokenizers.Tokenizer` that reads text as text: special tokens come from the chat template only."""

    def __init__(
        self,
        path: str,
        config: str | None,
        chat_template: str | None,
        generation_config: str | None,
        max_seq_len: int | None,
        date: str,
    ):
        """Read the files; see `hf_tokenizer`."""
        self._arguments = (path, config, chat_template, generation_config, max_seq_len, date)
        settings, generation = _read_json(config, "config"), _read_json(generation_config, "generation_config")
        self._tokenizer = _load(path)
        self.max_seq_len = max_seq_len
        names = {name: text for name in NAMED if (text := _text_of(settings.get(name)))}
        _add_tokens(self._tokenizer, settings, names)
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: i for i, token in added if token.special}
        self._front = self._added_in_front()
        # what the library puts around a text is added by `encode` here; left on, it would also trim the offsets
        self._tokenizer.post_processor = None
        self._tokenizer.encode_special_tokens = True
        self.base_vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._choose_ids(names, _ids_of(generation.get("eos_token_id")), path)
        self._read_template(settings, names, chat_template, date)
        if self.template is not None:
            ends = [self.special_tokens[text] for text in self.template.ends if text in self.special_tokens]
            self.stop_tokens += sorted({*ends} - {*self.stop_tokens})
        files = [_bytes(path), json.dumps([settings, self.stop_tokens], sort_keys=True).encode()]
        template = self.template.source if self.template else None
        self.fingerprint = _digest(VERSION, date, json.dumps(template, sort_keys=True), *files)

    def __reduce__(self) -> Any:
        """Let workers read the files again: a compiled template cannot be pickled."""
        return hf_tokenizer, self._arguments

    def _added_in_front(self) -> list[int]:
        """Return the ids that the tokenizer puts in front of a text."""
        whole, bare = (self._tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at]

    def _choose_ids(self, names: dict[str, str], stops: list[int], path: str) -> None:
        ids = {name: self._tokenizer.token_to_id(text) for name, text in names.items()}
        for name in ("bos_token", "eos_token"):  # the others, such as a token for padding, are not needed
            if name in ids and ids[name] is None:
                raise UserError(f"tokenizer.config: {name} is {names[name]!r}, which is no token of {path}")
        ids = {name: i for name, i in ids.items() if i is not None}
        eos = ids.get("eos_token", stops[0] if stops else None)
        if eos is None:
            raise UserError(
                f"tokenizer.path={path}: nothing says which token ends a text; give its tokenizer_config.json "
                "(tokenizer.config), with an eos_token"
            )
        pads = [i for text in PADS if (i := self._tokenizer.token_to_id(text)) is not None]
        self.eos_id, self.pad_id = eos, ids.get("pad_token", [*pads, eos][0])
        self.bos_id = self._front[0] if self._front else None
        self.prefix_id = ids.get("bos_token", eos if self.bos_id is None else self.bos_id)
        self.stop_tokens = list(dict.fromkeys([eos, *stops]))

    def _read_template(self, settings: dict[str, Any], names: dict[str, str], file: str | None, day: str) -> None:
        """Take the template of the file, or that of tokenizer_config.json, where a list holds several by name."""
        source: Any = settings.get("chat_template")
        self.template_name = "the chat template of tokenizer_config.json"
        if file:
            source, self.template_name = _bytes(file).decode(), f"the chat template {Path(file).name}"
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}
        added = self._tokenizer.get_added_tokens_decoder().values()
        patterns = {token.content: _pattern(token) for token in added if token.special}
        ends = [text for text, i in self.special_tokens.items() if i in self.stop_tokens]
        self.template = None
        if source:
            self.template = ChatTemplate(source, names, patterns, [t.content for t in added], ends, day)
        if self.template is None:
            self.template_name = "no chat template"
        elif self.template.uses_date:
            self.template_name += f", with the date {day}"

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the ids of a text. Special tokens in it are text.

        Args:
            text: to tokenize.
            add_bos: begin as the tokenizer begins a text; many add nothing.
            add_eos: end with the token that ends a text.
        """
        return [
            *(self._front if add_bos else []),
            *self._encode_text(text, [])[0],
            *([self.eos_id] if add_eos else []),
        ]

    def _encode_text(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as e:
            raise UserError(f"text with half a character, which cannot be written: {text[:60]!a}") from e
        return encoding.ids, [start for start, _ in encoding.offsets] if cuts else []

    def decode(self, token_ids: list[int], truncate_at_eos: bool = True, skip_special_tokens: bool = True) -> str:
        """Return the text of ids, up to the first token that ends a text."""
        ids = list(token_ids)
        if truncate_at_eos and self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


# --- files ------------------------------------------------------------------------------------------------------------


def _load(path: str) -> Any:
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise UserError(f"tokenizer.path={path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as e:  # the library raises Exception itself
        meta = _bytes(path)[:1] != b"{"
        hint = "; for Meta's tokenizer.model use _component_: torchtune.models.llama3.llama3_tokenizer" if meta else ""
        said = " ".join(str(e).split())[:120]
        raise UserError(f"tokenizer.path={path}: not a tokenizer.json of Hugging Face ({said}){hint}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: str | None, key: str) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(_bytes(path))
    except (ValueError, OSError) as e:
        raise UserError(f"tokenizer.{key}={path}: cannot be read as JSON ({e})") from e
    if not isinstance(content, dict):
        raise UserError(f"tokenizer.{key}={path}: holds no JSON object")
    return content


def _bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def _text_of(token: Any) -> str | None:
    """Return the text of a token, which tokenizer_config.json has as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _ids_of(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])


def _add_tokens(tokenizer: Any, settings: dict[str, Any], names: dict[str, str]) -> None:
    """Add the tokens that tokenizer_config.json knows and tokenizer.json does not, as transformers does.

    Raises:
        UserError: such a token would get another id than the file says.
    """
    from tokenizers import AddedToken

    for key, entry in sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        text, special = entry["content"], bool(entry.get("special"))
        if tokenizer.token_to_id(text) is None:
            flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            tokenizer.add_tokens([AddedToken(text, special=special, **flags)])
        if tokenizer.token_to_id(text) != int(key):
            raise UserError(
                f"tokenizer.config: token {text!r} has id {key} there, and {tokenizer.token_to_id(text)} in "
                "tokenizer.json: the two files do not belong together"
            )
    known = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    further = [
        text for text in _further(settings, names) if text not in known and tokenizer.token_to_id(text) is not None
    ]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in further])


def _further(settings: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    """Yield the tokens that tokenizer_config.json calls special by their role."""
    yield from names.values()
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = settings.get(key) or []
        yield from filter(None, map(_text_of, tokens.values() if isinstance(tokens, dict) else tokens))


def _pattern(token: Any) -> str:
    """Return a pattern that finds a token as the library does, with the white space that it takes along."""
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")


def _digest(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8) + data)
    return whole.hexdigest()
