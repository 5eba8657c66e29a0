"""Plain text: documents, windows of tokens for evaluation and calibration, and preference pairs without a template."""

from pathlib import Path
from typing import Any

from llamaq.data.batches import IGNORE
from llamaq.errors import UserError


def read_documents(path: str | Path, setting: str) -> list[str]:
    """Read a text file's documents, which form feeds separate.

    Raises:
        UserError: no such file, or nothing in it.
    """
    if not Path(path).is_file():
        raise UserError(f"{setting}={path}: no such file")
    documents = [d.strip() for d in Path(path).read_text(encoding="utf-8").split("\f") if d.strip()]
    if not documents:
        raise UserError(f"{setting}={path}: no text in it")
    return documents


class TextPreferenceDataset:
    """Preference pairs over plain text, without a chat template: `prompt`, `chosen` and `rejected` columns.

    A sample has torchtune's keys `chosen_input_ids`, `chosen_labels`, `rejected_input_ids`, `rejected_labels`.
    """

    def __init__(self, tokenizer: Any, source: str, **load_dataset_kwargs: Any):
        from datasets import load_dataset

        self._tokenizer = tokenizer
        self._data = load_dataset(source, **load_dataset_kwargs)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row: Any = self._data[index]
        prompt = self._tokenizer.encode(row["prompt"], add_bos=True, add_eos=False)
        sample = {}
        for side in ("chosen", "rejected"):
            answer = self._tokenizer.encode(row[side], add_bos=False, add_eos=False)
            sample[f"{side}_input_ids"] = (prompt + answer)[: self._tokenizer.max_seq_len]
            sample[f"{side}_labels"] = ([IGNORE] * len(prompt) + answer)[: self._tokenizer.max_seq_len]
        return sample


def text_preference_dataset(tokenizer: Any, source: str, split: str = "train", **kwargs: Any) -> TextPreferenceDataset:
    """Build the dataset from a config: `source: json`, `data_files: pairs.jsonl`."""
    return TextPreferenceDataset(tokenizer, source, split=split, **kwargs)


class TextWindows:
    """A text file's documents in windows of `tokenizer.max_seq_len` tokens, for evaluation and calibration.

    A document starts with BOS and ends with EOS. No token is left out, and none is in two windows.
    """

    def __init__(self, tokenizer: Any, source: str):
        self._windows: list[list[int]] = []
        for document in read_documents(source, "evaluate.dataset.source"):
            tokens = tokenizer.encode(document, add_bos=True, add_eos=True)
            self._windows += [
                tokens[i : i + tokenizer.max_seq_len] for i in range(0, len(tokens) - 1, tokenizer.max_seq_len)
            ]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"tokens": self._windows[index], "labels": self._windows[index]}


def text_windows_dataset(tokenizer: Any, source: str) -> TextWindows:
    """Build the dataset from a config: `source: heldout.txt`."""
    return TextWindows(tokenizer, source)
