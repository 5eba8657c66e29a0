"""What a run says it needs: for the released sizes, and beside what real processes take."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from llamaq.config import load
from llamaq.model.shape import shape_of
from llamaq.plan.disk import disk_bytes
from llamaq.plan.memory import GIB, Requirement, export_bytes, phone_bytes, stage_bytes, state_plan

WEIGHTS = {"1B": 1_235_814_400, "3B": 3_212_749_824}  # as published, the tied matrix counted once


@pytest.mark.parametrize("size", ["1B", "3B"])
def test_plan_of_the_released_sizes(size, tmp_path, monkeypatch):
    plenty = namedtuple("plenty", "free")(10**12)  # this machine's disk is not what is tested
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    config = load(f"llama3_2/{size}_qat_lora_dpo", [f"output_dir={tmp_path}/run", "device=cpu"])
    shape = shape_of(config.model)
    assert shape.weights == WEIGHTS[size]
    qat, lora, dpo = (
        stage_bytes(shape, getattr(config, kind), config, 2048, kind) for kind in ("qat", "qat_lora", "qat_dpo")
    )
    adapters = shape.adapters_per_rank * 16
    assert adapters == {"1B": 11_272_192, "3B": 24_313_856}[size]
    assert qat["weights"] + qat["gradients and optimizer"] == 16 * WEIGHTS[size]  # float32 and Adam's two moments
    assert lora["weights"] == pytest.approx(WEIGHTS[size] + 4 * adapters, rel=1e-3)  # a byte a code
    assert lora["gradients and optimizer"] == 12 * adapters
    assert sum(lora.values()) < 0.5 * sum(qat.values()) < sum(dpo.values())
    plan = state_plan(config, 2048)
    assert f"{WEIGHTS[size] / 1e6:,.1f} M parameters" in plan and plan.count("GiB") == 7
    assert disk_bytes(shape, config) > 10 * GIB


def test_recomputed_blocks_need_less(tmp_path):
    plans = []
    for value in ("true", "false"):
        config = load("llama3_2/1B_qat_lora_dpo", [f"output_dir={tmp_path}", f"activation_checkpointing={value}"])
        plans.append(stage_bytes(shape_of(config.model), config.section("qat"), config, 2048, "qat"))
    assert plans[0]["activations"] < 0.5 * plans[1]["activations"]
    assert plans[0]["quantized copies"] < plans[1]["quantized copies"]


SHAPE = [
    f"model.{size}"
    for size in (
        "vocab_size=8192",
        "num_layers=6",
        "embed_dim=512",
        "intermediate_dim=2048",
        "num_heads=8",
        "num_kv_heads=2",
        "max_seq_len=1024",
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "recompute"),
    [
        ("qat", "fp32", False),
        ("qat", "bf16", True),
        ("qat_lora", "fp32", False),
        ("qat_lora", "bf16", True),
        ("qat_dpo", "bf16", False),
        ("qat_dpo", "fp32", True),
    ],
)
def test_a_training_stage_takes_what_was_planned(kind, dtype, recompute):
    script = Path(__file__).with_name("memory_probe.py")
    settings = [*SHAPE, f"dtype={dtype}", f"activation_checkpointing={recompute}".lower()]
    done = subprocess.run(
        [sys.executable, script, kind, "4", "512", *settings],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["planned"] == pytest.approx(result["measured"], rel=0.15), result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qat_lora", ["export.max_seq_length=512", "export.max_context_length=1024"]),
        ("qat", ["export.max_seq_length=128", "export.max_context_length=4096", "export.quantize_kv_cache=true"]),
    ],
    ids=["qat_lora", "int8_cache"],
)
def test_export_and_phone_take_what_was_planned(kind, more, tmp_path):
    script = Path(__file__).parent.parent / "export" / "memory_probe.py"
    shape = [
        "vocab_size=32768",
        "num_layers=2",
        "embed_dim=1024",
        "intermediate_dim=4096",
        "num_heads=16",
        "num_kv_heads=8",
    ]
    command = [sys.executable, script, str(tmp_path), kind, *(f"model.{s}" for s in shape), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for what, result in json.loads(done.stdout.splitlines()[-1]).items():
        assert result["planned"] == pytest.approx(result["measured"], rel=0.15), (what, result)


def test_what_is_too_much_is_said_with_the_way_out():
    line = str(Requirement("qat", "cuda:0", {"weights": 30 * GIB}, 24 * GIB, "lower batch_size"))
    assert "about  30.00 GiB of 24.0 on cuda:0" in line and line.endswith("MORE THAN THERE IS: lower batch_size")
    assert "MORE" not in str(Requirement("model.pte", "the phone", {"weights": 30 * GIB}))


def test_phone_and_export_of_1b():
    """Beside what the files of tests/benchmarks/device_table.py took: MiB above Python's own, GiB to export one."""
    c = load("llama3_2/1B_qat_lora_dpo", ["output_dir=/tmp/none"])
    shape = shape_of(c.model)
    phone = {adapters: sum(phone_bytes(shape, c, adapters).values()) / 2**20 for adapters in (False, True)}
    assert phone == pytest.approx({False: 1462, True: 1540}, rel=0.02)
    assert sum(export_bytes(shape, c).values()) / GIB == pytest.approx(7.3, rel=0.05)
