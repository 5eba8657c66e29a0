"""A tokenized dataset on disk, mapped into memory: samples, packed samples and pairs are slices of it.

values.bin     int32 [tokens]       ids of all sequences, one after another; ~id where nothing is learned
offsets.npy    int64 [n + 1]        where each sequence begins; a pair is two of them, chosen and rejected
rows.npy       int64 [samples]      the row of the dataset that each sample was made of
skipped.npy    int64 [skipped]      the rows that teach nothing
packs.npy      int64 [packs + 1]    where each packed sample begins, if the dataset is packed
meta.json                           counts, and what the user is told
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamaq.data.batches import IGNORE

META = "meta.json"
PATIENCE_SECONDS = 60.0
Sample = dict[str, Any]


class Prepared:
    """The arrays of a prepared dataset."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text())
        self.values = np.memmap(folder / "values.bin", dtype=np.int32, mode="r")
        self.offsets = np.load(folder / "offsets.npy")
        self.rows = np.load(folder / "rows.npy")
        self.skipped = np.load(folder / "skipped.npy")
        packs = folder / "packs.npy"
        self.packs = np.load(packs) if packs.is_file() else None

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a sequence's tokens and labels, int64."""
        return tokens_and_labels(self.values[self.offsets[index] : self.offsets[index + 1]])

    def samples(self) -> "Samples | Packs | Pairs":
        """Return the dataset's samples, as training takes them."""
        if self.meta["pairs"]:
            return Pairs(self)
        return Samples(self) if self.packs is None else Packs(self, self.packs)


def open_prepared(folder: Path) -> Prepared:
    """Open a folder that another rank has just written: a network file system may show it some seconds later."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (folder / META).is_file() and time.monotonic() < deadline:
        time.sleep(0.5)
    return Prepared(folder)


def tokens_and_labels(marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and labels of ids of which those that are not learned are complemented."""
    marked = marked.astype(np.int64)
    tokens = np.where(marked < 0, ~marked, marked)
    return tokens, np.where(marked < 0, IGNORE, marked)


class Samples(Sequence):
    """Samples of one sequence each: `tokens` and `labels`."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared

    def __len__(self) -> int:
        return len(self.prepared.rows)

    def __getitem__(self, index: int) -> Sample:
        tokens, labels = self.prepared.sequence(_within(index, len(self)))
        return {"tokens": tokens, "labels": labels}


class Packs(Sequence):
    """Samples of the same length that hold several sequences each, as torchtune's `PackedDataset` makes them."""

    def __init__(self, prepared: Prepared, begins: np.ndarray):
        self.prepared, self.begins, self.length = prepared, begins, prepared.meta["max_seq_len"]

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, index: int) -> Sample:
        p, index = self.prepared, _within(index, len(self))
        begin, end = self.begins[index], self.begins[index + 1]
        first, last = np.searchsorted(p.offsets, [begin, end - 1], side="right") - 1  # the sequences it has parts of
        starts = p.offsets[first : last + 1]
        ends = np.append(starts, p.offsets[last + 1]).clip(begin, end)
        lengths = ends[1:] - ends[:-1]
        position = (np.arange(begin, end) - np.repeat(starts, lengths)) % self.length
        tokens, labels = tokens_and_labels(p.values[begin:end])
        room = self.length - len(tokens)
        rest = np.clip(position[-1] + 1 + np.arange(room), 0, self.length - 1)
        packed = {
            "tokens": np.pad(tokens, (0, room)),
            "labels": np.pad(labels, (0, room), constant_values=IGNORE),
            "input_pos": np.append(position, rest),
            "seq_lens": np.append(lengths, room) if room else lengths,
        }
        return {k: torch.from_numpy(v) for k, v in packed.items()}


class Pairs(Samples):
    """Preference pairs, with torchtune's keys, each with its `index`."""

    def __getitem__(self, index: int) -> Sample:
        index, pair = _within(index, len(self)), {}
        for i, side in enumerate(("chosen", "rejected")):
            pair[f"{side}_input_ids"], pair[f"{side}_labels"] = self.prepared.sequence(2 * index + i)
        return pair | {"index": index}


class _WithReference(Sequence):
    """Pairs with the reference's log-probabilities of their answers."""

    def __init__(self, pairs: Sequence[Sample], logprobs: torch.Tensor):
        self.pairs, self.logprobs = pairs, logprobs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        return self.pairs[index] | {"reference": self.logprobs[index].tolist()}


def with_reference(pairs: Sequence[Sample], logprobs: torch.Tensor) -> Sequence[Sample]:
    """Return pairs with the reference's log-probabilities [pairs, 2], as `reference` of each."""
    assert len(logprobs) == len(pairs), "the reference was computed on other pairs"
    return _WithReference(pairs, logprobs)


def _within(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(index)
    return int(index) % length


def pack(offsets: np.ndarray, length: int, split: bool) -> np.ndarray:
    """Return where packed samples of at most so many tokens begin, and where the last one ends.

    Each takes sequences, in order, as long as they fit. With `split`, a sequence goes on in the next one.
    """
    total = int(offsets[-1])
    if split:
        return np.append(np.arange(0, total, length), total)
    begins = [0]
    while begins[-1] < total:
        fitting = np.searchsorted(offsets, begins[-1] + length, side="right") - 1
        begins.append(int(offsets[fitting]))
    return np.array(begins)
