"""Rows are what the files say, whatever form, size, compression or line ends; what is no row is named by place."""

import gzip
import json

import pytest

from llamaq.data import files
from llamaq.data.files import Problem, blocks_of, find_files, rows_of
from llamaq.errors import UserError

ROWS = [{"n": i, "text": f"row {i} with é, \u2028, \x1f and 日"} for i in range(300)]
LINES = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(ROWS)]
JSONL = "\n".join(LINES) + "\n"


def read(path, field=None):
    return [(place, row) for block in blocks_of(path, field) for place, row in rows_of(block)]


FORMS = {
    "lines": JSONL.encode(),
    "no newline at the end": JSONL.rstrip().encode(),
    "CRLF": JSONL.replace("\n", "\r\n").encode(),
    "CR": JSONL.replace("\n", "\r").encode(),
    "a byte order mark": JSONL.encode("utf-8-sig"),
    "blank lines": ("\n \n" + JSONL.replace("\n", "\n\n")).encode(),
    "an array": json.dumps(ROWS).encode(),
    "a pretty array": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "an array behind blank lines": ("\ufeff\n\n" + json.dumps(ROWS)).encode(),
    "objects over several lines": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "gzip": gzip.compress(JSONL.encode()),
    "a gzipped array": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("size", [7, 100, 2**20])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_gives_the_same_rows_in_any_form_and_in_blocks_of_any_size(form, size, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", size)
    (tmp_path / "data").write_bytes(FORMS[form])
    assert [row for _, row in read(tmp_path / "data")] == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet", row_group_size=70)
    found = read(tmp_path / "x.parquet")
    assert [row for _, row in found] == ROWS and found[-1][0] == "row 300"
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:900])
    with pytest.raises(UserError, match=r"torn.parquet is not a whole Parquet file"):
        read(tmp_path / "torn.parquet")


@pytest.mark.parametrize("size", [9, 2**20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_places_are_the_lines_of_an_editor(end, size, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", size)
    (tmp_path / "x").write_bytes(f'{{"a": 1}}{end}{end}{{"a": 2}}{end}  {end}{{"a": 3}}{end}'.encode())
    assert read(tmp_path / "x") == [("line 1", {"a": 1}), ("line 3", {"a": 2}), ("line 5", {"a": 3})]


def test_dates_numbers_and_mixed_types_stay_what_they_are(tmp_path):
    rows = [{"a": "2026-01-01"}, {"a": 3}, {"a": [{"b": None}]}, {"a": "007", "new": {}}, {"a": float("inf")}]
    (tmp_path / "x").write_text("\n".join(map(json.dumps, rows)))
    assert [row for _, row in read(tmp_path / "x")] == rows


BAD_LINES = {
    b'{"a": ': "is not valid JSON (Expecting value",
    b'{"a": "\xe9"}': "is not UTF-8 (byte 0xe9 in column 8; Latin-1 or Windows-1252?); save it as UTF-8",
    b'{"a": 1, "a": 2}': "has the key 'a' twice in one object",
    b'{"m": [{"role": "user", "role": "system"}]}': "has the key 'role' twice",
    b'{"a": "x \\ud83d y"}': r"holds \ud83d, half of a character",
    b'{"a": {"\\udc00": 1}}': r"holds \udc00, half of a character",
    b'["a"]': "is not a JSON object but a list",
    b"12": "is not a JSON object but a number (12)",
    b'{"a": 1},': "ends with a comma",
    b"[" * 100_000: "is nested too deeply",
    b'{"a": "\t"}': "is not valid JSON (Invalid control character",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_a_problem_and_its_neighbours_are_rows(line, tmp_path):
    (tmp_path / "x").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": "\\ud83d\\ude00"}\n')
    first, (place, problem), last = read(tmp_path / "x")
    assert first[1] == {"a": 1} and last[1] == {"a": "😀"}
    assert place == "line 2" and isinstance(problem, Problem) and BAD_LINES[line] in str(problem)


BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\r\n\t", "is empty"),
    "utf-16": ('{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
    "utf-16 without a mark": ('{"a": 1}\n'.encode("utf-16-le"), "is UTF-16"),
    "zstd": (b"\x28\xb5\x2f\xfd1234", "is compressed with zstd"),
    "zip": (b"PK\x03\x04rest", "is compressed with zip"),
    "torn gzip": (gzip.compress(JSONL.encode())[:200], "cannot be read"),
    "torn array": (b'[{"a": 1}, {"a": 2}', "(no comma or ] behind item 2)"),
    "torn value": (b'[{"a": 1}, {"a": ', "line 1 is not valid JSON"),
    "array without comma": (b'[{"a": 1}\n{"a": 2}]', "line 2 is not valid JSON (no comma or ] behind item 1)"),
    "text behind an array": (b'[{"a": 1}]\n[{"a": 2}]', "line 2 is not valid JSON (text behind the array)"),
    "a key twice in an array": (b'[\n{"a": 1, "a": 2}]', "line 2 has the key 'a' twice"),
    "Latin-1 array": (b'[{"a": "\xe9"}]', "is not UTF-8"),
}


@pytest.mark.parametrize("size", [5, 2**20])
@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_is_none_is_named(content, message, size, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", size)
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError) as e:
        read(tmp_path / "x.json")
    assert message in str(e.value) and "x.json" in str(e.value) and "\n" not in str(e.value)


def test_items_of_an_array_that_are_no_rows_are_problems(tmp_path):
    (tmp_path / "x").write_text('[{"a": 1},\n"text",\nnull]')
    assert [(p, str(r)) for p, r in read(tmp_path / "x")][1:] == [
        ("item 2 (line 2)", " is not an object but text"),
        ("item 3 (line 3)", " is not an object but null"),
    ]


def test_rows_inside_one_object(tmp_path):
    (tmp_path / "x").write_text('{"version": 1, "data": [{"a": 1}, {"a": 2}]}')
    assert [row for _, row in read(tmp_path / "x", "data")] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match=r"has no list of rows in 'rows' \(it has version, data\)"):
        read(tmp_path / "x", "rows")


def test_files_are_named_by_themselves_by_folder_and_by_pattern(tmp_path):
    for name in ("b.jsonl", "a.json.gz", "[c].parquet", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "d.jsonl").write_text("")

    def names(named):
        return [p.name for p in find_files(named, "x")]

    assert names(str(tmp_path)) == ["[c].parquet", "a.json.gz", "b.jsonl"]
    assert names(f"{tmp_path}/*.jsonl") == ["b.jsonl"] and names(f"{tmp_path}/**/*.jsonl") == ["b.jsonl", "d.jsonl"]
    assert names([f"{tmp_path}/[c].parquet", f"{tmp_path}/in"]) == ["[c].parquet", "d.jsonl"]
    with pytest.raises(UserError, match=r"x.data_files=.*/\*.csv: no such file"):
        find_files(f"{tmp_path}/*.csv", "x")
    (tmp_path / "in" / "d.jsonl").unlink()
    with pytest.raises(UserError, match="no file in this folder ends with"):
        find_files(str(tmp_path / "in"), "x")
