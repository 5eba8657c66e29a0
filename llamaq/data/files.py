"""The rows of data files as they are written: JSON lines, JSON arrays, Parquet, and these compressed with gzip.

No type is guessed: a date stays the text it is, and what a row holds changes nothing about another row. A file is read
in blocks, which other processes can parse, so memory does not grow with the file. What a file is follows from its first
bytes, not from its name.
"""

import codecs
import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llamaq.errors import UserError
from llamaq.runs.files import DATA_ENDINGS, data_files_named

BLOCK_BYTES = 2**20  # of a block of lines: some 1,000 conversations
BLOCK_ROWS = 512  # of a block that is parsed already
COMPRESSED = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
SAVE_AS_UTF8 = "save it as UTF-8"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = b" \t\r\n"
_FAR = 2**16  # characters between an error and the end of what was read: what follows would not mend it


class Problem(Exception):  # noqa: N818 (it is about a row of the user's, and is counted rather than raised to them)
    """What is wrong with a row, as the rest of a sentence that begins with the row's place."""


class _TwiceError(ValueError):
    pass


@dataclass(frozen=True)
class Block:
    """A piece of a file, as it was read (`lines`, an Arrow `batch`) or parsed already (`rows`: place and value)."""

    file: str
    kind: str
    payload: Any
    first: int = 1  # number of its first line or row
    read: int = 0  # bytes of the file that it stands for


def find_files(named: Any, setting: str) -> list[Path]:
    """Return the files that `data_files` names: files, folders of them, and patterns such as `data/*.jsonl`.

    Raises:
        UserError: one of them leads to no file.
    """
    found: list[Path] = []
    for name in [named] if isinstance(named, (str, Path)) else list(named or []):
        files = data_files_named(name)
        if not files:
            is_folder = Path(name).expanduser().is_dir()
            why = f"no file in this folder ends with {', '.join(DATA_ENDINGS)}" if is_folder else "no such file"
            raise UserError(f"{setting}.data_files={name}: {why}")
        found += files
    return found


def blocks_of(path: Path, field: str | None = None) -> Iterator[Block]:
    """Read a file block by block.

    Args:
        path: the file.
        field: of a file that is one JSON object, the key of the list of rows in it.

    Raises:
        UserError: the file is empty, cannot be read, or is something else; the message begins with the file's name.
    """
    try:
        with path.open("rb") as raw:
            yield from _blocks(path, raw, field)
    except (OSError, EOFError) as e:  # gzip raises both for a torn file
        said = getattr(e, "strerror", None) or e
        raise UserError(f"{path} cannot be read ({said})") from e


def _blocks(path: Path, raw: IO[bytes], field: str | None) -> Iterator[Block]:
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(b"PAR1"):
        yield from _parquet(path)
        return
    for start, name in COMPRESSED.items():
        if magic.startswith(start):
            raise UserError(f"{path} is compressed with {name}, which is not read; unpack it, or use gzip")
    stream: Any = gzip.GzipFile(fileobj=raw) if magic.startswith(b"\x1f\x8b") else raw
    head = b""
    while not head.strip(_SPACE + codecs.BOM_UTF8):
        chunk = stream.read(BLOCK_BYTES)
        if not chunk:
            raise UserError(f"{path} is empty")
        head += chunk
    if head.startswith(UTF16) or b"\0" in head[:8]:
        raise UserError(f"{path} is UTF-16, as Windows PowerShell's > writes it; {SAVE_AS_UTF8}")
    head = head.removeprefix(codecs.BOM_UTF8)
    text = head.lstrip(_SPACE)
    if field is not None:
        yield from _rows_in_field(path, head + stream.read(), field)
    elif text.startswith(b"["):
        yield from _values(path, raw, stream, head, array=True)
    elif text.split(b"\n", 1)[0].strip() == b"{":  # objects over several lines
        yield from _values(path, raw, stream, head, array=False)
    else:
        yield from _lines(path, raw, stream, head)


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _lines(path: Path, raw: IO[bytes], stream: IO[bytes], head: bytes) -> Iterator[Block]:
    r"""Yield blocks of whole lines, which end with \n, \r\n or \r."""
    first, rest, position = 1, head, 0
    while True:
        chunk = stream.read(BLOCK_BYTES)
        if chunk and len(rest) < BLOCK_BYTES:
            rest += chunk
            chunk = stream.read(BLOCK_BYTES)
        # a \r at the very end may be the first half of \r\n
        end = max(rest.rfind(b"\n"), rest.rfind(b"\r", 0, -1)) + 1 if chunk else len(rest)
        if end:
            lines, rest = rest[:end], rest[end:]
            position, before = raw.tell(), position
            yield Block(str(path), "lines", lines, first, position - before)
            first += lines.count(b"\n") + lines.count(b"\r") - lines.count(b"\r\n")
        if not chunk:
            return
        rest += chunk


