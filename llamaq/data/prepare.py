"""Check and tokenize a dataset once, on all cores, into a folder that later starts, stages and ranks map.

The folder's name is a hash of what decides its content: the rows, what they mean, and the tokenizer. It is written
beside and renamed, so a folder that exists is whole, and two processes that prepare the same do no harm.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llamaq.config.components import Component
from llamaq.data.encode import NO_ROOM, PROBLEMS_SHOWN, Encoded, Encoder
from llamaq.data.forms import Form
from llamaq.data.prepared import META, Prepared, pack
from llamaq.data.sources import Source, source_of
from llamaq.data.workers import in_order, num_cores
from llamaq.errors import UserError
from llamaq.runs.files import naming_full_disk, naming_unusable_folder, sha256_json
from llamaq.runs.tracking import progress

VERSION = 1  # of the content of such folders; raise it when the same rows give other samples
IN_ONE_PROCESS = 4 * 2**20  # bytes of data, or 1/1000 as many rows, up to which starting workers takes longer
PLACES_SHOWN = 5
MIB = 2**20


def prepare(
    component: Component,
    form: Form,
    tokenizer: Any,
    setting: str,
    cache: Path | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> Prepared:
    """Return a dataset's samples, tokenized now unless they are in the cache.

    Args:
        component: the dataset's section.
        form: what its rows mean.
        tokenizer: of the run.
        setting: the section's name, for errors.
        cache: a folder for prepared datasets, e.g. a run's. Without one they last as long as they are used.
        limit: stop after so many samples, or packs of them.
        workers: processes; None: one a core, for data that is worth it.

    Raises:
        UserError: rows that are wrong, or none that teaches something.
    """
    if form.packed and not tokenizer.max_seq_len:
        raise UserError(f"{setting}.packed=true needs tokenizer.max_seq_len, the length of a packed sample; set it")
    source = source_of(component, form, setting)
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="llamaq-") as folder:  # what is mapped stays after the name is gone
            _write(Path(folder), source, form, tokenizer, limit, workers)
            return Prepared(Path(folder))
    decides_ids = f"{tokenizer.fingerprint} {tokenizer.max_seq_len}"
    made_of = [VERSION, asdict(form), decides_ids, source.identity, limit]
    folder = cache / sha256_json(made_of)[:16]
    if not (folder / META).is_file():
        with naming_unusable_folder(str(cache)), naming_full_disk(str(folder)):
            _publish(folder, source, form, tokenizer, limit, workers)
    return Prepared(folder)


def keep_only(cache: Path, folders: set[str]) -> None:
    """Delete what a cache holds besides these folders: of data that changed, and of attempts that were killed."""
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.is_dir() and path.name not in folders and ((path / META).is_file() or path.suffix == ".partial"):
            shutil.rmtree(path, ignore_errors=True)


def _publish(folder: Path, source: Source, form: Form, tokenizer: Any, *how: int | None) -> None:
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, source, form, tokenizer, *how)
        partial.rename(folder)
    except OSError:
        if not (folder / META).is_file():  # unless another process was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, source: Source, form: Form, tokenizer: Any, limit: int | None, workers: int | None) -> None:
    """Read, check and tokenize every row, and write the arrays into the folder."""
    if workers is None:
        small = source.size <= (IN_ONE_PROCESS if source.unit == "bytes" else IN_ONE_PROCESS // 1000)
        workers = 1 if small and limit is None else num_cores()
    with (folder / "values.bin").open("wb") as values:
        found = _Found(form, values, tokenizer.max_seq_len or 0)
        blocks = in_order(Encoder(form, tokenizer).block, source.blocks(), workers)
        with contextlib.closing(blocks) as encoded, _bar(source) as show:
            for done in encoded:
                found.add(done)
                show(found)
                if limit is not None and found.enough(limit):
                    break
    found.check(source)
    found.save(folder)


@contextlib.contextmanager
def _bar(source: Source) -> Iterator[Callable[["_Found"], Any]]:
    """Show a progress bar, unless the data takes no time; yield what moves it on."""
    in_bytes = source.unit == "bytes"
    if in_bytes and source.size <= IN_ONE_PROCESS:
        yield lambda found: None
        return
    total = -(-source.size // MIB) if in_bytes else source.size
    with progress((), f"tokenizing {source.setting}", total or None, unit="MiB" if in_bytes else "row") as bar:
        yield lambda found: bar.update((found.read // MIB if in_bytes else found.num_rows) - bar.n)


class _Found:
    """What was found in a dataset so far."""

    def __init__(self, form: Form, values: Any, length: int):
        self.form, self.values, self.length = form, values, length
        self.lengths: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.skipped: list[np.ndarray] = []
        self.num_rows = self.num_samples = self.tokens = self.learned = self.cut = self.read = self.problems = 0
        self.longest = 0
        self.shown: list[tuple[str, str, str]] = []  # file, place and problem of the first few
        self.reasons: Counter = Counter()
        self.places: dict[str, list[int]] = {}
        self.notes: Counter = Counter()

    def add(self, done: Encoded) -> None:
        """Take in a block's samples and counts."""
        self.problems += done.problems
        self.shown += [(done.file, place, said) for place, said in done.shown]
        for reason, rows in done.skipped.items():
            self.reasons[reason] += len(rows)
            self.places.setdefault(reason, []).extend(self.num_rows + r + 1 for r in rows[:PLACES_SHOWN])
        skipped = sorted(r for rows in done.skipped.values() for r in rows)
        self.skipped.append(np.array(skipped, dtype=np.int64) + self.num_rows)
        self.notes += done.notes
        self.cut, self.read = self.cut + done.cut, self.read + done.read
        sequences = [marked for sample in done.samples for marked in sample]
        if sequences and not self.problems:
            joined = np.concatenate(sequences)
            joined.tofile(self.values)
            self.lengths.append(np.array([len(s) for s in sequences], dtype=np.int64))
            self.rows.append(np.array(done.row_of, dtype=np.int64) + self.num_rows)
            self.tokens, self.learned = self.tokens + len(joined), self.learned + int((joined >= 0).sum())
            self.longest = max(self.longest, int(self.lengths[-1].max()))
        self.num_rows += done.rows
        self.num_samples += len(done.samples)

    def enough(self, limit: int) -> bool:
        """Tell whether there are so many samples; a packed one holds no more than its length."""
        return self.tokens >= limit * self.length if self.form.packed else self.num_samples >= limit

    def check(self, source: Source) -> None:
        """Check that no row was wrong, and that some teach something."""
        if self.problems:
            raise UserError(f"{source.setting}: {said_of(self.shown[:PROBLEMS_SHOWN], self.problems)}")
        if not self.num_rows:
            raise UserError(f"{source.setting}: the dataset is empty ({source.name})")
        if not self.num_samples:
            reasons = "; ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            hint = "; raise tokenizer.max_seq_len or shorten the prompts" if NO_ROOM in self.reasons else ""
            none = f"none of {self.num_rows} rows in {source.name} teaches anything"
            raise UserError(f"{source.setting}: {none}: {reasons}{hint}")

    def save(self, folder: Path) -> None:
        """Write all but the tokens, which are written already, and last the counts."""
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self.lengths))])
        np.save(folder / "offsets.npy", offsets)
        np.save(folder / "rows.npy", np.concatenate(self.rows))
        np.save(folder / "skipped.npy", np.concatenate(self.skipped))
        if self.form.packed:
            np.save(folder / "packs.npy", pack(offsets, self.length, self.form.split_across_pack))
        meta = {
            "pairs": self.form.is_pairs,
            "max_seq_len": self.length,
            "rows": self.num_rows,
            "samples": self.num_samples,
            "tokens": self.tokens,
            "learned": self.learned,
            "longest": self.longest,
            "cut": self.cut,
            "skipped": dict(self.reasons),
            "places": {reason: rows[:PLACES_SHOWN] for reason, rows in self.places.items()},
            "notes": dict(self.notes),
        }
        (folder / META).write_text(json.dumps(meta, indent=1))


def said_of(problems: list[tuple[str, str, str]], count: int) -> str:
    """Return a line about bad rows: the first one in full, and where more are.

    Args:
        problems: file, place and problem of the first few.
        count: how many there are.
    """
    (file, place, said), *others = problems
    line = f"{file} {place}{said}"
    if not others:
        return line
    shown = [
        (where if f == file else f"{f} {where}") + (", the same" if what == said else what) for f, where, what in others
    ]
    return f"{line} ({count - 1:,} more bad rows: {'; '.join(shown)}{' …' * (count > len(problems))})"
