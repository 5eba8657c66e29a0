"""Where a dataset's rows come from: files that llamaq reads itself, or anything that the `datasets` library reads."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaq.config.components import Component, current_name
from llamaq.data.files import BLOCK_ROWS, Block, blocks_of, find_files
from llamaq.data.forms import BUILDERS, DEFAULT_SOURCES, Form
from llamaq.data.text import read_documents
from llamaq.errors import UserError
from llamaq.runs.manifest import content_hash

# of files that llamaq reads itself, and what is only about how the `datasets` library works
OWN_ARGUMENTS = ("data_files", "split", "field", "streaming")
_OF_THE_LIBRARY = ("num_proc", "cache_dir", "keep_in_memory", "download_mode", "verification_mode")
OWN_SOURCES = ("json", "parquet")


@dataclass
class Source:
    """A dataset's rows, and what they are recognized by."""

    setting: str  # the dataset's section
    name: str
    identity: Any  # changes with the content
    size: int  # bytes, or rows of a dataset of the Hub; 0 if it is not known
    unit: str  # "bytes" or "rows"
    files: list[Path]
    field: str | None = None
    table: Any = None  # of the `datasets` library
    document: str | None = None  # a text file of which a row is a document

    def blocks(self) -> Iterator[Block]:
        """Yield the rows in blocks.

        Raises:
            UserError: they cannot be read.
        """
        try:
            if self.document is not None:
                yield from _documents(self.document, "source")
            elif self.table is not None:
                yield from _table(self.table, self.name)
            else:
                for path in self.files:
                    yield from blocks_of(path, self.field)
        except UserError as e:
            raise UserError(f"{self.setting}: {e}") from e


def source_of(component: Component, form: Form, setting: str) -> Source:
    """Find a dataset's rows.

    Raises:
        UserError: there are none of this name, or an argument is unknown.
    """
    files, source = local_files(component, form, setting), str(_source(component))
    if form.kind == "windows":
        file = files[0]
        return Source(setting, str(file), _hash_of(file, setting), file.stat().st_size, "bytes", [], document=source)
    return _own(files, component, setting) if files else _of_datasets(source, _arguments(component), setting)


def local_files(component: Component, form: Form, setting: str) -> list[Path]:
    """Return the files that llamaq reads itself, none where the `datasets` library reads.

    Raises:
        UserError: one that is named is not there, or none is named where one has to be.
    """
    source, arguments = _source(component), _arguments(component)
    if not isinstance(source, str):
        raise UserError(f"{setting}.source={source}: say what to read: json, a file, a folder, or a dataset of the Hub")
    if form.kind == "windows":
        if not Path(source).is_file():
            raise UserError(f"{setting}.source={source}: no such file")
        return [Path(source)]
    named, split = arguments.get("data_files"), str(arguments.get("split") or "train")
    if Path(source).is_file() and named is None:
        return [Path(source)]
    if isinstance(named, dict):
        if split not in named:
            raise UserError(f"{setting}.data_files has no '{split}' (it has {', '.join(map(str, named))}); set split")
        named, split = named[split], "train"
    if not named and source == "json" and "data_dir" not in arguments:
        raise UserError(f"{setting}.data_files: name the files to read")
    if not named or any("://" in str(n) for n in ([named] if isinstance(named, str) else named)):
        return []
    files = find_files(named, setting)
    return files if source in OWN_SOURCES and split == "train" else []


def _source(component: Component) -> Any:
    return component.get("source") or DEFAULT_SOURCES.get(current_name(component["_component_"]))


def _arguments(component: Component) -> dict[str, Any]:
    """Return the arguments that say where the rows are, which torchtune hands to `datasets.load_dataset`."""
    of_form = BUILDERS[current_name(component["_component_"])][1]
    return {k: v for k, v in component.items() if k not in ("_component_", "source", *of_form)}


def _own(files: list[Path], component: Component, setting: str) -> Source:
    arguments = _arguments(component)
    for key in arguments:
        if key not in (*OWN_ARGUMENTS, *_OF_THE_LIBRARY):
            near = difflib.get_close_matches(key, ("conversation_column", "column_map", "packed", *OWN_ARGUMENTS), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(OWN_ARGUMENTS[:3])}"
            raise UserError(f"{setting}.{key}: no argument of a dataset of local files has this name{hint}")
    field, size = arguments.get("field"), sum(file.stat().st_size for file in files)
    identity = [*([field] if field else []), *(_hash_of(file, setting) for file in files)]
    return Source(setting, ", ".join(map(str, files[:3])), identity, size, "bytes", files, field)


def _hash_of(file: Path, setting: str) -> str:
    try:
        return content_hash(file)
    except OSError as e:
        raise UserError(f"{setting}: {file} cannot be read ({e.strerror})") from e


def _of_datasets(source: str, arguments: dict[str, Any], setting: str) -> Source:
    """Load with the `datasets` library: a dataset of the Hub, a local folder of one, or a format of its own."""
    import datasets

    datasets.disable_progress_bars()  # theirs say nothing a user waits for
    arguments = {"split": "train"} | {k: v for k, v in arguments.items() if v is not None}
    try:
        if any((Path(source) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            found: Any = datasets.load_from_disk(source)
            table = found[arguments["split"]] if isinstance(found, dict) else found
        else:
            table = datasets.load_dataset(source, **arguments)
    except Exception as e:  # of many kinds, from fsspec's to Arrow's
        said = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{setting}: the datasets library cannot load '{source}': {said}") from e
    if isinstance(table, datasets.IterableDataset):
        return Source(setting, source, [source, arguments], 0, "rows", [], table=table)
    return Source(setting, source, [source, table._fingerprint], len(table), "rows", [], table=table)


def _table(table: Any, name: str) -> Iterator[Block]:
    """Yield the rows of a dataset of the `datasets` library; what a row lacks is None there."""
    first = 1
    for columns in table.iter(batch_size=BLOCK_ROWS):
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        placed = [(f"row {first + i}", {k: v for k, v in row.items() if v is not None}) for i, row in enumerate(rows)]
        yield Block(name, "rows", placed, read=len(rows))
        first += len(rows)


def _documents(path: str, setting: str) -> Iterator[Block]:
    for i, document in enumerate(read_documents(path, setting)):
        yield Block(path, "rows", [(f"document {i + 1}", {"text": document})], read=len(document))
