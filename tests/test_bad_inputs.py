"""What a user gets wrong, through the recipes' own main: one line that names the setting and the fix, exit 1."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from llamaq.data.corpus import write_jsonl
from llamaq.recipes.qat import recipe
from llamaq.runs.main import main


def outcome(monkeypatch, capsys, *arguments: str) -> tuple[int, list[str]]:
    """Exit status and the lines of standard error of `tune run qat …`, in this process."""
    monkeypatch.setattr(sys, "argv", ["qat.py", *arguments])
    with pytest.raises(SystemExit) as e:
        main(recipe, "usage")
    assert isinstance(e.value.code, int)
    return e.value.code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


CASES = {
    # settings
    "unknown key": (["qat.optimiser.lr=1"], "unknown setting 'qat.optimiser'; did you mean qat.optimizer?"),
    "unknown section": (["qad.lr=1"], "unknown setting 'qad'; did you mean qat?"),
    "wrong type": (["qat.max_steps=many"], "qat.max_steps"),
    "no equals sign": (["qat.max_steps"], "neither --config nor key=value"),
    "a dashed option": (["--output_dir"], "settings are given as key=value"),
    "nothing to delete": (["~qat.warmup"], "no such setting to delete"),
    "dtype": (["dtype=fp16"], "dtype=fp16: choose bf16 or fp32"),
    "device": (["device=tpu"], "device=tpu: choose auto, cpu or cuda"),
    "group size ExecuTorch lacks": (["scheme.group_size=48"], "scheme.group_size=48: ExecuTorch takes"),
    "group that does not divide": (["scheme.group_size=128"], "64 inputs, which scheme.group_size=128 does not divide"),
    "rank 1": (["adapters.rank=1"], "adapters.rank=1"),
    "a scale ExecuTorch cannot have": (["adapters.alpha=48"], "choose alpha = 2 · rank"),
    "zero steps": (["qat.max_steps=0"], "qat.max_steps=0: must be at least 1"),
    "batch does not divide": (["qat.batch_size=3"], "qat.global_batch_size=8 is not a multiple of qat.batch_size=3"),
    "no component": (["~qat.optimizer._component_"], "qat.optimizer has no _component_"),
    "no such component": (["qat.optimizer._component_=torch.optim.Adamw"], "qat.optimizer._component_=torch.optim.Ada"),
    "argument it does not take": (["qat.optimizer.learning_rate=1"], "qat.optimizer: torch.optim.AdamW was called"),
    "context below sequence": (["export.max_context_length=64"], "is below export.max_seq_length"),
    "a word ExecuTorch stumbles over": (["output_dir=/tmp/my-int8-run"], "contains 'int8'"),
    "gradients clipped to nothing": (["qat.clip_grad_norm=0"], "qat.clip_grad_norm=0.0: must be above 0"),
    "a rate that climbs": (["qat.optimizer.lr=-1e-3"], "qat.optimizer.lr=-0.001: must be a number, 0 or more"),
    "an optimizer with a closure": (
        ["qat.optimizer._component_=torch.optim.LBFGS", "~qat.optimizer.weight_decay"],
        "qat.optimizer: torch.optim.LBFGS takes a closure",
    ),
    "only a warm-up": (["qat_lora.max_steps=4"], "num_warmup_steps=5, but qat_lora has only 4 steps"),
    "distillation in DPO": (["qat_dpo.distill_weight=0.1"], "qat_dpo.distill_weight=0.1: only qat and qat_lora"),
    "samples longer than the model": (["tokenizer.max_seq_len=4096"], "is above the model's max_seq_len=512"),
    "a prompt without room": (["export.max_new_tokens=250"], "leaves room for 5 beside export.max_new_tokens=250"),
    "a gate that nothing passes": (["export.max_kl=-1"], "export.max_kl=-1.0: must be 0 or more"),
    "sizes that make no model": (["model.num_kv_heads=3"], "cannot build a model of these sizes"),
    "a folder nobody can write to": (["output_dir=/proc/llamaq"], "output_dir=/proc/llamaq cannot be used"),
    "wandb mode": (["wandb.mode=cloud"], "wandb.mode=cloud: choose online, offline or disabled"),
    # files
    "no data file": (["qat.dataset.data_files=/nowhere.jsonl"], "qat.dataset.data_files=/nowhere.jsonl: no such"),
    "no file of the last stage": (["qat_dpo.dataset.data_files=/no.jsonl"], "qat_dpo.dataset.data_files=/no.jsonl"),
    "no held-out text": (["evaluate.dataset.data_files=/no.jsonl"], "evaluate.dataset.data_files=/no.jsonl: no such"),
    "argument of the loss": (["qat_dpo.loss.gamma=1"], "qat_dpo.loss: torchtune.rlhf.loss.DPOLoss was called with"),
    "no tokenizer": (["tokenizer.path=/nowhere.model"], "tokenizer.path=/nowhere.model: no such file"),
    "no checkpoint folder": (["~base", "checkpoint_dir=/nowhere"], "checkpoint_dir=/nowhere is not a folder"),
    "vocabulary smaller than the tokenizer": (["model.vocab_size=512"], "the model only 512 rows"),
}


@pytest.mark.parametrize("overrides, message", CASES.values(), ids=CASES.keys())
def test_bad_settings(overrides, message, tmp_path, monkeypatch, capsys):
    arguments = ["--config", "tiny", *SMALL, f"output_dir={tmp_path / 'run'}", *overrides]
    code, errors = outcome(monkeypatch, capsys, *arguments)
    assert code == 1 and len(errors) == 1 and message in errors[0], errors


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"messages": [}\n', "line 1 is not valid JSON"),
        ("", "is empty"),
        ("[]", "qat.dataset: the dataset is empty"),
    ],
)
def test_bad_data_files(content, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text(content)
    code, errors = outcome(
        monkeypatch,
        capsys,
        "--config",
        "tiny",
        *SMALL,
        f"output_dir={tmp_path / 'run'}",
        f"qat.dataset.data_files={tmp_path / 'data.jsonl'}",
    )
    assert code == 1 and len(errors) == 1 and message in errors[0], errors


def test_a_tokenizer_that_is_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "tokenizer.model").write_text("not base64 at all\n")
    code, errors = outcome(
        monkeypatch,
        capsys,
        "--config",
        "tiny",
        *SMALL,
        f"output_dir={tmp_path / 'run'}",
        f"tokenizer.path={tmp_path / 'tokenizer.model'}",
    )
    assert code == 1 and "not a tokenizer of this kind" in errors[0]


def test_configs_that_do_not_exist_or_are_not_yaml(tmp_path, monkeypatch, capsys):
    code, errors = outcome(monkeypatch, capsys, "--config", "llama3_2/1B_qat_lora_dop")
    assert code == 1 and "did you mean llama3_2/1B_qat_lora_dpo?" in errors[0]
    (tmp_path / "bad.yaml").write_text("qat: [")
    assert "is not valid YAML" in outcome(monkeypatch, capsys, "--config", str(tmp_path / "bad.yaml"))[1][0]
    assert "--config is required" in outcome(monkeypatch, capsys)[1][0]
    (tmp_path / "short.yaml").write_text("output_dir: x\n")
    code, errors = outcome(monkeypatch, capsys, "--config", str(tmp_path / "short.yaml"))
    assert code == 1 and "is required and has no value" in errors[0]


def test_all_pairs_too_long_and_a_device_that_is_not_there(tmp_path, monkeypatch, capsys):
    if not torch.cuda.is_available():
        code, errors = outcome(
            monkeypatch, capsys, "--config", "tiny", *SMALL, f"output_dir={tmp_path / 'run'}", "device=cuda"
        )
        assert code == 1 and "PyTorch sees no GPU; use device=cpu or auto" in errors[0]


def test_no_room_on_the_disk_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    code, errors = outcome(monkeypatch, capsys, "--config", "tiny", *SMALL, f"output_dir={tmp_path / 'run'}")
    assert code == 1 and "use another disk" in errors[0]
    assert not (tmp_path / "run" / "base").exists()


@pytest.mark.parametrize(
    "recipe_name, config, missing, instead",
    [
        (
            "qat",
            "tiny_spinquant",
            "qat",
            "llama, llama3_2/1B_qat_lora_dpo, llama3_2/3B_qat_lora_dpo, reference, sm",
        ),
        ("spinquant", "tiny", "spinquant", "reference_spinquant, smollm2/135M_spinquant, tiny_spinquant"),
        ("qat_lora_dpo", "tiny_spinquant", "qat", "reference, smollm2/135M_qat_lora_dpo, tiny"),
        ("export_executorch", "tiny_spinquant", "qat", "reference, smollm2/135M_qat_lora_dpo, tiny"),
        ("qat_lora", "tiny -qat_lora", "qat_lora", "reference, smollm2/135M_qat_lora_dpo, tiny"),
        ("qat_dpo", "tiny -qat_dpo", "qat_dpo", "reference, smollm2/135M_qat_lora_dpo, tiny"),
        ("qat_lora_dpo", "tiny -qat_dpo", "qat_dpo", "reference, smollm2/135M_qat_lora_dpo, tiny"),
        ("evaluate", "tiny -qat_lora", "qat_lora", ""),
    ],
)
def test_a_recipe_says_at_once_which_section_is_missing(
    recipe_name, config, missing, instead, tmp_path, monkeypatch, capsys
):
    import runpy

    name, *without = config.split()
    arguments = ["--config", name, "wandb.mode=disabled", f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", [recipe_name, *arguments, *(w.replace("-", "~") for w in without)])
    with pytest.raises(SystemExit) as e:
        runpy.run_module(f"llamaq.recipes.{recipe_name}", run_name="__main__")
    errors = capsys.readouterr().err.splitlines()
    assert e.value.code == 1 and len(errors) == 1 and f"section '{missing}'" in errors[0], errors
    assert instead in errors[0]
    assert recipe_name == "evaluate" or not (tmp_path / "run").exists()


def test_help_lists_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qat.py", "--help"])
    with pytest.raises(SystemExit) as e:
        main(recipe, "usage of it")
    said = capsys.readouterr().out
    assert e.value.code == 0 and "usage of it" in said
    assert "group_size [32]" in said and "max_relative_error [0.0001]" in said and "output_dir [required]" in said


def test_a_config_of_ones_own(tmp_path):
    from omegaconf import OmegaConf

    from llamaq.config import load, packaged_configs

    raw = OmegaConf.load(packaged_configs()["tiny"])
    OmegaConf.update(raw, "qat.max_steps", 3)
    OmegaConf.save(raw, tmp_path / "mine.yaml")
    config = load(str(tmp_path / "mine.yaml"), ["output_dir=elsewhere"])
    assert config.section("qat").max_steps == 3 and config.checkpoint_dir == "elsewhere/base/model"
    assert json.dumps(config.model) and Path(config.output_dir).name == "elsewhere"
    write_jsonl(tmp_path / "x.jsonl", [{"a": "ü"}])
    assert (tmp_path / "x.jsonl").read_text() == '{"a": "ü"}\n'
