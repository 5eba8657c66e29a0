"""The whole chain on a small model, through the command: killed in every stage and between, on one and two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

from llamaq.export.pte import Pte, check_constants
from llamaq.runs.manifest import read_manifest
from llamaq.runs.tracking import read_metrics

pytestmark = pytest.mark.slow
TUNE = Path(sys.executable).parent / "tune"
TRAINED = ("base", "qat", "qat_lora", "qat_dpo", "control_qat", "control_lora")
STAGES = (
    "corpus",
    "base",
    "qat",
    "qat_lora",
    "reference",
    "qat_dpo",
    "convert",
    "export",
    "control_qat",
    "control_lora",
    "evaluate",
    "report",
    "bundle",
)
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def command(folder: Path, *overrides: str, recipe: str = "qat_lora_dpo", torchrun: tuple[str, ...] = ()) -> list[str]:
    settings = [*SMALL, "wandb.mode=offline", f"output_dir={folder}", *overrides]
    return [str(TUNE), "run", *torchrun, recipe, "--config", "tiny", *settings]


def run(folder: Path, *overrides: str, **kwargs) -> str:
    done = subprocess.run(
        command(folder, *overrides, **kwargs), capture_output=True, text=True, env=ENVIRONMENT, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(folder: Path, stage: str) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / stage / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    said = run(folder)
    return folder, said


def test_every_stage_leaves_a_manifest_and_the_report_is_announced(whole):
    folder, said = whole
    assert all((folder / stage / "manifest.json").is_file() for stage in STAGES)
    assert said.rstrip().endswith(f"report: {folder}/report/report.md")
    assert "GiB" in said and said.index("qat: about") < said.index("fake-quantized → converted")


def test_what_is_trained_is_what_runs(whole):
    folder, _ = whole
    for result in read_manifest(folder / "convert")["metrics"].values():
        assert result["relative_error"] == 0 and result["top1"] == 1
    exported = read_manifest(folder / "export")["metrics"]
    assert exported["hand_overs"]["pte"]["token_error"] <= 1e-4
    assert exported["hand_overs"]["pte"]["top1"] == 1
    tensors = torch.load(folder / "convert/model/consolidated.00.pth", weights_only=True)
    assert exported["constants"] == len(tensors)


def test_a_changed_code_in_the_checkpoint_is_noticed_in_the_pte(whole, tmp_path):
    from llamaq.errors import UserError

    folder, _ = whole
    tensors = torch.load(folder / "convert/model/consolidated.00.pth", weights_only=True)
    tensors["layers.0.feed_forward.w2.weight"][5, 7] ^= 1
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"1 of the checkpoint's .* tensors .*layers\.0\.feed_forward\.w2\.weight"):
        check_constants(tmp_path, folder / "export/model.pte")


def test_the_pte_carries_its_tokens_ids_and_answers_like_it_prefills(whole):
    folder, _ = whole
    pte = Pte(folder / "export/model.pte")
    special = json.loads((folder / "corpus/special_tokens.json").read_text())["added_tokens"]
    ids = {t["content"]: t["id"] for t in special}
    assert pte.metadata("get_bos_id") == ids["<|begin_of_text|>"]
    assert pte.metadata("get_eos_ids") == [ids[f"<|{n}|>"] for n in ("end_of_text", "eot_id", "eom_id")]
    prompt = list(range(20, 40))
    stepped = pte.logits(prompt)[-1]
    pte.reset()
    assert torch.allclose(pte.step(prompt, 0), stepped, rtol=0, atol=0.05 * stepped.abs().max().item())
    assert len(pte.generate(prompt, 5, stop=[])) == 5


def test_dpo_starts_at_ln_2_and_raises_the_margin(whole):
    rows = read_metrics(whole[0] / "qat_dpo" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert rows[-1]["rewards/margin"] > rows[0]["rewards/margin"]


def test_the_report_shows_its_plots_and_numbers(whole):
    folder, _ = whole
    page = (folder / "report/report.md").read_text()
    evaluation = read_manifest(folder / "evaluate")["metrics"]
    for name in ("quality", "agreement", "losses"):
        assert f"({name}.png)" in page and (folder / f"report/{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert set(evaluation["scores"]) == {"bf16", "ptq", "control", "ptq_control", "qat", "qat_lora", "final"}
    assert f"| QAT + LoRA | {evaluation['scores']['qat_lora']['nll']:.4f} |" in page
    assert evaluation["scores"]["bf16"]["kl/bf16"] == 0 and evaluation["scores"]["bf16"]["top1/bf16"] == 1


def test_wandb_has_an_offline_run_a_stage_in_one_group(whole):
    folder, _ = whole
    runs = [p.name for p in (folder / "wandb").glob("offline-run-*")]
    run_id = json.loads((folder / "run.json").read_text())["id"]
    for stage in (*TRAINED, "report"):
        assert any(name.endswith(f"{run_id}-{stage}") for name in runs), (stage, runs)


def test_running_it_again_runs_nothing_and_a_changed_setting_what_depends_on_it(whole):
    folder, _ = whole
    before = {s: (folder / s / "manifest.json").stat().st_mtime_ns for s in STAGES}
    said = run(folder)
    assert all(f"{stage}: up to date" in said for stage in STAGES)
    assert before == {s: (folder / s / "manifest.json").stat().st_mtime_ns for s in STAGES}
    said = run(folder, "evaluate.max_samples=6", "evaluate.control=false", "qat.batch_size=8")  # the last: speed only
    after = {s: (folder / s / "manifest.json").stat().st_mtime_ns for s in STAGES}
    assert [s for s in STAGES if after[s] != before[s]] == ["evaluate", "report", "bundle"]
    assert "Share of the quantization loss" not in (folder / "report/report.md").read_text()


KILLS = [  # in the order of the chain; after this step, or as soon as the stage begins
    ("base", 3),
    ("qat", 3),
    ("qat_lora", 3),
    ("reference", None),
    ("qat_dpo", 3),
    ("convert", None),
    ("export", None),
    ("control_qat", 3),
    ("control_lora", 3),
    ("evaluate", None),
    ("report", None),
]


def test_killed_in_every_stage_and_between_the_losses_are_the_uninterrupted_ones(whole, tmp_path):
    """SIGKILL in the middle of each training stage (after step 3 of 6), and as soon as later stages begin."""
    folder = tmp_path / "killed"
    for stage, step in KILLS:
        process = subprocess.Popen(
            command(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        partial = folder / f"{stage}.partial"
        deadline = time.monotonic() + 300
        while not ((len(read_metrics(partial / "metrics.jsonl")) >= step) if step else partial.exists()):
            assert process.poll() is None and time.monotonic() < deadline, f"{stage} was over before it could be killed"
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (folder / stage).exists() and partial.exists()
    run(folder)
    for stage in TRAINED:
        assert losses(folder, stage) == losses(whole[0], stage), stage
        assert [r["step"] for r in read_metrics(folder / stage / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    for stage in ("qat", "qat_dpo", "convert"):
        files = [read_manifest(f / stage)["files"] for f in (folder, whole[0])]
        names = [n for n in files[0] if n.endswith((".safetensors", ".json"))]
        assert {n: files[0][n] for n in names} == {n: files[1][n] for n in names}, stage


def test_stages_run_alone_from_the_same_config(whole, tmp_path):
    folder = tmp_path / "alone"
    assert "latent weights" in run(folder, recipe="qat")
    missing = subprocess.run(
        command(folder, recipe="qat_dpo"), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert missing.returncode == 1 and "stage 'qat_lora' has not been run" in missing.stderr
    run(folder, recipe="qat_lora")
    run(folder, recipe="qat_dpo")
    for stage in ("base", "qat", "qat_lora", "qat_dpo"):
        assert losses(folder, stage) == losses(whole[0], stage)


def test_two_ranks_give_the_losses_of_one(whole, tmp_path):
    folder = tmp_path / "two"
    run(folder, recipe="qat", torchrun=("--nproc_per_node", "2"))
    for stage in ("base", "qat"):
        assert losses(folder, stage) == pytest.approx(losses(whole[0], stage), rel=1e-3)


def test_a_missed_gate_stops_the_chain(whole, tmp_path):
    folder, _ = whole
    done = subprocess.run(
        command(folder, "export.max_relative_error=1e-12", "export.noise_factor=0", recipe="export_executorch"),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=600,
    )
    assert done.returncode == 1
    assert "gate missed" in done.stderr and "export.max_relative_error is 1e-12" in done.stderr
    assert (folder / "export" / "model.pte").is_file()  # the earlier one is still there


def test_an_untied_model_with_biases_goes_through_the_whole_chain(tmp_path):
    """Qwen2.5's form: what is trained is what runs, and the head is trained apart from the embedding."""
    folder = tmp_path / "run"
    form = ["model._component_=llamaq.model.builders.qwen2", "~model.scale_factor", "model.tie_word_embeddings=false"]
    run(folder, *form)
    for result in read_manifest(folder / "convert")["metrics"].values():
        assert result["relative_error"] == 0 and result["top1"] == 1
    exported = read_manifest(folder / "export")["metrics"]
    assert exported["hand_overs"]["pte"]["token_error"] <= 1e-4
    tensors = torch.load(folder / "convert/model/consolidated.00.pth", weights_only=True)
    assert exported["constants"] == len(tensors) and "layers.0.attention.wv.bias" in tensors
    assert not torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    trained = [load_file(folder / stage / "model.safetensors") for stage in ("qat", "qat_dpo")]
    assert all("output.weight" in weights and "layers.0.attn.q_proj.bias" in weights for weights in trained)
    assert not torch.equal(trained[0]["output.weight"], trained[1]["output.weight"])
