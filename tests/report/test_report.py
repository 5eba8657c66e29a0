"""The report of both kinds of runs, from stages whose metrics are written here: page, plots, numbers, model card."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import FORMS, SMALL, saved_variant, small

from llamaq.config import Config, ExportConfig, load
from llamaq.config.view import only
from llamaq.errors import UserError
from llamaq.evaluate.models import Models
from llamaq.evaluate.sensitivity import ENDS
from llamaq.export.benchmark import MEASURES
from llamaq.model.names import LINEARS
from llamaq.report.card import MARK, export_parts, write_card
from llamaq.report.facts import REPORTED, describe_data, layer_error_curves, loss_curves
from llamaq.report.measured import first_block, measured_parts, speed_summary
from llamaq.report.publish import plot_measured, report_chain, report_spinquant
from llamaq.report.tables import tasks_table
from llamaq.runs.run import Run

SAME = {
    "relative_error": 1e-7,
    "token_error": 1e-7,
    "max_abs_error": 1e-6,
    "sqnr_db": 140.0,
    "kl": 1e-9,
    "top1": 1.0,
    "top5": 1.0,
}
SHOWN = {"template": "a template of its own", "conversation": "<|user|>How many?<|end|>"}
SCORE = {"nll": 1.0, "perplexity": 2.718, "kl/bf16": 0.01, "top1/bf16": 0.9, "top5/bf16": 1.0}
TRAINED = {"steps": 6, "first": {"step": 1, "loss": 2.5}, "last": {"step": 6, "loss": 1.5}}


def speed_of(names: list[str]) -> dict[str, Any]:
    return {
        "device": "a CPU",
        "settings": {"prompt_tokens": 16, "new_tokens": 8, "runs": 5, "rounds": 2, "threads": 2},
        "models": {n: {key: [1.0, 2.0, 3.0] for key in MEASURES} | {"sha256": "ab" * 32} for n in names},
    }


def measured_metrics(shipped: str) -> dict[str, Any]:
    """Metrics of the stages beyond the scores."""
    units = {f"layers.0.{kind}": 1e-3 for kind in LINEARS} | {ENDS: 1e-4}
    forms = ("bf16", "fake-quantized", "converted", ".pte")
    file = SCORE | {
        "kl/own": 1e-9,
        "top1/own": 1.0,
        "top5/own": 1.0,
        "eager_nll": 1.0,
        "samples": 3,
        "tokens": 50,
        "sha256": "cd" * 32,
    }
    task = {"metrics": {"acc": {"value": 0.5, "stderr": 0.1}}, "num_fewshot": 5, "samples": 6}
    return {
        "files": {
            "scores": {shipped: file},
            "pairs": {a: dict.fromkeys(forms, SAME) for a in forms},
            "numerics": {"float32": SAME, "bf16": SAME},
            "blocks": {"BF16 → fake-quantized": [0.1], "fake-quantized → converted": [0.0]},
        },
        "speed": speed_of(["bf16", shipped]),
        "sensitivity": {"whole": 1e-2, "alone": units, "left_out": units, "advice": ["Do this."], "tokens": 9},
        f"tasks_{shipped}.pte": {"file": "model.pte", "sha256": "ef" * 32, "results": {"days": task}},
    }


def exported_metrics() -> dict[str, Any]:
    return {
        "bytes": 2**20,
        "sha256": "12" * 32,
        "metadata": {"get_bos_id": 7},
        "constants": 65,
        "hand_overs": {"pte": SAME, "pte_long": SAME},
        "parts": {"int4 codes": 2**19, "program": 2**19},
    }


def written(run: Run, stages: dict[str, Any], codes: str, kind: str) -> None:
    """Write stages with these metrics; the one with the codes has a checkpoint, which the card reads."""
    for stage, metrics in stages.items():

        def build(folder: Path, metrics: Any = metrics, stage: str = stage) -> dict[str, Any]:
            if stage == codes:
                saved_variant(folder / "model", kind)
            return metrics

        run.stage(stage, build)


def chain_run(folder: Path, *settings: str) -> tuple[Run, Models, list[str]]:
    """A run of the chain with all its stages, its models, and what was measured."""
    run = Run(small(folder, *settings))
    measured = measured_metrics("final")
    dpo = {"rewards/margin": 0.0}
    stages = {
        "qat": TRAINED,
        "qat_lora": TRAINED,
        "convert": {"converted": SAME, "executorch_eager": SAME},
        "qat_dpo": TRAINED
        | {"first": TRAINED["first"] | dpo, "last": TRAINED["last"] | dpo, "samples": 9, "skipped": {"are equal": 1}},
        "export": exported_metrics(),
        "answer": {"prompt": "How many?", "answer": "30 days.", **SHOWN},
        "evaluate": {
            "samples": 3,
            "tokens": 50,
            "scores": {"bf16": SCORE, "ptq": SCORE, "final": SCORE},
            "shares": {
                "qat_lora": {
                    "share": 0.75,
                    "low": 0.5,
                    "high": 1.0,
                    "lost_nats_per_token": 0.04,
                    "won_nats_per_token": 0.03,
                }
            },
        },
        **measured,
    }
    written(run, stages, "convert", "qat_lora")
    return run, Models({}, "final", "convert"), list(measured)


@pytest.fixture
def chain(tmp_path) -> tuple[Run, Models, list[str]]:
    return chain_run(tmp_path / "run")


def test_report_of_a_chain(chain, capsys):
    run, models, measured = chain
    folder = report_chain(run, models, measured)
    page = (folder / "report.md").read_text()
    for heading in (
        "Quality by step of the chain",
        "What is trained is what runs",
        "Measured on the exported files",
        "Size and speed",
        "Where quantization costs",
        "Tasks",
        "Memory",
        "Training",
        "Where things are",
    ):
        assert f"\n## {heading}\n" in page
    assert "QAT + LoRA: **0.75** (95 % interval 0.50 to 1.00): 0.0300 of 0.0400 nats per token" in page
    assert "Its answer to *How many?*:\n\n> 30 days." in page
    assert "9 pairs. 1 rows were skipped: they are equal." in page
    assert "| days (5-shot, 6) | acc | 0.5000 ± 0.100 |" in page
    pictures = {p.stem for p in folder.glob("*.png")}
    assert pictures == {"losses", "quality", "agreement", "blocks", "speed", "sensitivity", "tasks"}
    assert all(f"({name}.png)" in page for name in pictures)
    facts = json.loads((folder / "report.json").read_text())
    assert facts["prompt"] == "How many?" and facts["training"][2]["steps"] == 6 and facts["shipped"] == "final"
    assert set(facts["stages"]) == {"qat", "qat_lora", "qat_dpo", "convert", "export", "answer", "evaluate", *measured}
    assert facts["files"]["adapters for PEFT"] == f"{run.folder}/convert/adapter"
    card = (run.folder / "README.md").read_text()
    assert "base_model" not in card  # it was trained here
    assert MARK in card and "--checkpoint convert/model/consolidated.00.pth" in card and "-lora 16" in card
    assert '"get_bos_id": 7' in card and "| qat_dpo | AdamW, lr 0.001, global batch 8, at most 6 steps" in card
    assert ".png" not in card
    capsys.readouterr()
    report_chain(run, models, measured)
    assert "report: up to date" in capsys.readouterr().out


def test_report_follows_what_its_stages_found(chain, capsys):
    run, models, measured = chain
    report_chain(run, models, measured)
    run.stage("answer", lambda folder: {"prompt": "How many?", "answer": "", **SHOWN}, {"prompt": "again"})
    folder = report_chain(run, models, measured)
    assert "report: metrics.answer.answer changed" in capsys.readouterr().out
    assert "> (nothing)" in (folder / "report.md").read_text()


def test_report_needs_its_stages(tmp_path):
    run = Run(small(tmp_path / "run"))
    with pytest.raises(UserError, match=r"stage 'qat' has not been run.*tune run qat_lora_dpo"):
        report_chain(run, Models({}, "final", "convert"), [])


def spinquant_run(folder: Path) -> tuple[Run, Models, dict[str, Any]]:
    """A SpinQuant run with all its stages, its models, and the stages' metrics."""
    settings = [s for s in SMALL if not s.startswith("qat")]
    run = Run(load("tiny_spinquant", [*settings, f"output_dir={folder}"]))
    layers = [{"name": f"layers.{i}.mlp.w1", "nearest": 0.2, "rounded": 0.1} for i in (0, 0, 1)]
    peaks = {"weights of a group": [3.0, 4.0]}
    candidate = {
        "kl": 0.01,
        "kl_interval": 0.001,
        "learn_seconds": 3.0,
        "round_seconds": 2.0,
        "layers": layers,
        "outliers": {"before": peaks, "after": peaks},
    }
    stages = {
        "calibrate": {"tokens": 960},
        "candidate_none": candidate | {"learn_seconds": 0.0},
        "candidate_r4": candidate,
        "spinquant": {"chosen": "r4", "forced": True, "executorch_eager": SAME},
        "export": exported_metrics(),
        "answer": {"prompt": "How many?", "answer": "30 days.", **SHOWN},
        "evaluate": {
            "samples": 3,
            "tokens": 50,
            "scores": {"bf16": SCORE, "ptq": SCORE, "spinquant": SCORE},
            "share": {"share": 0.8, "low": 0.7, "high": 0.9},
        },
        **measured_metrics("spinquant"),
    }
    written(run, stages, "spinquant", "spinquant")
    return run, Models({}, "spinquant", "spinquant", context=1), stages


