"""Plain text: documents, and the names of the datasets that a config reads them with."""

from pathlib import Path
from typing import Any

from llamaq.data.prepared import Pairs, Samples
from llamaq.errors import UserError


def read_documents(path: str | Path, setting: str) -> list[str]:
    """Read a text file's documents, which form feeds separate.

    Raises:
        UserError: no such file, nothing in it, or no UTF-8.
    """
    if not Path(path).is_file():
        raise UserError(f"{setting}={path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{setting}={path} is not UTF-8 ({e.reason} at byte {e.start}); save it as UTF-8") from e
    documents = [d.strip() for d in text.split("\f") if d.strip()]
    if not documents:
        raise UserError(f"{setting}={path}: no text in it")
    return documents


def text_preference_dataset(tokenizer: Any, source: str, **kwargs: Any) -> Pairs:
    """Build preference pairs over plain text, without a chat template: columns `prompt`, `chosen` and `rejected`.

    In a config: `source: json`, `data_files: pairs.jsonl`.
    """
    return _built("text_preference_dataset", tokenizer, {"source": source, **kwargs})


def text_windows_dataset(tokenizer: Any, source: str) -> Samples:
    """Build windows of a text file's documents, for evaluation and calibration. In a config: `source: heldout.txt`.

    A window has `tokenizer.max_seq_len` tokens. A document starts with BOS and ends with EOS. No token is in two
    windows.
    """
    return _built("text_windows_dataset", tokenizer, {"source": source})


def _built(name: str, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    from llamaq.data.datasets import build_dataset  # which reads documents with this file

    return build_dataset({"_component_": f"{__name__}.{name}", **arguments}, tokenizer, name)
