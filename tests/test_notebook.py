"""docs/notebook.ipynb runs from its first cell to its last, and shows its plots."""

import json
from pathlib import Path

import pytest
from notebook import run_notebook

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
LARGEST = 300_000  # bytes of the file, outputs included


def test_it_is_a_small_notebook():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and NOTEBOOK.stat().st_size < LARGEST
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}


@pytest.mark.long
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "40")
    outputs = run_notebook(NOTEBOOK, tmp_path)
    text = "".join("".join(o.get("text", [])) for cell in outputs for o in cell)
    assert "'config.json', 'model.safetensors'" in text and "report: run/report/report.md" in text
    assert "model.pte" in text and "| perplexity | " in text and "| decode, tokens/s | " in text
    assert sum("image/png" in o.get("data", {}) for cell in outputs for o in cell) == 3
    assert (tmp_path / "run/bundle/model.pte").is_file()
