"""Say what a model folder or a data file is, and what llamaq makes of it.

    tune inspect /models/mine                              the model, its tokenizer, what a run of it takes
    tune inspect train.jsonl checkpoint_dir=/models/mine   rows, tokens, what is skipped, one row token by token

Nothing is started and no weight is read. CONFIG is `llama` unless given; its data section that names the file says how
the rows are read, else their columns do.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamaq.checkpoints.meta import model_params
from llamaq.config import Component, Config, load
from llamaq.config.arguments import split_arguments
from llamaq.data.datasets import report
from llamaq.data.files import blocks_of, rows_of
from llamaq.data.forms import form_of
from llamaq.data.prepare import prepare
from llamaq.data.prepared import Prepared
from llamaq.data.sources import local_files
from llamaq.data.tokenizer import tokenizer_of
from llamaq.errors import UserError
from llamaq.families import Described, complete, describe
from llamaq.model.build import scheme_of
from llamaq.model.shape import shape_of
from llamaq.plan.disk import GIB, disk_bytes
from llamaq.plan.memory import memory_plan, plan_length
from llamaq.plan.preflight import TRAINING_STAGES, check_model, other_data
from llamaq.quant.prepare import prepare as prepare_model

MOST_TOKENS = 256  # of the row that is shown
LAYOUTS = {"hugging_face": "Hugging Face", "meta": "Meta", "torchtune": "torchtune"}
CHAT = {"conversation_column": "messages", "conversation_style": "openai"}
# columns that a data set's first row has → the dataset that reads them
READERS: tuple[tuple[set[str], str, dict[str, str]], ...] = (
    ({"chosen", "rejected"}, "torchtune.datasets.preference_dataset", {}),
    ({"messages"}, "torchtune.datasets.chat_dataset", CHAT),
    ({"conversations"}, "torchtune.datasets.chat_dataset", CHAT),
    ({"instruction", "output"}, "torchtune.datasets.alpaca_dataset", {}),
    ({"prompt"}, "torchtune.datasets.instruct_dataset", {}),
    ({"input", "output"}, "torchtune.datasets.instruct_dataset", {}),
    ({"text"}, "torchtune.datasets.text_completion_dataset", {}),
)
EXAMPLE = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]


def main(argv: list[str]) -> int:
    """Run `tune inspect` and return its exit code."""
    config, overrides, words = split_arguments(argv)
    parser = argparse.ArgumentParser(
        "tune inspect",
        usage="tune inspect WHAT [--config CONFIG] [--row N] [key=value …]",
        description="Say what a model folder or a data file is, and what llamaq makes of it. Nothing is started.",
    )
    parser.add_argument("what", type=Path, metavar="WHAT", help="a checkpoint's folder, or a file of data")
    parser.add_argument("--config", default=config or "llama", help="whose settings to use (%(default)s)")
    parser.add_argument("--row", type=int, default=1, help="of a data file: the sample to show, from 1")
    a = parser.parse_args(words)
    try:
        what = a.what.expanduser()
        folder = what.is_dir()
        lines = of_folder(what, a.config, overrides) if folder else of_file(what, a.config, overrides, a.row)
        for line in lines:
            print(line, flush=True)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


# --- a model ----------------------------------------------------------------------------------------------------------


def of_folder(folder: Path, config: str, overrides: list[str]) -> Iterator[str]:
    """Yield lines on a checkpoint folder and on what a run from it takes.

    Raises:
        UserError: it is no checkpoint that a run can start from.
    """
    found = describe(folder)
    yield f"{folder}"
    yield _line("layout", _layout(found))
    own = {"checkpoint_dir": folder, "data_dir": "data", "output_dir": "runs/inspected"}
    given = {item.partition("=")[0] for item in overrides}
    settings = [f"{k}={v}" for k, v in own.items() if k not in given]
    c = complete(load(config, [*settings, *overrides]))
    yield _line("model", _model(c))
    yield from _tokenizer(c)
    decoder = check_model(c)
    prepare_model(decoder, scheme_of(c))
    model_params(decoder)  # ExecuTorch computes this model
    yield _line("quantized", f"linears int4 in groups of {c.scheme.group_size}, embedding and head int8 rows")
    yield f"What a run of --config {config} takes, at samples of {plan_length(c):,} tokens:"
    yield from map(str, memory_plan(c, plan_length(c)))
    yield _line("disk", f"about {disk_bytes(shape_of(c.model), c) / GIB:6.2f} GiB")


def _line(what: str, text: str) -> str:
    return f"{what:>10}: {text}"


def _layout(found: Described) -> str:
    size = sum(path.stat().st_size for path in found.weights)
    entries = [entry for header in found.headers.values() for entry in (header or {}).values()]
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in Counter(e.dtype for e in entries).most_common())
    files = f"{len(found.weights)} files" if len(found.weights) > 1 else found.weights[0].name
    return f"{LAYOUTS[found.layout]}, {files}, {size / GIB:.2f} GiB" + f" ({kinds} tensors)" * bool(kinds)


def _model(c: Config) -> str:
    shape, arguments = shape_of(c.model), ", ".join(f"{k} {v}" for k, v in c.model.items() if k != "_component_")
    return f"{c.model['_component_']}, {shape.weights / 1e6:,.1f} M parameters\n{'':12}{arguments}"


def _tokenizer(c: Config) -> Iterator[str]:
    tokenizer = tokenizer_of(c)
    stops = ", ".join(f"{_text(i, tokenizer)} ({i})" for i in tokenizer.stop_tokens)
    begins = "nothing" if tokenizer.bos_id is None else f"{_text(tokenizer.bos_id, tokenizer)} ({tokenizer.bos_id})"
    path = Path(c.tokenizer["path"])
    name = path.name if path.parent == Path(c.checkpoint_dir) else path
    yield _line("tokenizer", f"{name}; text begins with {begins}; answers end with {stops}")
    if tokenizer.template is None:
        yield _line("template", "none: chats cannot be trained on")
        return
    tokens, learn = tokenizer.chat(EXAMPLE)
    yield _line(
        "template", f"{tokenizer.template_name}; in this conversation {sum(learn)} of {len(tokens)} are learned"
    )
    yield f"{'':12}{tokenizer.render(EXAMPLE)!r}"


# --- data -------------------------------------------------------------------------------------------------------------


def of_file(path: Path, config: str, overrides: list[str], row: int) -> Iterator[str]:
    """Yield lines on a data file: counts, lengths, and one sample token by token.

    Raises:
        UserError: there is no such file, rows are wrong, or the config does not say which tokenizer reads them.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    c = load(config, overrides)
    if config == "llama" and not any(item.startswith("checkpoint_dir=") for item in overrides):
        raise UserError("whose tokenizer? give checkpoint_dir=FOLDER, or --config with the config of the run")
    c = complete(c)
    tokenizer = tokenizer_of(c)
    setting, component = _section_of(path, c) or _guessed(path)
    form = form_of(component, setting)
    if form is None:
        raise UserError(f"{setting}: {component['_component_']} reads its rows itself, so they cannot be shown")
    prepared = prepare(component, form, tokenizer, setting)
    yield f"{path}, read as {setting} ({component['_component_']})"
    yield from report(prepared, setting)
    yield _lengths(prepared)
    if not 1 <= row <= prepared.meta["samples"]:
        raise UserError(f"--row {row}: the file has {prepared.meta['samples']:,} samples")
    for title, index in _sequences(prepared, row - 1):
        yield ""
        yield f"{title}: position, id, whether it is learned, text"
        yield from _tokens(*prepared.sequence(index), tokenizer)