def rows_of(block: Block) -> Iterator[tuple[str, Any]]:
    """Parse a block: yield each row's place, such as "line 12", and the row, or the `Problem` with it."""
    if block.kind == "rows":
        yield from block.payload
    elif block.kind == "batch":
        for i, row in enumerate(block.payload.to_pylist()):
            yield f"row {block.first + i}", row
    else:
        for i, line in enumerate(block.payload.splitlines()):  # of bytes: at \n, \r\n and \r, not at U+2028
            if line.strip():
                yield f"line {block.first + i}", _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        text = line.decode()
        value = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as e:
        return Problem(
            f" is not UTF-8 (byte 0x{line[e.start]:02x} in column {e.start + 1}; Latin-1 or Windows-1252?); "
            f"{SAVE_AS_UTF8}"
        )
    except (ValueError, RecursionError) as e:
        comma = line.rstrip().endswith(b",") and isinstance(e, ValueError) and "Extra data" in str(e)
        return Problem(" ends with a comma; write rows without one between them" if comma else _why_not_json(e))
    if not isinstance(value, dict):
        return Problem(f" is not a JSON object but {kind_of(value)}; write a row as {{…}}")
    return _with_whole_characters(value, text)


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(items)
    if len(made) != len(items):
        names = [name for name, _ in items]
        raise _TwiceError(next(n for n in names if names.count(n) > 1))
    return made


def _why_not_json(e: Exception) -> str:
    if isinstance(e, _TwiceError):
        return f" has the key '{e}' twice in one object; keep one"
    if isinstance(e, RecursionError):
        return " is nested too deeply"
    return f" is not valid JSON ({e})"


def _with_whole_characters(value: Any, text: str) -> Any:
    """Return the value, or a `Problem` if some text in it has half a character, which only an escape can write."""
    if _ESCAPED_SURROGATE.search(text) and (half := _find_half(value)):
        return Problem(f" holds \\u{ord(half):04x}, half of a character; write the whole pair or leave it out")
    return value


def _find_half(value: Any) -> str | None:
    if isinstance(value, str):
        found = _SURROGATE.search(value)
        return found.group() if found else None
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((half for v in inside if (half := _find_half(v))), None)


