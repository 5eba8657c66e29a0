"""Datasets by torchtune, checked before anything trains, and taken by global sample index.

The order of samples is a function of the seed and the index alone: sample i of a run is the same on one rank or
sixteen, before and after a resume, so the losses are too.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.data import padded_collate_dpo, padded_collate_packed, padded_collate_sft

from llamaq.config import Component, TrainingConfig
from llamaq.data.corpus import read_documents
from llamaq.errors import UserError
from llamaq.model.causal_lm import instantiate
from llamaq.runs.run import say
from llamaq.runs.tracking import progress

IGNORE = -100
Batch = dict[str, Tensor]
# what the head has rows for even where a tokenizer names it: image and video tokens never occur in text
_NOT_IN_TEXT = ("<|image|>", "<|video|>")


def build_tokenizer(component: Component, vocab_size: int) -> Any:
    """The tokenizer, checked against the model's vocabulary.

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


def check_files(component: Component, setting: str) -> None:
    """Check a dataset's local files, JSON line by line.

    Raises:
        UserError: file missing, a malformed line (with its number), or a missing column.
    """
    files = component.get("data_files")
    for name in [files] if isinstance(files, str) else files or []:
        if not Path(name).is_file():
            raise UserError(f"{setting}.data_files={name}: no such file")
        if component.get("source") == "json":
            _check_json(Path(name), _columns(component), setting)


def build_dataset(component: Component, tokenizer: Any, setting: str) -> Any:
    """A torchtune dataset.

    Raises:
        UserError: as `check_files`, or arguments the dataset does not take, or no samples.
    """
    import datasets

    datasets.disable_progress_bars()  # theirs say nothing a user waits for
    check_files(component, setting)
    files = component.get("data_files")
    try:
        dataset = instantiate(component, tokenizer, setting=setting)
    except (ValueError, OSError, KeyError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{setting}: {component['_component_']} failed: {str(e).splitlines()[0]}") from e
    if len(dataset) == 0:
        raise UserError(f"{setting}: the dataset is empty ({files or component.get('source')})")
    return dataset


def _columns(component: Component) -> list[str]:
    kind = component["_component_"].rsplit(".", 1)[-1]
    mapped = component.get("column_map") or {}
    if kind == "chat_dataset":
        return [component.get("conversation_column", "messages")]
    if kind in ("preference_dataset", "text_preference_dataset"):
        return [mapped.get(k, k) for k in ("chosen", "rejected")]
    if kind == "instruct_dataset":
        return [mapped.get(k, k) for k in ("input", "output")]
    return [component.get("column", "text")] if kind == "text_completion_dataset" else []


def _check_json(path: Path, columns: list[str], setting: str) -> None:
    with path.open(encoding="utf-8") as f:
        first = f.read(1)
        if not first:
            raise UserError(f"{setting}: {path} is empty")
        if first == "[":  # one JSON array
            rows = _parsed(first + f.read(), f"{setting}: {path}")
            if not rows:
                raise UserError(f"{setting}: the dataset is empty ({path})")
            return
        f.seek(0)
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            row = _parsed(line, f"{setting}: {path} line {number}")
            if not isinstance(row, dict):
                raise UserError(f"{setting}: {path} line {number} is not a JSON object")
            missing = [c for c in columns if c not in row]
            if missing:
                raise UserError(f"{setting}: {path} line {number} has no '{missing[0]}' (it has {', '.join(row)})")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where} is not valid JSON ({e})") from e


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
    """Builder for the config: `source: json`, `data_files: pairs.jsonl`."""
    return TextPreferenceDataset(tokenizer, source, split=split, **kwargs)