def _section_of(path: Path, c: Config) -> tuple[str, Component] | None:
    """Return the section of the config that reads a file, and its name."""
    trained = (name for name in TRAINING_STAGES if getattr(c, name))
    datasets = {f"{name}.dataset": getattr(c, name).dataset for name in trained} | other_data(c)
    for setting, component in datasets.items():
        form = form_of(component, setting)
        try:
            files = local_files(component, form, setting) if form else []
        except UserError:  # of another file, which may not be there
            continue
        if path.resolve() in {file.resolve() for file in files}:
            return setting, {**component, "data_files": str(path)} if "data_files" in component else component
    return None


def _guessed(path: Path) -> tuple[str, Component]:
    """Return the dataset that reads rows with the columns of the file's first row."""
    first = next((row for block in blocks_of(path) for _, row in rows_of(block)), None)
    columns = set(first) if isinstance(first, dict) else set()
    for needed, name, arguments in READERS:
        if needed <= columns:
            source = "parquet" if path.suffix == ".parquet" else "json"
            return path.name, {"_component_": name, "source": source, "data_files": str(path), **arguments}
    known = "; ".join(" and ".join(sorted(needed)) for needed, _, _ in READERS)
    raise UserError(f"{path}: its first row has the columns {', '.join(columns) or 'of no object'}; known are {known}")


def _lengths(prepared: Prepared) -> str:
    lengths = np.asarray(prepared.offsets[1:] - prepared.offsets[:-1], dtype=np.float64)
    points = ", ".join(f"{p} % {int(np.percentile(lengths, p)):,}" for p in (50, 90, 99))
    return f"lengths in tokens: {points}, longest {int(lengths.max()):,}"


def _sequences(prepared: Prepared, sample: int) -> list[tuple[str, int]]:
    """Return title and index of what a sample is made of: a pair has two sequences."""
    row = f"row {prepared.rows[sample] + 1}"  # rows that teach nothing are no samples
    if not prepared.meta["pairs"]:
        return [(f"sample {sample + 1} ({row})", sample)]
    return [(f"pair {sample + 1}, {side} ({row})", 2 * sample + i) for i, side in enumerate(("chosen", "rejected"))]


def _tokens(tokens: Any, labels: Any, tokenizer: Any) -> Iterator[str]:
    for i, (token, label) in enumerate(zip(tokens.tolist(), labels.tolist(), strict=True)):
        if i == MOST_TOKENS:
            yield f"… {len(tokens) - i:,} more tokens"
            return
        yield f"{i:6} {token:7} {'learned' if label >= 0 else '       '} {_text(token, tokenizer)}"


def _text(token: int, tokenizer: Any) -> str:
    special = next((name for name, i in tokenizer.special_tokens.items() if i == token), None)
    return special or repr(tokenizer.decode([token]))
