"""`tune run spinquant` on a small model: bad settings, what each stage depends on, resume, and the report."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import random_weights
from safetensors.torch import load_file, save_file
from toy import SETTINGS, configured

from llamaq.config import load
from llamaq.errors import UserError
from llamaq.recipes.spinquant import calibrate, select, try_candidate
from llamaq.runs.manifest import read_manifest
from llamaq.runs.run import Run
from llamaq.spinquant.candidates import candidates_of

TUNE = Path(sys.executable).parent / "tune"


def command(folder: Path, *more: str) -> list[str]:
    settings = [*SETTINGS, f"output_dir={folder}", *more]
    return [str(TUNE), "run", "spinquant", "--config", "tiny_spinquant", *settings]


def run(folder: Path, *more: str) -> str:
    done = subprocess.run(command(folder, *more), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("spinquant.candidates=[r3]", "'r3' is none of"),
        ("spinquant.candidates=[r4]", "has no 'none'"),
        ("spinquant.objective=ce", "choose noise or published"),
        ("spinquant.rounding=awq", "choose gptq or rtn"),
        ("spinquant.steps=0", "spinquant.steps=0: must be at least 1"),
        ("spinquant.calibration=[]", "names no dataset"),
        ("spinquant.lrr=1", "did you mean spinquant.lr"),
    ],
)
def test_wrong_settings_are_named(tmp_path, setting, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        configured(tmp_path / "x", setting)


def test_the_chains_configuration_is_not_enough(tmp_path):
    with pytest.raises(UserError, match="needs the section 'spinquant'"):
        _ = load("tiny", [f"output_dir={tmp_path}"]).section("spinquant")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A corpus with its tokenizer, and the checkpoint of a random model: what a run starts from."""
    from llamaq.data.corpus import tiny_chat

    folder = tmp_path_factory.mktemp("given")
    tiny_chat(folder, 120, 4, 12, 60, 640)
    weights = random_weights(configured(folder / "x").model)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def started(given: Path, folder: Path, *more: str) -> Run:
    """A run on what is given, of two candidates and few steps."""
    chats = "{_component_: torchtune.datasets.chat_dataset, source: json, conversation_column: messages, "
    chats += "conversation_style: openai, data_files: " + str(given)
    settings = [
        "corpus=null",
        "base=null",
        f"checkpoint_dir={given}",
        f"tokenizer.path={given}/tokenizer.model",
        f"tokenizer.special_tokens_path={given}/special_tokens.json",
        f"spinquant.calibration=[{{dataset: {chats}/train.jsonl}}, num_samples: 8}}]",
        f"evaluate.dataset={chats}/heldout.jsonl}}",
        "spinquant.candidates=[none,r1_r2_r4]",
        "spinquant.num_seeds=1",
        "spinquant.steps=2",
        "export.max_relative_error=1",
    ]
    changed = {s.partition("=")[0] for s in settings}
    kept = [s for s in SETTINGS if not s.startswith(("base.", "corpus.", "spinquant.calibration"))]
    kept = [s for s in kept if s.partition("=")[0] not in changed]
    return Run(load("tiny_spinquant", [*kept, *settings, f"output_dir={folder}", *more]))


def run_stages(run: Run) -> list[str]:
    """The stages that run, of those up to the choice."""
    calibrate(run)
    for candidate in candidates_of(run.config.section("spinquant"), run.config.seed):
        try_candidate(run, candidate)
    select(run)
    run.close()
    return run.executed


@pytest.mark.parametrize(
    "settings",
    [
        ["spinquant.rows=16"],
        ["spinquant.objective=published", "spinquant.refine_steps=0", "spinquant.polish_steps=0"],
        ["spinquant.rounding=rtn", "spinquant.force=none"],
    ],
    ids=["noise", "published", "rtn"],
)
def test_stages_declare_every_setting_they_read(given, tmp_path, settings):
    """A setting that is read but not declared raises; the settings below are declared only where they are read."""
    made = run_stages(started(given, tmp_path / "run", *settings))
    assert made == ["calibrate", "candidate_none", "candidate_r1_r2_r4_seed0", "spinquant"]
    for name in ("rotations.safetensors", "learning.json", "model/params.json"):
        assert (tmp_path / "run" / "candidate_r1_r2_r4_seed0" / name).is_file()


def test_settings_that_change_nothing_run_nothing_again(given, tmp_path):
    off = ["spinquant.polish_steps=0", "spinquant.refine_steps=0"]
    run_stages(started(given, tmp_path / "run", *off))
    unread = ["spinquant.polish_lr=1", "spinquant.refine_lr=1", "qat=null", "evaluate.batch_size=3"]
    assert run_stages(started(given, tmp_path / "run", *off, *unread)) == []
    learned = started(given, tmp_path / "run", *off, "spinquant.lr=0.1")
    assert run_stages(learned) == ["candidate_r1_r2_r4_seed0", "spinquant"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("spinquant") / "run"
    return folder, run(folder)


@pytest.mark.slow
def test_the_report_states_what_was_chosen(whole):
    folder, said = whole
    page = (folder / "report" / "report.md").read_text()
    names = ("none", "r4", "r2_r4_seed0", "r2_r4_seed1", "r1_r2_r4_seed0", "r1_r2_r4_seed1")
    judged = {n: read_manifest(folder / f"candidate_{n}")["metrics"]["kl"] for n in names}
    best = min(judged, key=judged.__getitem__)
    assert f"ships {best}" in said and f"ships **{best}**" in page
    assert all(f"{kl:.3e}" in page for kl in judged.values())
    for picture in ("selection", "outliers", "layer_errors", "quality", "agreement"):
        assert f"({picture}.png)" in page and (folder / "report" / f"{picture}.png").stat().st_size > 5000
    metrics = read_manifest(folder / "export")["metrics"]
    assert metrics["hand_overs"]["pte"]["token_error"] < 1e-4 and metrics["hand_overs"]["pte"]["top1"] == 1.0


@pytest.mark.slow
def test_running_again_does_nothing_and_forcing_runs_only_what_follows(whole):
    folder, _ = whole
    again = run(folder)
    assert again.count("up to date") == 18
    forced = run(folder, "spinquant.force=r1_r2_r4_seed1")
    assert "candidate_r1_r2_r4_seed1: up to date" in forced and "ships r1_r2_r4_seed1" in forced
    params = json.loads((folder / "spinquant" / "model" / "params.json").read_text())
    assert params["quantization_args"]["spinquant"] is True
    assert params["quantization_args"]["rotation"] == {"r1": True, "r2": True, "r4": 128}
    assert "It was forced" in (folder / "report" / "report.md").read_text()


@pytest.mark.slow
def test_a_killed_run_keeps_its_rotations_and_ends_with_the_same_codes(whole, tmp_path):
    folder, _ = whole
    ours, name = tmp_path / "run", "candidate_r1_r2_r4_seed0"
    process = subprocess.Popen(command(ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    learning = ours / f"{name}.partial" / "learning.json"
    deadline = time.monotonic() + 300
    while not learning.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert learning.is_file() and not (ours / name).exists()
    kept = learning.read_bytes()
    run(ours)
    assert (ours / name / "learning.json").read_bytes() == kept  # with its seconds: it was not learned again
    a, b = (torch.load(f / name / "model" / "consolidated.00.pth", weights_only=True) for f in (folder, ours))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    r1 = [load_file(f / name / "rotations.safetensors")["r1"] for f in (folder, ours)]
    assert torch.equal(*r1)
