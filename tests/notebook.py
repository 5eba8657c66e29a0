"""Run a notebook's code cells without Jupyter, and keep what they show.

    python tests/notebook.py docs/notebook.ipynb        runs it in a temporary folder and writes its outputs anew

One namespace for all cells, each in the same folder. `IPython.display` is a stand-in that collects what is displayed.
"""

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

LONGEST = 4000  # characters of text that a cell may leave


class Displayed:
    """Stands for `IPython.display`: `Image(file)` and `Markdown(text)` become outputs of the cell."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []

    def module(self) -> types.ModuleType:
        """Return it as a module."""
        module: Any = types.ModuleType("IPython.display")
        module.Image = lambda filename, width=None: ("image/png", str(filename))
        module.Markdown = lambda text: ("text/markdown", text)
        module.display = self.display
        return module

    def display(self, *things: tuple[str, str]) -> None:
        """Take things in."""
        for kind, value in things:
            data = base64.b64encode(Path(value).read_bytes()).decode() if kind == "image/png" else value
            self.outputs.append({"output_type": "display_data", "metadata": {}, "data": {kind: data}})


def run_notebook(path: Path, folder: Path) -> list[list[dict[str, Any]]]:
    """Run the code cells of a notebook in a folder; return the outputs of each.

    Raises:
        Exception: whatever a cell raises.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    displayed, found, before = Displayed(), [], Path.cwd()
    modules = {name: sys.modules.get(name) for name in ("IPython", "IPython.display")}
    sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": displayed.module()}
    os.chdir(folder)
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            printed, displayed.outputs = io.StringIO(), []
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
            text = printed.getvalue()
            assert len(text) <= LONGEST, f"a cell prints {len(text)} characters"
            stream = {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
            found.append([stream] * bool(text) + displayed.outputs)
    finally:
        os.chdir(before)
        for name, module in modules.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return found


def write_outputs(path: Path, outputs: list[list[dict[str, Any]]]) -> None:
    """Put outputs into the notebook's file."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, shown) in enumerate(zip(code, outputs, strict=True), 1):
        cell["outputs"], cell["execution_count"] = shown, number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    notebook = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        write_outputs(notebook, run_notebook(notebook, Path(scratch)))
