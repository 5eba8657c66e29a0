"""`tune run spinquant` on a small model: choice, resume, bad settings, and what the report says."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

from llamaq.config import Config, load
from llamaq.errors import UserError
from llamaq.recipes.spinquant import candidate_names, choose, windows
from llamaq.runs.run import read_manifest

TUNE = Path(sys.executable).parent / "tune"
SETTINGS = [s for s in SMALL if not s.startswith("qat")] + [
    "spinquant.calibration.0.num_samples=8", "spinquant.num_selection=4", "spinquant.batch_size=4",
    "spinquant.steps=6", "spinquant.refine_steps=1", "spinquant.polish_steps=2", "spinquant.num_seeds=2",
    "base.epochs=4",
]  # fmt: skip


def configured(folder: Path, *more: str) -> Config:
    return load("tiny_spinquant", [*SETTINGS, f"output_dir={folder}", *more])


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
        _ = load("tiny", [f"output_dir={tmp_path}"]).rotations


def test_the_best_candidate_ships_unless_one_is_forced(tmp_path):
    judged = {"none": 0.2, "r4": 0.3, "r1_r2_r4_seed0": 0.25}
    assert choose(configured(tmp_path / "x"), judged) == "none"  # no rotation that loses to none
    assert choose(configured(tmp_path / "x", "spinquant.force=r4"), judged) == "r4"
    with pytest.raises(UserError, match=r"spinquant\.force=r1 is none of the candidates: none, r4"):
        choose(configured(tmp_path / "x", "spinquant.force=r1"), judged)


def test_seeds_only_where_something_is_random(tmp_path):
    names = [name for name, _, _ in candidate_names(configured(tmp_path / "x"))]
    assert names == ["none", "r4", "r2_r4_seed0", "r2_r4_seed1", "r1_r2_r4_seed0", "r1_r2_r4_seed1"]


def test_calibration_mixes_parts_and_keeps_selection_apart(tmp_path, monkeypatch):
    from llamaq.data.corpus import tiny_chat

    (tmp_path / "corpus").mkdir()
    tiny_chat(tmp_path / "corpus", 120, 4, 4, 60, 640)
    (tmp_path / "text.txt").write_text("\f".join(f"June has {i} days and {i} nights." * 60 for i in range(8)))
    text = "{_component_: llamaq.data.datasets.text_windows_dataset, source: " + f"{tmp_path}/text.txt}}"
    parts = "[{dataset: '${base.dataset}', num_samples: 5}, {dataset: " + text + ", num_samples: 3}]"
    c = configured(tmp_path, f"spinquant.calibration={parts}")
    calibration, selection = windows(c)
    assert calibration.shape == (8, 96) and selection.shape == (4, 96)
    assert torch.equal(calibration, windows(c)[0])
    seen = {tuple(w.tolist()) for w in calibration}
    assert not any(tuple(w.tolist()) in seen for w in selection)
    with pytest.raises(UserError, match=r"calibration\[1\].dataset has text for \d+ windows of 96 tokens"):
        windows(configured(tmp_path, f"spinquant.calibration={parts.replace('samples: 3', 'samples: 3000')}"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("spinquant") / "run"
    return folder, run(folder)


@pytest.mark.slow
def test_the_report_states_what_was_chosen(whole):
    folder, said = whole
    page = (folder / "report" / "report.md").read_text()
    judged = {n: read_manifest(folder / f"candidate_{n}")["metrics"]["kl"] for n in
              ("none", "r4", "r2_r4_seed0", "r2_r4_seed1", "r1_r2_r4_seed0", "r1_r2_r4_seed1")}  # fmt: skip
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
    assert again.count("up to date") == 16
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
