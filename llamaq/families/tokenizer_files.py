"""Which tokenizer a checkpoint folder has: Hugging Face's files, or Meta's."""

from pathlib import Path

from llamaq.config.components import Component
from llamaq.errors import UserError

HUGGING_FACE, META = "llamaq.data.hf_tokenizer.hf_tokenizer", "torchtune.models.llama3.llama3_tokenizer"
# argument of hf_tokenizer → file; each is an argument, so that its content counts in a stage's identity
BESIDE = {
    "config": "tokenizer_config.json",
    "chat_template": "chat_template.jinja",
    "generation_config": "generation_config.json",
}


def tokenizer_in(folder: Path) -> Component | None:
    """Return the `tokenizer` section for the files in a folder, without `max_seq_len`; None if there are none."""
    if (folder / "tokenizer.json").is_file():
        beside = {key: str(folder / name) for key, name in BESIDE.items() if (folder / name).is_file()}
        return {"_component_": HUGGING_FACE, "path": str(folder / "tokenizer.json"), **beside}
    for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
        if path.is_file() and _is_tiktoken(path):
            special = path.parent / "special_tokens.json"  # of a vocabulary that is not Llama 3's
            own = {"special_tokens_path": str(special)} if special.is_file() else {}
            return {"_component_": META, "path": str(path), **own}
    return None


def no_tokenizer(folder: Path) -> UserError:
    """Return the error about a folder without one that can be read."""
    if (folder / "tokenizer.model").is_file():
        found = "its tokenizer.model is SentencePiece's, not Llama 3's"
    elif (folder / "vocab.json").is_file():
        found = "vocab.json and merges.txt are an older form"
    else:
        return UserError(
            f"checkpoint_dir={folder} has no tokenizer.json (Hugging Face) and no tokenizer.model (Meta); download it "
            "too, or give the section tokenizer"
        )
    return UserError(
        f"checkpoint_dir={folder} has no tokenizer.json: {found}; write one with transformers: "
        f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
    )


def _is_tiktoken(path: Path) -> bool:
    """Tell Llama 3's file, lines of base64 and a rank, from SentencePiece's, which is binary."""
    with path.open("rb") as f:
        line = f.readline(4096).split()
    return len(line) == 2 and line[1].isdigit()
