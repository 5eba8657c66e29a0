"""The range of every number in a config: what lies outside is refused by one line, and what lies inside on purpose."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any

import pytest

from llamaq.config import Config, load, packaged_configs
from llamaq.errors import UserError

VALUES = {"-1": "-1", "0": "0", "nan": "nan", "inf": "inf", "huge": "1000000000000000000"}
TRAINING = {
    "epochs": ["huge"],  # `max_steps` ends it, or the user
    "max_steps": ["huge"],  # the epochs end it
    "clip_grad_norm": ["huge"],  # clips nothing
    "checkpoint_every_n_steps": ["huge"],  # none at all
    "keep_checkpoints": ["huge"],  # all; the plan of the disk says whether they fit
    "distill_weight": ["0"],
    "batch_size": [],  # has to divide global_batch_size
    "global_batch_size": [],
}
# what is accepted of VALUES; where a number means "at most", a huge one means "all there is"
ACCEPTED = {
    **{f"{stage}.{key}": kept for stage in ("base", "qat", "qat_lora", "qat_dpo") for key, kept in TRAINING.items()},
    "spinquant.calibration.0.num_samples": ["huge"],  # the text ends it, with an error that counts the windows
    "spinquant.num_selection": ["huge"],
    "spinquant.batch_size": ["huge"],
    "spinquant.num_seeds": [],
    "spinquant.steps": ["huge"],
    "spinquant.lr": ["huge"],
    "spinquant.rows": ["huge"],
    "spinquant.refine_steps": ["0", "huge"],
    "spinquant.refine_lr": ["huge"],
    "spinquant.damping": ["huge"],
    "spinquant.polish_steps": ["0", "huge"],
    "spinquant.polish_lr": ["huge"],
    "scheme.group_size": [],
    "adapters.rank": [],
    "adapters.alpha": [],
    "export.max_seq_length": [],
    "export.max_context_length": ["huge"],  # preflight holds it against the model
    "export.max_new_tokens": ["0"],
    "export.gate_tokens": ["huge"],
    "export.max_relative_error": ["0", "inf", "huge"],  # infinity turns a gate off
    "export.max_kl": ["0", "inf", "huge"],
    "export.noise_factor": ["0", "inf", "huge"],
    "export.min_top1_agreement": ["0"],
    "evaluate.batch_size": ["huge"],
    "evaluate.max_samples": ["huge"],
    "evaluate.file_tokens": ["huge"],
    "evaluate.sensitivity_samples": ["0", "huge"],
    "evaluate.task_limit": ["huge"],
    "evaluate.num_fewshot": ["0", "huge"],
    "evaluate.speed_prompt_tokens": [],
    "evaluate.speed_new_tokens": [],
    "evaluate.threads": [],
    "chat.max_new_tokens": ["huge"],
    "chat.temperature": ["0", "huge"],
    "chat.seed": ["0", "huge"],
    "seed": ["0"],
}


def numbers(schema: Any, prefix: str = "") -> Iterator[str]:
    """The full names of all settings that hold a number, of list items those of the first."""
    for f in fields(schema):
        is_list = getattr(f.type, "__origin__", None) is list
        kinds = getattr(f.type, "__args__") if is_list or isinstance(f.type, UnionType) else (f.type,)  # noqa: B009
        for kind in kinds:
            if kind in (int, float):
                yield prefix + f.name
            elif is_dataclass(kind):
                yield from numbers(kind, f"{prefix}{f.name}{'.0' * is_list}.")


def config_with(setting: str) -> str:
    return "tiny_spinquant" if setting.startswith("spinquant") else "tiny"


def test_the_table_has_every_number():
    assert set(numbers(Config)) == set(ACCEPTED)


@pytest.mark.parametrize("setting", ACCEPTED)
def test_a_number_out_of_range_is_refused_by_one_line_that_names_it(setting):
    for name, value in VALUES.items():
        if name in ACCEPTED[setting]:
            load(config_with(setting), [f"{setting}={value}"])
            continue
        with pytest.raises(UserError) as e:
            load(config_with(setting), [f"{setting}={value}"])
        assert setting.rsplit(".", 1)[-1] in str(e.value) and "\n" not in str(e.value), (name, e.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("qat.clip_grad_norm=0", "qat.clip_grad_norm=0.0: must be above 0 (0 would keep every weight"),
        ("base.clip_grad_norm=-1", "null turns it off"),
        ("qat.optimizer.lr=-1e-4", "qat.optimizer.lr=-0.0001: must be a number, 0 or more"),
        ("qat_lora.optimizer.lr=nan", "qat_lora.optimizer.lr=nan: must be a finite number"),
        ("qat_dpo.optimizer.lr=.inf", "qat_dpo.optimizer.lr=inf: must be a finite number"),
        ("qat.optimizer.lr=fast", "qat.optimizer.lr=fast: must be a number"),
        ("qat.optimizer.weight_decay=-0.1", "qat.optimizer.weight_decay=-0.1: must be a number, 0 or more"),
        ("qat.optimizer.betas=[0.9,.nan]", "qat.optimizer.betas.1=nan: must be a finite number"),
        ("qat.lr_scheduler.num_warmup_steps=-3", "qat.lr_scheduler.num_warmup_steps=-3: must be a number, 0 or more"),
        ("qat.lr_scheduler.num_cycles=inf", "qat.lr_scheduler.num_cycles=inf: must be a finite number"),
        ("qat_dpo.loss.beta=0", "qat_dpo.loss.beta=0: must be a number above 0"),
        ("qat_dpo.loss.label_smoothing=-1", "qat_dpo.loss.label_smoothing=-1"),
        ("qat_dpo.distill_weight=0.5", "qat_dpo.distill_weight=0.5: only qat and qat_lora distill"),
        ("base.distill_weight=0.5", "base.distill_weight=0.5: only qat and qat_lora distill"),
        ("qat_dpo.dataset.data_files=[]", "qat_dpo.dataset.data_files=[]: names no file"),
        ("evaluate.dataset.data_files=", "evaluate.dataset.data_files=None: names no file"),
        ("evaluate.models=[]", "evaluate.models=[]: names no model; null measures them all"),
        ("export.max_new_tokens=255", "export.max_new_tokens=255 leaves no room for a prompt"),
        ("export.min_top1_agreement=1.01", "export.min_top1_agreement=1.01: must be between 0 and 1"),
        ("export.max_kl=-1e-3", "export.max_kl=-0.001: must be 0 or more"),
        ("evaluate.speed_new_tokens=200", "do not fit into export.max_context_length=256"),
        ("device=cuda:x", "device=cuda:x: choose auto, cpu or cuda"),
        ("seed=4294967296", "seed=4294967296: must be between 0 and 4294967295"),
        ("output_dir=", "output_dir is empty"),
        ("model.num_layers=0", "model.num_layers=0: must be a number above 0"),
        ("model.rope_base=-1", "model.rope_base=-1: must be a number above 0"),
        ("tokenizer.max_seq_len=1", "tokenizer.max_seq_len=1: must be at least 2"),
        ("tokenizer.max_seq_len=9.5", "tokenizer.max_seq_len=9.5: must be at least 2"),
        ("corpus.num_pairs=0", "corpus.num_pairs=0: must be a number above 0"),
        ("deepspeed.settings.zero_optimization.stage=4", "zero_optimization.stage=4: choose 0, 1, 2 or 3"),
        ("deepspeed.settings.zero_optimization.reduce_bucket_size=-5", "reduce_bucket_size=-5: must be a number above"),
        ("deepspeed.settings.zero_optimization=3", "zero_optimization=3: it is a section"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_fix(override, message):
    with pytest.raises(UserError) as e:
        load("tiny", [override])
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_list_that_names_nothing_is_refused():
    with pytest.raises(UserError, match=r"spinquant.candidates=\[\]: names no rotation"):
        load("tiny_spinquant", ["spinquant.candidates=[]", "spinquant.force=none"])


def test_what_turns_a_thing_off_is_accepted():
    off = ["qat.clip_grad_norm=null", "export.max_kl=inf", "qat.optimizer.lr=0", "export.max_new_tokens=0"]
    config = load("tiny", [*off, "tokenizer.max_seq_len=null", "evaluate.models=null"])
    assert config.section("qat").clip_grad_norm is None and config.export.max_kl == math.inf


def test_deepspeed_settings_have_to_be_an_object(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match=r"list.json holds no settings: it has to be a JSON object"):
        load("tiny", [f"deepspeed.config={tmp_path}/list.json"])


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_is_in_range(name):
    load(name)
