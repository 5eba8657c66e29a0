"""Which models a config asks for, and when a stage has to measure them again."""

import json
from pathlib import Path

import pytest
from conftest import SMALL, small

from llamaq.config import Config, load
from llamaq.data.corpus import tiny_chat
from llamaq.errors import UserError
from llamaq.evaluate.models import Models, ModelSource, stages_up_to
from llamaq.evaluate.stages import files_stage, score_stage, sensitivity_stage, speed_stage, tasks_stage
from llamaq.model.build import build_model, scheme_of
from llamaq.runs.manifest import read_manifest
from llamaq.runs.run import Run


def models_of(c: Config, weights: Path) -> Models:
    """A BF16 model of random weights, and the same rounded to nearest, which stands for what ships."""

    def make(quantized: bool):
        scheme = scheme_of(c) if quantized else None
        return lambda: build_model(c.model, None, scheme, seed=int(weights.read_text()))

    known = {
        "bf16": ModelSource(make(False), [weights], full_precision=True),
        "ptq": ModelSource(make(True), [weights]),
    }
    return Models(known, "ptq", codes="convert")


@pytest.fixture
def start(tmp_path) -> Path:
    """Data files, a tokenizer, and a file that stands for a model's weights."""
    (tmp_path / "corpus").mkdir()
    tiny_chat(tmp_path / "corpus", 120, 4, 12, 60, 640)
    (tmp_path / "weights").write_text("1")
    (tmp_path / "text.txt").write_text("June has 30 days.\fMay has 31 days.")
    return tmp_path


def opened(start: Path, *overrides: str) -> tuple[Run, Models]:
    """The run of the fixture's folder with some settings, and its models."""
    corpus = start / "corpus"
    paths = [
        f"output_dir={start}/run",
        f"tokenizer.path={corpus}/tokenizer.model",
        f"tokenizer.special_tokens_path={corpus}/special_tokens.json",
        f"evaluate.dataset.data_files={corpus}/heldout.jsonl",
        "evaluate.sensitivity_samples=2",
    ]
    c = load("tiny", [*SMALL, *paths, *overrides])
    return Run(c), models_of(c, start / "weights")


def test_stages_come_in_one_order():
    assert stages_up_to("qat") == ["qat"]
    assert stages_up_to("qat_dpo") == ["qat", "qat_lora", "qat_dpo"]


def test_what_is_wanted(tmp_path):
    weights = tmp_path / "weights"
    weights.write_text("1")
    models = models_of(small(tmp_path), weights)
    assert models.wanted(small(tmp_path)) == ["bf16", "ptq", "bf16.pte", "ptq.pte"]
    c = small(tmp_path, "evaluate.models=[ptq.pte]")
    assert (models.wanted(c), models.to_export(c)) == (["ptq.pte"], ["ptq"])
    assert models.to_score(c) == ["bf16"]  # what the others are compared with is always there
    assert models.inputs_of(["bf16", "ptq"]) == [weights]
    with pytest.raises(UserError, match="no 'final' in this run; it has bf16, ptq, each also"):
        models.wanted(small(tmp_path, "evaluate.models=[final]"))


def test_sensitivity_runs_again_when_what_it_reads_changes(start, capsys):
    """Samples depend on the tokenizer's length; batches, devices and other sections change nothing."""

    def again(*overrides: str) -> str:
        run, models = opened(start, *overrides)
        sensitivity_stage(run, models)
        run.close()
        said = capsys.readouterr().out.splitlines()
        return "\n".join(line for line in said if not line.startswith("evaluate.dataset: "))

    assert again() == ""
    neutral = ("evaluate.batch_size=1", "qat.max_steps=9", "export.prompt=x", "evaluate.max_samples=3")
    assert "sensitivity: up to date" in again(*neutral)
    assert "sensitivity: tokenizer.max_seq_len changed" in again("tokenizer.max_seq_len=64")
    assert "evaluate.sensitivity_samples, tokenizer.max_seq_len changed" in again("evaluate.sensitivity_samples=3")
    (start / "weights").write_text("2")
    assert "inputs.weights changed" in again("evaluate.sensitivity_samples=3")
    metrics = read_manifest(start / "run" / "sensitivity")["metrics"]
    assert metrics["samples"] == 3 and len(metrics["alone"]) == 8 and metrics["advice"]


def test_scores_are_summarized_and_depend_on_the_models_named(start, capsys):
    run, models = opened(start)
    folder = score_stage(run, models, lambda scores: {"shares": {name: len(s.nll) for name, s in scores.items()}})
    metrics = read_manifest(folder)["metrics"]
    assert metrics["shares"] == {"bf16": 12, "ptq": 12} and metrics["scores"]["ptq"]["kl/bf16"] > 0
    run.close()
    capsys.readouterr()
    run, models = opened(start, "evaluate.models=[bf16]")
    metrics = read_manifest(score_stage(run, models, lambda scores: {}))["metrics"]
    assert list(metrics["scores"]) == ["bf16"] and "evaluate: models changed" in capsys.readouterr().out


def test_tasks_of_a_model_read_the_text_they_are_given(start, capsys):
    run, models = opened(start, f"evaluate.perplexity_text={start}/text.txt")
    metrics = read_manifest(tasks_stage(run, models, "ptq"))["metrics"]
    assert metrics["file"] is None and metrics["results"]["text.txt"]["samples"] == 2
    run.close()
    (start / "text.txt").write_text("June has 30 days.")
    run, models = opened(start, f"evaluate.perplexity_text={start}/text.txt", "seed=3")
    metrics = read_manifest(tasks_stage(run, models, "ptq"))["metrics"]
    assert metrics["results"]["text.txt"]["samples"] == 1
    assert "tasks_ptq: evaluate.perplexity_text, seed changed" in capsys.readouterr().out


def test_identities_of_what_is_measured_on_files(start, monkeypatch):
    """What a stage declares, without exporting anything."""
    found = {}

    def record(self, name, build, settings, inputs=(), arguments=None, version=1):
        found[name] = (settings.settings(), sorted(p.name for p in inputs), arguments)
        return Path(name)

    monkeypatch.setattr(Run, "need", lambda self, stage, **_: self.path(stage))
    monkeypatch.setattr(Run, "stage", record)
    run, models = opened(start)
    exported = {"bf16": start / "export_bf16", "ptq": start / "export"}
    files_stage(run, models, exported)
    speed_stage(run, exported)
    tasks_stage(run, models, "ptq.pte")
    settings, inputs, arguments = found["files"]
    assert set(settings) == {"model", "scheme", "adapters", "tokenizer", "evaluate", "export"}
    assert set(settings["evaluate"]) == {"dataset", "file_tokens"}
    assert set(settings["export"]) == {"gate_tokens", "max_context_length"}
    assert inputs == ["convert", "export", "export_bf16", "weights"] and arguments == {"models": ["bf16", "ptq"]}
    settings, inputs, arguments = found["speed"]
    assert set(settings["evaluate"]) == {"speed_prompt_tokens", "speed_new_tokens", "threads"} and len(settings) == 1
    assert inputs == ["export", "export_bf16"]
    settings, inputs, _ = found["tasks_ptq.pte"]
    assert inputs == ["export"] and settings["seed"] == 0
    assert json.dumps(settings)  # plain values
