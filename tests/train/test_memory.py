"""What a run says it needs, for the released sizes."""

import shutil
from collections import namedtuple

import pytest

from llamaq.config import load
from llamaq.train.memory import GIB, disk_bytes, shape_of, stage_bytes, state_plan

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
    assert f"{WEIGHTS[size] / 1e6:,.1f} M parameters" in plan and plan.count("GiB") == 4
    assert disk_bytes(shape, config) > 10 * GIB


def test_recomputed_blocks_need_less(tmp_path):
    plans = []
    for value in ("true", "false"):
        config = load("llama3_2/1B_qat_lora_dpo", [f"output_dir={tmp_path}", f"activation_checkpointing={value}"])
        plans.append(stage_bytes(shape_of(config.model), config.training("qat"), config, 2048, "qat"))
    assert plans[0]["activations"] < 0.5 * plans[1]["activations"]
    assert plans[0]["quantized copies"] < plans[1]["quantized copies"]
