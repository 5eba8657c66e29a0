"""Small Hugging Face tokenizers: byte-level BPE of a few hundred tokens, as SmolLM2, Qwen and Llama 3 have them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEMPLATES = Path(__file__).parent / "data" / "templates"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = [
    "Where does Anna live? Anna lives in Rome. How many days has June? June has 30 days, and so has April.",
    "user\n assistant\n\n system\n\n Tools, one a line: You help. Today is 26 Jul 2024. The weather is fine, 22 C.",
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
DATED = ["<|begin|>", "<|end|>", "<|start|>", "<|header|>", "<|eot|>", "<|eom|>", "<|python|>", "<|pad|>"]


def write_folder(folder: Path, template: str | None = "chatml") -> dict[str, Any]:
    """Write a tokenizer with one of the templates, or none; return its section. `smol` has GPT-2's pattern."""
    dated = template == "dated"
    special = DATED if dated else CHATML
    made = Tokenizer(models.BPE())
    if template == "smol":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    else:
        split: Any = pre_tokenizers.Split(Regex(QWEN), "isolated")
        byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore
    if template in ("chatml", "thinking"):
        made.normalizer = normalizers.NFC()  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if not dated:
        made.add_tokens([AddedToken(t, special=False, normalized=False) for t in NOT_SPECIAL])
    made.post_processor = processors.ByteLevel(trim_offsets=True)  # pyright: ignore
    if dated:
        bos = [("<|begin|>", made.token_to_id("<|begin|>"))]
        front: Any = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=bos)
        trim: Any = processors.ByteLevel(trim_offsets=True)
        made.post_processor = processors.Sequence([trim, front])  # pyright: ignore
    return _write(folder, made, template, dated)


def _write(folder: Path, made: Tokenizer, template: str | None, dated: bool) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    ids = {t: made.token_to_id(t) for t in (DATED if dated else CHATML)}
    bos, eos, pad = ("<|begin|>", "<|end|>", "<|pad|>") if dated else (None, "<|im_end|>", "<|endoftext|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad}
    stops = [ids[t] for t in (("<|end|>", "<|eot|>", "<|eom|>") if dated else ("<|im_end|>", "<|endoftext|>"))]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    section = {
        "_component_": "llamaq.data.hf_tokenizer.hf_tokenizer",
        "path": str(folder / "tokenizer.json"),
        "config": str(folder / "tokenizer_config.json"),
        "generation_config": str(folder / "generation_config.json"),
    }
    if template is None:
        return section
    code = (TEMPLATES / f"{'chatml' if template == 'smol' else template}.jinja").read_text()
    (folder / "chat_template.jinja").write_text(code)
    return section | {"chat_template": str(folder / "chat_template.jinja")}
