"""Write a tiktoken tokenizer for runtimes that read Hugging Face's files: tokenizer.json and tokenizer_config.json.

The same text gives the same ids: tokenizer.json holds the same tokens, pattern and special tokens. Two things differ by
design. It recognises special tokens in text, because a chat template is rendered to text first; torchtune's `encode`
reads them as plain text. And it opens text with the beginning-of-text token, unless told not to.
"""

import json
from pathlib import Path
from typing import Any


def is_tiktoken(tokenizer: Any) -> bool:
    """Tell whether a tokenizer holds a tiktoken encoding, as torchtune's for Llama 3 does."""
    return hasattr(getattr(getattr(tokenizer, "tt_model", None), "tt_model", None), "_mergeable_ranks")


def special_tokens_of(tokenizer: Any, rows: int) -> dict[str, int]:
    """Return the special tokens a model of so many rows can read, by id; ids between them get a name of their own.

    torchtune's table for Llama 3 leaves out 128011; the library numbers added tokens without gaps.
    """
    named = {i: t for t, i in tokenizer.tt_model.tt_model._special_tokens.items() if i < rows}
    first = len(tokenizer.tt_model.tt_model._mergeable_ranks)
    return {named.get(i, f"<|unused_{i}|>"): i for i in range(first, max(named) + 1)}


def hugging_face_tokenizer(tokenizer: Any, rows: int) -> Any:
    """Return a `tokenizers.Tokenizer` that gives the ids of a torchtune tokenizer.

    Args:
        tokenizer: Llama 3's, over a tiktoken encoding.
        rows: of the model's embedding; special tokens beyond them are left out.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    encoding, special = tokenizer.tt_model.tt_model, special_tokens_of(tokenizer, rows)
    ranks, character = encoding._mergeable_ranks, _character_of_byte()
    vocab = {"".join(character[b] for b in token): rank for token, rank in ranks.items()}
    # tiktoken takes a piece of text that is a token as it is, before it merges anything: ignore_merges
    made = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab), ignore_merges=True))
    split: Any = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = _text_of(special, tokenizer.bos_id)
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    assert all(made.token_to_id(token) == i for token, i in special.items())
    return made


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return every way to join two tokens into a third, in the order of the third.

    tiktoken joins whatever neighbours make the token of lowest rank, so all splits of a token count, not one.
    """
    merges = []
    for token in vocab:  # in the order of their ranks
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _character_of_byte() -> list[str]:
    """Return GPT-2's character for every byte: printable bytes as they are, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(0x100 + others.index(b)) for b in range(256)]


def _text_of(special: dict[str, int], token: int) -> str:
    return next(text for text, i in special.items() if i == token)


def tokenizer_config(tokenizer: Any, rows: int, max_length: int, chat: bool) -> dict[str, Any]:
    """Return the content of tokenizer_config.json.

    Args:
        tokenizer: Llama 3's.
        rows: of the model's embedding.
        max_length: tokens that the model can hold.
        chat: whether the model was trained on chats: then answers end with the end of a turn, not of a text.
    """
    special = special_tokens_of(tokenizer, rows)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _text_of(special, tokenizer.bos_id),
        "eos_token": _text_of(special, tokenizer.eot_id if chat else tokenizer.eos_id),
        "pad_token": _text_of(special, tokenizer.pad_id),
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): _added(text) for text, i in special.items()},
    }
    # a prompt template of the user's own adds text around messages, which the chat template does not have
    code = tokenizer.template.source["default"]
    return config | ({"chat_template": code} if tokenizer.prompt_template is None else {})


def _added(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **flags, "special": True}


def write_tokenizer(tokenizer: Any, rows: int, max_length: int, chat: bool, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens.json, in which torchtune reads special tokens."""
    hugging_face_tokenizer(tokenizer, rows).save(str(folder / "tokenizer.json"))
    config = tokenizer_config(tokenizer, rows, max_length, chat)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    special = tokenizer.tt_model.tt_model._special_tokens
    added = [{"id": i, "content": text} for text, i in sorted(special.items(), key=lambda item: item[1])]
    (folder / "special_tokens.json").write_text(json.dumps({"added_tokens": added}, indent=0) + "\n")