class TextWindows:
    """A text file's documents (separated by form feeds) in windows of `tokenizer.max_seq_len` tokens, for evaluation.

    BOS at a document's start, EOS at its end; nothing is left out and nothing is seen twice.
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
    """Builder for the config: `source: heldout.txt`."""
    return TextWindows(tokenizer, source)


def usable_pairs(dataset: Any, setting: str) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Tokenized preference pairs with room for both answers (and their `index` among these), and the others' indices.

    A prompt as long as `tokenizer.max_seq_len` leaves no answer to score: torchtune would train on it silently, with
    a loss of ln 2 and no gradient.

    Raises:
        UserError: no pair is left.
    """
    pairs, skipped = [], []
    for i in progress(range(len(dataset)), "tokenizing pairs", unit="pair"):
        pair = dataset[i]
        if all(any(label != IGNORE for label in pair[f"{side}_labels"][1:]) for side in ("chosen", "rejected")):
            pairs.append(pair | {"index": len(pairs)})
        else:
            skipped.append(i)
    if skipped:
        say(
            f"{setting}: skipping {len(skipped)} of {len(dataset)} pairs whose prompt leaves no room for an answer "
            f"within tokenizer.max_seq_len (samples {', '.join(map(str, skipped[:10]))}{' …' * (len(skipped) > 10)})"
        )
    if not pairs:
        raise UserError(f"{setting}: every pair's prompt fills tokenizer.max_seq_len; raise it or shorten the prompts")
    return pairs, skipped


def _shift(labels: Tensor) -> Tensor:
    """labels[:, i] becomes what position i is to predict; nothing at the last one."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], dim=1)


def collate_sft(samples: list[dict[str, Any]], pad_id: int) -> Batch:
    """tokens, labels (shifted) [b, s]; and for packed samples mask [b, s, s] and input_pos [b, s]."""
    if "seq_lens" in samples[0]:
        batch = padded_collate_packed(samples)
        starts = batch["input_pos"] == 0  # a packed sample's first token is no answer to the one before it
        batch["labels"] = _shift(torch.where(starts, IGNORE, batch["labels"]))
        return batch
    batch = padded_collate_sft([{k: s[k] for k in ("tokens", "labels")} for s in samples], padding_idx=pad_id)
    return {"tokens": batch["tokens"], "labels": _shift(batch["labels"])}  # pyright: ignore[reportReturnType]


def collate_pairs(samples: list[dict[str, Any]], pad_id: int) -> Batch:
    """tokens, labels (shifted) [2b, s], the chosen rows first; reference [2b] if the pairs carry it."""
    tokens, labels = padded_collate_dpo(samples, padding_idx=pad_id)
    batch = {"tokens": tokens, "labels": _shift(labels)}
    if "reference" in samples[0]:
        batch["reference"] = torch.tensor([s["reference"] for s in samples]).T.reshape(-1)
    return batch


class SampleOrder:
    """Position in the run → index in the dataset: a fresh permutation every epoch, from the seed."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def __getitem__(self, position: int) -> int:
        epoch, i = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.num_samples, generator=generator)
        return int(self._permutation[i])


def micro_batch_size(training: TrainingConfig, world_size: int) -> int:
    """Samples of one forward pass: `batch_size`, or less where that would leave a rank without work."""
    return min(training.batch_size, max(1, training.global_batch_size // world_size))


def check_ranks(training: TrainingConfig, stage: str, world_size: int) -> None:
    """Every rank must have something to do.

    Raises:
        UserError: there are more ranks than samples in an optimizer step.
    """
    if world_size > training.global_batch_size:
        raise UserError(
            f"{stage}: {world_size} ranks, but {stage}.global_batch_size={training.global_batch_size}: some would have "
            "nothing to do; raise it, or use fewer ranks"
        )


def num_micro_batches(training: TrainingConfig, world_size: int) -> int:
    """Forward passes of each rank in one optimizer step; the same on every rank, so that they stay in step."""
    return math.ceil(math.ceil(training.global_batch_size / micro_batch_size(training, world_size)) / world_size)


def micro_batches(
    samples: Sequence[Any], order: SampleOrder, start: int, count: int, batch_size: int, rank: int, world_size: int
) -> Iterator[list[Any]]:
    """This rank's share of the global batch [start, start + count): every world_size-th micro-batch of it.

    A micro-batch holds the same samples however many ranks there are, so its losses are the same bits.
    """
    for i in range(start + rank * batch_size, start + count, world_size * batch_size):
        yield [samples[order[p]] for p in range(i, min(i + batch_size, start + count))]
