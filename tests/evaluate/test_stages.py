"""`tune run evaluate` on a finished chain: every model, also as a file, on tasks, by layer; the report and the card."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, small
from test_harness import TASKS, write_tasks

from llamaq.errors import UserError
from llamaq.evaluate.models import check_evaluation
from llamaq.recipes.evaluate import chain_names
from llamaq.report import card
from llamaq.runs.files import sha256_file
from llamaq.runs.manifest import read_manifest

TUNE = Path(sys.executable).parent / "tune"
QUANTIZED = ("ptq", "qat", "qat_lora", "final")
COMMON = [
    *SMALL,
    "evaluate.control=false",
    "evaluate.file_tokens=200",
    "evaluate.speed_new_tokens=8",
    "evaluate.speed_prompt_tokens=16",
]


def run(folder: Path, recipe: str, *settings: str) -> str:
    command = [TUNE, "run", recipe, "--config", "tiny", *COMMON, f"output_dir={folder}", *settings]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def size_of(png: Path) -> tuple[int, int]:
    return struct.unpack(">II", png.read_bytes()[16:24])


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "run"
    run(folder, "qat_lora_dpo")
    return folder


@pytest.fixture(scope="module")
def measured(chain, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder / "tasks")
    (folder / "text.txt").write_text("Anna lives in Rome. June has 30 days.\fMay has 31 days.")
    names = ["bf16", *QUANTIZED]
    settings = [
        f"evaluate.models=[{','.join(names + [f'{n}.pte' for n in names])}]",
        f"evaluate.tasks=[{','.join(TASKS)}]",
        f"evaluate.tasks_dir={folder}/tasks",
        f"evaluate.perplexity_text={folder}/text.txt",
        "evaluate.sensitivity_samples=4",
        "evaluate.speed=false",
    ]
    run(chain, "evaluate", *settings)
    return chain, settings


@pytest.mark.slow
def test_the_chain_ends_with_the_file_itself_measured(chain):
    page = (chain / "report/report.md").read_text()
    speed, exported = read_manifest(chain / "speed")["metrics"], read_manifest(chain / "export")["metrics"]
    assert set(speed["models"]) == {"bf16", "final"}
    assert all(m["sha256"] in page and len(m["decode"]) == 10 for m in speed["models"].values())
    assert sha256_file(chain / "export/model.pte") == exported["sha256"] == speed["models"]["final"]["sha256"]
    assert sum(exported["parts"].values()) == exported["bytes"] == speed["models"]["final"]["file_bytes"][0]
    width, height = size_of(chain / "report/speed.png")
    assert 0.25 < height / width < 1  # of a page's width, not a strip
    assert "## Memory" in page and "on the phone" in page and "`model.pte` took" in page


@pytest.mark.slow
def test_every_variant_passes_the_gates(measured):
    folder, _ = measured
    for name in QUANTIZED:
        exported = read_manifest(folder / ("export" if name == "final" else f"export_{name}"))["metrics"]
        gate = exported["hand_overs"]["pte"]
        assert gate["token_error"] <= 1e-4 and gate["top1"] == 1, name
        assert exported["hand_overs"]["pte_long"]["kl"] <= 1e-3 and exported["constants"] > 20
    assert read_manifest(folder / "export_bf16")["metrics"]["hand_overs"]["pte_float"]["kl"] < 0.01


@pytest.mark.slow
def test_files_score_as_their_models_do(measured):
    folder, _ = measured
    files = read_manifest(folder / "files")["metrics"]
    for name in QUANTIZED:
        read = files["scores"][name]
        assert read["nll"] == pytest.approx(read["eager_nll"], rel=1e-3) and read["top1/own"] > 0.99
        results = [read_manifest(folder / f"tasks_{n}")["metrics"]["results"] for n in (name, f"{name}.pte")]
        assert set(results[0]) == {*TASKS, "text.txt"}
        for task, result in results[0].items():
            for metric, m in result["metrics"].items():
                assert results[1][task]["metrics"][metric]["value"] == pytest.approx(m["value"], rel=2e-3), (name, task)
    forms = files["pairs"]
    assert set(forms) == {"bf16", "fake-quantized", "converted", ".pte"}
    assert forms["fake-quantized"]["converted"]["relative_error"] == 0
    float32, bf16 = files["numerics"]["float32"], files["numerics"]["bf16"]
    assert float32["relative_error"] < bf16["relative_error"] < 0.1 and bf16["relative_error"] > 1e-3
    assert float32["kl"] < 1e-3
    assert not any(files["blocks"]["fake-quantized → converted"]) and all(files["blocks"]["BF16 → fake-quantized"])


@pytest.mark.slow
def test_the_report_has_it_all_and_the_card_stays_the_users(measured):
    folder, settings = measured
    page, facts = (folder / "report/report.md").read_text(), json.loads((folder / "report/report.json").read_text())
    for heading in ("## Measured on the exported files", "## Where quantization costs", "## Tasks", "## Memory"):
        assert heading in page
    for name in ("blocks", "sensitivity", "tasks", "quality", "agreement", "losses"):
        assert f"({name}.png)" in page and size_of(folder / f"report/{name}.png")[0] > 500
    assert f"`{facts['pte_sha256'][:12]}`" in page and "fake-quantized → converted: no block is off" in page
    value = facts["measured"]["tasks_final.pte"]["results"]["days"]["metrics"]["acc"]["value"]
    assert f"{value:.4f}" in page
    readme = folder / "README.md"
    assert facts["pte_sha256"] in readme.read_text() and card.MARK in readme.read_text()
    assert '"get_bos_id": ' in readme.read_text()  # the command that exports again has the runner's constants
    readme.write_text("mine")
    said = run(folder, "evaluate", *settings, "evaluate.task_limit=2")
    assert readme.read_text() == "mine"
    for stage in ("evaluate", "export_ptq", "files", "sensitivity"):
        assert f"{stage}: up to date" in said
    assert "tasks_ptq.pte: evaluate.task_limit changed; running it again" in said


def test_what_cannot_be_measured_is_said_before_anything_is_trained(tmp_path):
    for setting, words in (
        ("evaluate.models=[bf16,spinquant]", "no 'spinquant' in this run; it has bf16, ptq, control"),
        ("evaluate.tasks=[mmlu_typo]", "no task 'mmlu_typo'"),
        ("evaluate.perplexity_text=/nowhere.txt", "no such file"),
        ("evaluate.tasks_dir=/nowhere", None),
    ):
        c = small(tmp_path, setting)
        if words is None:
            check_evaluation(c, *chain_names(c))  # without tasks it is not read
            continue
        with pytest.raises(UserError, match=words):
            check_evaluation(c, *chain_names(c))
    only_backbone = small(tmp_path, "export.stage=qat", "evaluate.control=false")
    assert chain_names(only_backbone) == (["bf16", "ptq", "qat"], "qat")


@pytest.mark.slow
def test_a_file_of_another_stage_is_not_measured_as_what_ships(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "run")
    run(tmp_path / "run", "export_executorch", "export.stage=qat")
    command = [TUNE, "run", "evaluate", "--config", "tiny", *COMMON, f"output_dir={tmp_path}/run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "convert was not made from qat_dpo as now" in done.stderr and "but from qat; run `tune run" in done.stderr