def test_report_of_spinquant(tmp_path):
    run, models, stages = spinquant_run(tmp_path / "run")
    folder = report_spinquant(run, models, ["none", "r4"], ["files", "speed"])
    page = (folder / "report.md").read_text()
    assert "ships **r4**" in page and "It was forced" in page and "wins back **0.80**" in page
    assert "Calibrated on 960 tokens" in page and "| **r4** | 1.000e-02 ± 1.0e-03 | 3 | 2 |" in page
    for name in ("quality", "agreement", "selection", "outliers", "layer_errors", "blocks", "speed"):
        assert f"({name}.png)" in page and (folder / f"{name}.png").stat().st_size > 5000
    assert "## Tasks" not in page  # they were not measured this time
    card = (run.folder / "README.md").read_text()
    assert "SpinQuant rotations r4" in card and "--use_spin_quant native" in card and "| calibration 1 |" in card
    run.stage("evaluate", lambda folder: stages["evaluate"] | {"share": None}, {"models": ["bf16", "spinquant"]})
    page = (report_spinquant(run, models, ["none", "r4"], []) / "report.md").read_text()
    assert "wins back" not in page  # PTQ was not scored


def test_the_view_holds_what_memory_plans_read(tmp_path):
    from llamaq.plan.memory import memory_plan, plan_length

    configs: list[Config] = [small(tmp_path / "a"), load("tiny_spinquant", [f"output_dir={tmp_path}/b"])]
    for config in configs:
        c = only(config, *REPORTED)
        assert [need.bytes for need in memory_plan(c, plan_length(c))] == [
            need.bytes for need in memory_plan(config, plan_length(config))
        ]


