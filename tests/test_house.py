"""The house rules that a linter does not know: short functions and files, docstrings that say what a thing is for."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [p for top in ("llamaq", "recipes", "cluster") for p in sorted((ROOT / top).rglob("*.py"))]
LONGEST_FUNCTION, LONGEST_FILE = 80, 400
NOMINAL = ("What", "How", "Whether", "Where", "Which", "Why")  # a docstring opens with a verb instead


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def length(function: ast.FunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_keeps_the_rules(path: Path):
    text = path.read_text()
    assert text.count("\n") <= LONGEST_FILE
    assert ast.get_docstring(ast.parse(text)), "a module starts with a docstring"
    assert "# fmt:" not in text, "the formatter formats everything"
    for function in functions(path):
        assert length(function) <= LONGEST_FUNCTION, function.name
        opening = (ast.get_docstring(function) or "Return").split()[0]
        assert opening not in NOMINAL, f"{function.name}: a docstring opens with a verb"


def test_functions_are_short():
    lengths = sorted(length(f) for path in FILES for f in functions(path))
    assert statistics.median(lengths) <= 10 and lengths[int(len(lengths) * 0.9)] <= 30
