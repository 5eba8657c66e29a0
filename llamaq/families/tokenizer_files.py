"""Which tokenizer a checkpoint folder has: Hugging Face's files, or Meta's."""

from pathlib import Path

from llamaq.config.components import Component
from llamaq.errors import UserError

HUGGING_FACE, META = "llamaq.data.hf_tokenizer.hf_tokenizer", "torchtune.models.llama3.llama3_tokenizer"
# arguments that hold a file → its name; each is an argument, so that its content counts in a stage's identity
FILES = {
    META: {"path": "tokenizer.model", "special_tokens_path": "special_tokens.json"},
    HUGGING_FACE: {
        "path": "tokenizer.json",
        "config": "tokenizer_config.json",
        "chat_template": "chat_template.jinja",
        "generation_config": "generation_config.json",
    },
}


def section_in(folder: Path, component: str) -> Component | None:
    """Return the `tokenizer` section for one kind of files in a folder; None if they are not there."""
    found = {key: str(folder / name) for key, name in FILES[component].items() if (folder / name).is_file()}
    return {"_component_": component, **found} if "path" in found else None


def tokenizer_in(folder: Path) -> Component | None:
    """Return the `tokenizer` section for the files in a folder, without `max_seq_len`; None if there are none."""
    if section := section_in(folder, HUGGING_FACE):
        return section
    for place in (folder, folder / "original"):
        section = section_in(place, META)
        if section and _is_tiktoken(Path(section["path"])):
            return section
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