def test_sections_of_what_was_not_measured_are_left_out(tmp_path):
    assert measured_parts({}) == []
    plot_measured(tmp_path, {})
    assert not list(tmp_path.iterdir())
    parts = measured_parts({"export": exported_metrics()})
    assert parts[0] == "Contents of the file that ships:" and "| int4 codes | 0.50 | 50.0 % |" in parts[1]


def test_where_two_models_part():
    assert first_block([0.0, 2e-6]) == "no block is off by more than 1e-05 (largest: 2.0e-06)"
    assert first_block([0.0, 0.02, 0.3]) == "off from block 1 on (2.0e-02 there, 3.0e-01 after the last)"


def test_speed_has_units():
    model = speed_of(["bf16"])["models"]["bf16"] | {"file_bytes": [3 * 2**20]}
    summary = speed_summary(model)
    assert summary["decode (tokens/s)"] == (2.0, 1.5, 2.5) and summary["file (MiB)"] == (3.0, 3.0, 3.0)


def test_tasks_have_a_row_per_metric_and_a_column_per_model():
    values = {"metrics": {"ppl": {"value": 12345.678, "stderr": None}}, "samples": 2}
    rows = tasks_table({"bf16": {"results": {"text": values}}, "final.pte": {"results": {}}}).splitlines()
    assert rows[0] == "| task (samples) | metric | BF16 start | QAT + LoRA + DPO, .pte |"
    assert rows[2] == "| text (2) | ppl | 1.235e+04 |  |"


