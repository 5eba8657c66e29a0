"""Real DeepSpeed on gloo: every ZeRO stage against one plain process, and runs that change their number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL, small
from safetensors.torch import load_file

from llamaq.config import deepspeed_settings
from llamaq.errors import UserError
from llamaq.model.build import build_model
from llamaq.quant.modules import codes_and_scales
from llamaq.quant.prepare import quantized_linears
from llamaq.quant.scheme import Scheme

STAGES = ("qat", "qat_lora", "qat_dpo")
HERE = Path(__file__).parent


def start(ranks: int, folder: Path, *overrides: str, stop_after: int = 0) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    # a compiler that does not exist: nothing may be compiled at run time
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    command = [*launcher, str(HERE / "zero_worker.py"), str(folder), str(stop_after), *overrides]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def run(ranks: int, folder: Path, *overrides: str, stop_after: int = 0) -> dict[str, list[float]]:
    """Losses of the 20 steps of each stage that was not stopped."""
    done = start(ranks, folder, *overrides, stop_after=stop_after)
    assert done.returncode == 0, done.stderr[-4000:]
    return {s: json.loads(p.read_text())["losses"] for s in STAGES if (p := folder / f"{s}.json").is_file()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(1, folder)


def codes(folder: Path, stage: str) -> torch.Tensor:
    """All integer codes the stage's weights would ship as."""
    model = small(folder / "x", "model.num_layers=2").model
    weights = build_model(model, None, Scheme(), seed=1).decoder.state_dict()
    trained = load_file(folder / f"{stage}.safetensors")
    backbone = weights | {k: v for k, v in trained.items() if ".adapter." not in k}
    decoder = build_model(model, backbone, Scheme()).decoder
    modules = [decoder.tok_embeddings, *quantized_linears(decoder).values()]
    return torch.cat([codes_and_scales(m)[0].flatten() for m in modules])  # pyright: ignore[reportArgumentType]


@pytest.mark.cluster
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_two_ranks_of_every_zero_stage_train_like_one_process(plain, tmp_path, zero):
    folder, expected = plain
    losses = run(2, tmp_path / zero, f"deepspeed.config={zero}")
    assert list(losses) == list(STAGES)
    for stage in STAGES:
        assert len(losses[stage]) == 20
        assert losses[stage] == pytest.approx(expected[stage], rel=1e-4), stage
    for stage in ("qat", "qat_dpo"):
        ours, theirs = codes(tmp_path / zero, stage), codes(folder, stage)
        assert len(ours) == len(theirs) > 100_000
        assert (ours != theirs).float().mean().item() < 1e-3, stage
    # adapters: what stage 2 trained and nothing else
    assert all(".adapter." in k for k in load_file(tmp_path / zero / "qat_lora.safetensors"))


@pytest.mark.cluster
def test_an_untied_head_and_biases_train_under_zero_3_too(tmp_path):
    form = ["model._component_=llamaq.model.builders.qwen2", "~model.scale_factor", "model.tie_word_embeddings=false"]
    one, two = run(1, tmp_path / "one", *form), run(2, tmp_path / "two", "deepspeed.config=zero3", *form)
    for stage in STAGES:
        assert two[stage] == pytest.approx(one[stage], rel=1e-4), stage
    trained = load_file(tmp_path / "two" / "qat.safetensors")
    assert "output.weight" in trained and "layers.1.attn.k_proj.bias" in trained


@pytest.mark.cluster
def test_where_no_gradient_is_clipped_the_losses_are_the_same_bits(tmp_path):
    """Only the gradient's norm is summed in another order."""
    free = [f"{s}.clip_grad_norm=100" for s in STAGES]
    assert run(2, tmp_path / "two", "deepspeed.config=zero1", *free) == run(1, tmp_path / "one", *free)


