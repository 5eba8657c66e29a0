"""README and docs name only what exists, and the Python example runs.

The checks are in tests/docs_checker.py. One test gives them wrong names and expects to be told.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import MODEL, random_weights
from docs_checker import blocks, commands, complaints, python_files
from safetensors.torch import save_file
from test_imports import FLOOR

from llamaq.cli import RECIPES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 1300  # of the README


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_document_names_only_what_exists(path):
    found = complaints(path.read_text(), path.parent)
    assert not found, "\n".join([path.name, *found])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


def test_the_readme_leads_to_every_document():
    text = (ROOT / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"(docs/{p.name})" not in text] == []


def test_the_drawing_of_the_house_has_every_folder():
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = [p.name for p in (ROOT / "llamaq").iterdir() if (p / "__init__.py").is_file()]
    assert [name for name in folders if f"\n      {name}/ " not in text] == []


def test_every_stage_is_named_in_the_architecture():
    code = "\n".join(text for file, text in python_files().items() if not file.startswith("tests/"))
    stages = {re.sub(r"{\w+}", "NAME", call) for call in re.findall(r"run\.stage\(\s*f?\"([\w{}]+)\"", code)}
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert len(stages) > 10 and [s for s in sorted(stages) if f"`{s}`" not in text] == []


def test_the_import_law_is_drawn_as_it_is_kept():
    text = (ROOT / "docs" / "architecture.md").read_text().split("## The import law")[1].split("\n## ")[0]
    lines = [line.split() for line in text.splitlines() if line.startswith("      ")]
    drawn = [{FLOOR[word] for word in words if word in FLOOR and word != "cluster"} for words in lines]
    floors = [on_this_line for on_this_line in drawn if on_this_line]
    assert sum(map(len, floors)) == len(floors), "folders on one line stand on one floor"
    assert [max(f) for f in floors] == sorted((max(f) for f in floors), reverse=True)


def test_every_recipe_and_make_target_that_people_type_is_documented():
    words = {word for path in DOCUMENTS for command in commands(path.read_text()) for word in command}
    assert not set(RECIPES) - words and not {"install", "demo", "test", "test-all", "arm", "lint"} - words


WRONG = {
    "`tune run qat_lora_dop --config tiny`": "there is no recipe qat_lora_dop",
    "`tune run qat --config tinny`": "there is no config tinny",
    "`tune run --nprocs 2 qat --config tiny`": "torchrun has no option --nprocs",
    "`tune run qat --config tiny qat.optimiser.lr=1`": "there is no setting qat.optimiser.lr",
    "```bash\ntune run qat --config tiny \\\n    qat.optimizer.learning_rate=1\n```": "qat.optimizer.learning_rate",
    "`tune submit qat --config tiny --num-worker 8`": "tune submit has no option --num-worker",
    "`tune evaluate tiny`": "tune has no command evaluate",
    "`tune publish runs/1B --repo NAME --token T`": "tune publish has no option --token",
    "`tune cp tinny mine.yaml`": "there is no recipe or config tinny",
    "`make tests`": "make has no target tests",
    "`python tests/benchmarks/none.py`": "there is no file tests/benchmarks/none.py",
    "`python tests/benchmarks/device_table.py --shapes 1B`": "has no option --shapes",
    "`python -m llamaq.export.benchmarks`": "there is no module llamaq.export.benchmarks",
    "`pip install 'llamaq[gpu]'`": "llamaq has no extra gpu",
    "the option `--wait-hours`": "there is no option --wait-hours",
    "see llamaq/quant/schemes.py": "there is no file llamaq/quant/schemes.py",
    "see `schemes.py`": "there is no file schemes.py",
    "`llamaq.data.corpus.tiny_chats`": "there is no module llamaq.data.corpus.tiny_chats",
    "```python\nfrom llamaq import prepares\n```": "llamaq has no prepares",
    "`choose_scale()`": "there is no function choose_scale",
    "`LatentLinears`": "there is no class LatentLinears",
    "`freeze()` in `llamaq/quant/scheme.py`": "llamaq/quant/scheme.py does not define freeze",
    "`spinquant.forced`": "there is no setting spinquant.forced",
    "`deepspeed.settings.zero_optimization.bucket=1`": "there is no setting deepspeed.settings",
    "```yaml\nqat:\n  epoch: 1\n```": "there is no setting qat.epoch",
    "`llama3_2/2B_qat_lora_dpo`": "there is no config llama3_2/2B_qat_lora_dpo",
    "`LLAMAQ_TRACE=1`": "nothing reads LLAMAQ_TRACE",
    "[data](docs/nowhere.md)": "the link docs/nowhere.md leads nowhere",
    "[data](docs/data.md#nowhere)": "the link docs/data.md#nowhere names no heading",
}


@pytest.mark.parametrize("text, complaint", WRONG.items(), ids=WRONG.values())
def test_a_wrong_name_is_noticed(text, complaint):
    assert any(complaint in found for found in complaints(text)), complaints(text)


# --- the Python example -----------------------------------------------------------------------------------------------

REPLACED = {
    '{"_component_": "torchtune.models.llama3_2.llama3_2_1b"}': repr(MODEL),
    "/models/Llama-3.2-1B": "{folder}/start",
    "out/": "{folder}/out/",
    "max_seq_length=512, max_context_length=2048": "max_seq_length=64, max_context_length=128",
    "[128000, 9906, 11, 1917]": "[1, 17, 240, 5]",
}


@pytest.mark.slow
def test_the_python_example_runs(tmp_path):
    """docs/python.md's own lines, on a small random checkpoint: the file computes what the model computes."""
    (example,) = blocks((ROOT / "docs" / "python.md").read_text(), "python")
    for old, new in REPLACED.items():
        assert old in example, f"docs/python.md no longer has {old}"
        example = example.replace(old, new.format(folder=tmp_path) if "{folder}" in new else new)
    (tmp_path / "start").mkdir()
    save_file(random_weights(), tmp_path / "start" / "model.safetensors")
    printed: list[Any] = []
    exec(compile(example, "docs/python.md", "exec"), {"print": printed.append})
    (agreement,) = printed
    assert agreement["top1"] == 1.0 and agreement["token_error"] < 1e-4 and agreement["kl"] < 1e-3
    assert (tmp_path / "out" / "model.pte").is_file()