def test_layer_errors_are_means_with_the_unrotated_candidate_beside():
    layers = [
        {"name": "layers.0.attn.q_proj", "nearest": 0.1, "rounded": 0.01},
        {"name": "layers.0.mlp.w1", "nearest": 0.3, "rounded": 0.03},
        {"name": "layers.1.mlp.w1", "nearest": 0.5, "rounded": 0.05},
    ]
    candidates = {"none": {"layers": layers}, "r4": {"layers": layers}}
    curves = layer_error_curves(candidates, "r4")
    assert list(curves) == ["none, to nearest", "none, as rounded", "r4, to nearest", "r4, as rounded"]
    assert curves["r4, to nearest"] == pytest.approx([0.2, 0.5])
    assert list(layer_error_curves(candidates, "none")) == ["none, to nearest", "none, as rounded"]


def test_curves_are_those_of_the_stages_that_ran(tmp_path):
    for stage in ("qat", "control_qat"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    curves = loss_curves(tmp_path)
    assert curves["QAT"] == {"quantized": ([1, 2], [2.0, 1.0]), "BF16 control": ([1, 2], [2.0, 1.0])}
    assert curves["LoRA"] == curves["DPO"] == {}


def test_a_dataset_is_named_without_its_path():
    dataset = {"_component_": "torchtune.datasets.chat_dataset", "source": "json", "data_files": "/data/mine/a.jsonl"}
    assert describe_data(dataset) == "`a.jsonl` by `torchtune.datasets.chat_dataset`"


def test_a_card_gives_executorchs_command_only_where_that_makes_the_file(tmp_path):
    said = {}
    for name, kind in (("qwen2", "qat"), ("qwen2", "qat_lora"), ("qwen3", "spinquant")):
        folder = tmp_path / name / kind
        saved_variant(folder / "model", kind, FORMS[name])
        facts = {
            "folder": folder,
            "checkpoint": folder / "model",
            "export_options": ExportConfig(max_seq_length=100),
            "pte_metadata": {"get_bos_id": 1},
            "packages": {"executorch": "1.4.1"},
        }
        said[kind] = "\n".join(export_parts(facts))
    assert "-m executorch.examples.models.llama.export_llama" in said["qat"] and "llama-models" not in said["qat"]
    for kind in ("qat_lora", "spinquant"):
        assert "-m executorch" not in said[kind] and "1.4.1's own `export_llama` does not make this file" in said[kind]
        code = said[kind].split("```python\n")[1].split("\n```")[0]
        called: list[Any] = []
        imports, _, call = code.partition("\n")
        assert imports == "from llamaq import ExportConfig, export_pte"
        exec(call, {"ExportConfig": ExportConfig, "export_pte": lambda *a, to=called: to.extend(a)})
        assert called[0] == "model" and called[2] == ExportConfig(max_seq_length=100) and called[3] == {"get_bos_id": 1}


def test_a_card_of_the_users_own_stays(tmp_path):
    assert write_card(tmp_path, f"{MARK}\none") and write_card(tmp_path, f"{MARK}\ntwo")
    assert (tmp_path / "README.md").read_text() == f"{MARK}\ntwo"
    (tmp_path / "README.md").write_text("mine")
    assert not write_card(tmp_path, f"{MARK}\nthree") and (tmp_path / "README.md").read_text() == "mine"