@pytest.mark.cluster
@pytest.mark.parametrize("zero, then", [("zero3", "zero3"), ("zero1", "zero3"), ("zero2_offload", "zero0")])
def test_a_run_goes_on_with_another_number_of_ranks_and_another_zero_stage(plain, tmp_path, zero, then):
    """Two ranks stop after step 8; four ranks go on to step 16, one plain process to the end."""
    expected, folder = plain[1], tmp_path / "a"
    assert run(2, folder, f"deepspeed.config={zero}", stop_after=8) == {}
    saved = folder / "qat.partial/checkpoints/step_000008"
    assert sorted(p.name for p in saved.glob("*.safetensors")) == ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert run(4, folder, f"deepspeed.config={then}", stop_after=16) == {}
    losses = run(1, folder)
    for stage in STAGES:
        assert losses[stage] == pytest.approx(expected[stage], rel=2e-4), stage


@pytest.mark.cluster
def test_three_ranks_share_four_micro_batches_and_train_alike(plain, tmp_path):
    """Two of the ranks repeat a micro-batch for nothing, so that all gather sharded parameters together."""
    losses = run(3, tmp_path / "a", "deepspeed.config=zero3", *[f"{s}.batch_size=2" for s in STAGES])
    for stage in STAGES:
        assert losses[stage] == pytest.approx(plain[1][stage], rel=1e-3), stage


@pytest.mark.cluster
def test_recomputed_blocks_and_bf16_train_under_zero_3(plain, tmp_path):
    recomputed = run(2, tmp_path / "a", "deepspeed.config=zero3", "activation_checkpointing=true")
    bf16 = run(2, tmp_path / "b", "deepspeed.config=zero3", "dtype=bf16")
    plain_bf16 = run(1, tmp_path / "c", "dtype=bf16")
    for stage in STAGES:
        assert recomputed[stage] == pytest.approx(plain[1][stage], rel=1e-4)
        assert bf16[stage] == pytest.approx(plain_bf16[stage], rel=5e-3)


@pytest.mark.cluster
def test_too_many_ranks_is_an_error_that_says_what_to_change(tmp_path):
    done = start(3, tmp_path / "a", "qat.global_batch_size=2", "qat.batch_size=1")
    assert done.returncode != 0
    assert "3 ranks, but qat.global_batch_size=2: some would have nothing to do" in done.stderr


def test_deepspeed_settings_are_the_files_with_the_runs_over_them(tmp_path):
    c = small(tmp_path / "a", "deepspeed.config=zero2", "deepspeed.settings.zero_optimization.reduce_bucket_size=7")
    zero = deepspeed_settings(c)["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["contiguous_gradients"]) == (2, 7, True)
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 3}}')
    assert deepspeed_settings(small(tmp_path / "b", f"deepspeed.config={own}"))["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize(
    "override, message",
    [
        ("deepspeed.config=zero9", "neither a file nor one of zero0, zero1"),
        ("deepspeed.settings.zero_optimisation.stage=1", "unknown setting; did you mean zero_optimization"),
        ("deepspeed.settings.train_batch_size=8", "llamaq sets it, from global_batch_size"),
        ("deepspeed.settings.bf16.enabled=true", "llamaq sets it, from dtype"),
        ("engine=fsdp", "engine=fsdp: choose auto, torch or deepspeed"),
    ],
)
def test_settings_that_deepspeed_would_ignore_are_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        small(tmp_path / "a", override)


def test_a_wrong_zero_setting_is_named_by_deepspeeds_own_check(tmp_path):
    from llamaq.train.deepspeed import check_deepspeed

    c = small(tmp_path / "a", "deepspeed.settings.zero_optimization.stage_four=1")
    with pytest.raises(UserError, match=r"zero_optimization\.stage_four"):
        check_deepspeed(c, "cpu")


def test_the_model_of_the_tests_has_what_zero_3_must_get_right():
    model = build_model(MODEL, None, Scheme())
    names = [n for n, _ in model.named_parameters()]
    assert "decoder.tok_embeddings.weight" in names and not any("head" in n for n in names)  # tied