def kind_of(value: Any) -> str:
    """Say what a value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    names = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__} ({value})")


# --- JSON arrays, and objects over several lines ---------------------------------------------------------------------


class _Reader:
    """Text of a file that grows as it is parsed, and is dropped behind what was parsed."""

    def __init__(self, path: Path, stream: IO[bytes], head: bytes):
        self.path, self.stream, self.line, self.over = path, stream, 1, False
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = self._decoded(head)

    def _decoded(self, chunk: bytes) -> str:
        try:
            return self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as e:
            raise UserError(f"{self.path} is not UTF-8 ({e.reason}; Latin-1 or Windows-1252?); {SAVE_AS_UTF8}") from e

    def grow(self) -> bool:
        """Read as much again; return whether there was more."""
        chunk = self.stream.read(max(BLOCK_BYTES, len(self.text)))
        self.text += self._decoded(chunk)
        self.over = not chunk
        return not self.over

    def drop(self, end: int) -> None:
        self.line += self.text.count("\n", 0, end)
        self.text = self.text[end:]

    def next_character(self) -> str:
        """Return the next character that is no space, without taking it; "" at the end."""
        while True:
            rest = self.text.lstrip()
            if rest or not (self.over or self.grow()):
                break
            if self.over and not self.text.strip():
                return ""
        self.drop(len(self.text) - len(self.text.lstrip()))
        return self.text[:1]

    def value(self, decoder: json.JSONDecoder) -> tuple[Any, str]:
        """Take the next value; return it and its text."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text)
                if end < len(self.text) or self.over or not self.grow():
                    text = self.text[:end]
                    self.drop(end)
                    return value, text
            except _TwiceError as e:
                raise UserError(f"{self.path}: the value that begins in line {self.line}{_why_not_json(e)}") from e
            except json.JSONDecodeError as e:
                unfinished = e.msg.startswith("Unterminated") or e.pos > len(self.text) - _FAR
                if self.over or not unfinished or not self.grow():
                    line = self.line + self.text.count("\n", 0, e.pos)
                    raise UserError(f"{self.path} line {line} is not valid JSON ({e.msg})") from e
            except (ValueError, RecursionError) as e:
                raise UserError(f"{self.path} line {self.line}{_why_not_json(e)}") from e


def _values(path: Path, raw: IO[bytes], stream: IO[bytes], head: bytes, array: bool) -> Iterator[Block]:
    """Yield the elements of an array, or objects that follow each other, in blocks of parsed rows."""
    reader, decoder = _Reader(path, stream, head), json.JSONDecoder(object_pairs_hook=_object)
    reader.next_character()
    rows: list[tuple[str, Any]] = []
    position = count = 0
    if array:
        reader.drop(1)
    while (begin := reader.next_character()) and not (array and begin == "]"):
        count += 1
        place = f"item {count}" + (f" (line {reader.line})" if reader.line > 1 else "")
        value, text = reader.value(decoder)
        is_row = isinstance(value, dict)
        row = _with_whole_characters(value, text) if is_row else Problem(f" is not an object but {kind_of(value)}")
        rows.append((place, row))
        if len(rows) == BLOCK_ROWS:
            position, before = raw.tell(), position
            yield Block(str(path), "rows", rows, read=position - before)
            rows = []
        if array and reader.next_character() not in (",", "]"):
            raise UserError(f"{path} line {reader.line} is not valid JSON (no comma or ] behind item {count})")
        if array and reader.text[:1] == ",":
            reader.drop(1)
    if array:
        if not begin:
            raise UserError(f"{path} is not valid JSON (its array does not end; is the file whole?)")
        reader.drop(1)
        if reader.next_character():
            raise UserError(f"{path} line {reader.line} is not valid JSON (text behind the array)")
    yield Block(str(path), "rows", rows, read=raw.tell() - position)


def _rows_in_field(path: Path, whole: bytes, field: str) -> Iterator[Block]:
    found = _parsed(whole)
    if isinstance(found, Problem):
        raise UserError(f"{path}{found}")
    rows = found.get(field)
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list of rows in '{field}' (it has {', '.join(found)})")
    placed = [(f"item {i + 1}", r if isinstance(r, dict) else Problem(" is not an object")) for i, r in enumerate(rows)]
    yield Block(str(path), "rows", placed, read=len(whole))


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    with _naming_arrow_errors(path):
        file, row = pyarrow.parquet.ParquetFile(path), 1
        batches = iter(file.iter_batches(batch_size=BLOCK_ROWS))
        share = path.stat().st_size / max(1, file.metadata.num_rows)
        while True:
            batch = next(batches, None)
            if batch is None:
                return
            yield Block(str(path), "batch", batch, row, int(share * batch.num_rows))
            row += batch.num_rows


@contextlib.contextmanager
def _naming_arrow_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as e:
        raise UserError(f"{path} is not a whole Parquet file ({str(e).splitlines()[0]})") from e
