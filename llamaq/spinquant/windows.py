"""The text of a SpinQuant run: windows of tokens to calibrate on, and others to judge the candidates on.

Each part of `spinquant.calibration` is shuffled, its samples are strung together and cut into windows of
`tokenizer.max_seq_len` tokens. The first `num_samples` windows calibrate. The windows after them are for selection, in
equal parts from all datasets: with two datasets of 128 and 64 samples and `num_selection` 32, windows 0–127 of the
first and 0–63 of the second calibrate, and the 16 windows after them of each select.
"""

from typing import Any

import torch
from torch import Tensor

from llamaq.config import Config
from llamaq.data.datasets import build_dataset, cache_of
from llamaq.data.tokenizer import tokenizer_of
from llamaq.errors import UserError

# what `windows` reads of the config
TEXT = ("model", "tokenizer", "seed", "spinquant.calibration", "spinquant.num_selection")


def windows(c: Config) -> tuple[Tensor, Tensor]:
    """Return calibration [n, length] and selection [m, length] tokens; the same for the same seed.

    Raises:
        UserError: a dataset has less text than it is to give, or the length of a window is not set.
    """
    s, tokenizer = c.section("spinquant"), tokenizer_of(c)
    length = tokenizer.max_seq_len
    if not length:
        raise UserError("tokenizer.max_seq_len is not set: calibration needs the length of its windows")
    extra = -(-s.num_selection // len(s.calibration))  # of each part, rounded up
    calibration, selection = [], []
    for i, part in enumerate(s.calibration):
        wanted = part.num_samples + extra
        dataset = build_dataset(part.dataset, tokenizer, f"spinquant.calibration[{i}].dataset", cache_of(c))
        stream = _stream(dataset, c.seed + i, wanted * length)
        have = len(stream) // length
        if have < wanted:
            raise UserError(
                f"spinquant.calibration[{i}].dataset has text for {have} windows of {length} tokens, and "
                f"{part.num_samples} to calibrate and {extra} to select are asked for: lower num_samples, "
                "spinquant.num_selection or tokenizer.max_seq_len, or give it more text"
            )
        cut = torch.tensor(stream[: wanted * length]).view(wanted, length)
        calibration.append(cut[: part.num_samples])
        selection.append(cut[part.num_samples :])
    return torch.cat(calibration), torch.cat(selection)[: s.num_selection]


def _stream(dataset: Any, seed: int, wanted: int) -> list[int]:
    """Return the tokens of shuffled samples, one after another, until there are `wanted` or no more.

    Short samples share a window; each begins with its own beginning of text.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    stream: list[int] = []
    for index in order:
        stream += map(int, dataset[index]["tokens"])
        if len(stream) >= wanted:
            break
    return stream
