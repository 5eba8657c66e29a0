"""Help on settings: every field has a text, docs/settings.md is current, and `tune run RECIPE --help` shows them."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from llamaq.cli import RECIPES, _help_asked_for
from llamaq.config import Config, TrainingConfig, load
from llamaq.config.arguments import help_text
from llamaq.config.describe import sections
from llamaq.config.help import WIDTH, markdown
from llamaq.errors import UserError

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent.parent
SETTINGS = [s for section in sections() for s in section.settings]


def tune(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "tune", *arguments], capture_output=True, text=True, cwd=cwd, timeout=60)


# --- the texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.path)
def test_every_setting_says_what_it_does(setting):
    assert len(setting.text.split()) >= 3 and setting.text.endswith((".", ".)")), setting.text


def test_every_section_says_what_it_is_for():
    assert all(len(section.text.split()) >= 3 for section in sections())


def test_no_setting_is_left_out():
    paths = {s.path for s in SETTINGS}
    assert {f"qat.{f.name}" for f in fields(TrainingConfig)} <= paths
    assert {"qat_dpo.loss", "qat_dpo.batch_size", "spinquant.calibration.N.num_samples", "seed"} <= paths
    names = {f.name for f in fields(Config)}
    assert names == {path.split(".")[0] for path in paths}


def test_settings_with_a_component_are_told_apart_from_other_dicts():
    components = {s.path for s in SETTINGS if s.is_component}
    assert {"model", "qat.lr_scheduler", "qat_dpo.loss", "spinquant.calibration.N.dataset"} <= components
    assert components.isdisjoint({"export.adapters", "deepspeed.settings", "evaluate.tasks"})


def test_the_page_of_settings_is_current():
    made = "python -m llamaq.config.help > docs/settings.md"
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == markdown(), f"run {made}"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe_needs_no_config(recipe):
    done = tune("run", recipe, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"tune run {recipe} --config" in done.stdout  # from the recipe's docstring
    assert "group_size [32]" in done.stdout and "output_dir [required]" in done.stdout
    assert "Weights that share one int4 scale" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= WIDTH


def test_help_works_from_any_folder_and_with_torchrun_options(tmp_path):
    done = tune("run", "--nproc_per_node", "2", "--standalone", "qat", "--help", "qat.optimizer", cwd=tmp_path)
    assert done.returncode == 0 and "torch.optim.AdamW" in done.stdout and "`_component_` names" in done.stdout


HELP_AND_WHAT_IT_LOADED = """
import contextlib, sys
from llamaq.cli import main
sys.argv = ["tune", "run", "qat", "--help"]
with contextlib.suppress(SystemExit):
    main()
print([name for name in ("torch", "torchtune", "torchao", "datasets") if name in sys.modules])
"""


def test_help_loads_nothing_heavy():
    said = subprocess.check_output([sys.executable, "-c", HELP_AND_WHAT_IT_LOADED], text=True)
    assert "group_size" in said and said.splitlines()[-1] == "[]"


def test_help_of_torchtunes_own_is_torchtunes():
    for words in (
        ["run", "--help"],
        ["run", "full_finetune_distributed", "--help"],
        ["run", "--nnodes", "1", "mine", "qat", "--help"],
        ["run", "qat", "--config", "tiny"],
        ["cp", "qat", "--help"],
    ):
        assert _help_asked_for(words) is None, words
    assert _help_asked_for(["run", "--standalone", "qat", "-h"]) == ("qat", ["-h"])


# --- a part of it ----------------------------------------------------------------------------------------------------


def helped(*words: str) -> str:
    return help_text([*words, "--help"], "usage")


def test_a_section_a_setting_or_the_beginning_of_a_name():
    export = helped("export")
    assert "export.max_seq_length [512]" in export and "several calls" in export and "qat." not in export
    assert helped("spinquant.steps").splitlines()[0] == "spinquant.steps [300]"
    assert helped("spinquant.steps", "seed").count("[") == 2
    speed = helped("evaluate.speed_")
    assert "evaluate.speed_prompt_tokens [64]" in speed and "evaluate.speed [true]" not in speed


def test_arguments_of_components_and_items_of_lists_lead_to_their_setting():
    assert helped("qat.optimizer.lr").startswith("qat.optimizer [required]")
    assert helped("deepspeed.settings.zero_optimization.stage").startswith("deepspeed.settings {}")
    for topic in ("spinquant.calibration.0.num_samples", "spinquant.calibration[2].num_samples"):
        assert helped(topic).startswith("spinquant.calibration.N.num_samples [128]")


@pytest.mark.parametrize(
    "topic, near",
    [
        ("qat.optimiser", "did you mean qat.optimizer?"),
        ("group_size", "did you mean scheme.group_size?"),
        ("spinquamt", "did you mean spinquant?"),
        ("xyz", "sections: base, qat"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(topic, near):
    with pytest.raises(UserError) as e:
        helped(topic)
    assert f"--help {topic}: there is no setting" in str(e.value) and near in str(e.value)


def test_an_unknown_name_ends_the_command_with_one_line():
    done = tune("run", "qat", "--help", "qat.optimiser")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: --help qat.optimiser") and done.stderr.count("\n") == 1


def test_with_a_config_its_values_are_shown():
    said = helped("--config", "tiny", "qat.max_steps=7", "qat")
    assert "qat.max_steps [7], default null" in said and "qat.epochs [1]\n" in said
    assert "qat.optimizer [AdamW]" in said and "lr: 0.001" in said
    whole = helped("--config", "tiny")
    assert "max_seq_length [128]" in whole and "(default: 512)" in whole and "spinquant.*" not in whole
    assert "calibration [chat_dataset]" in helped("--config", "tiny_spinquant")
    with pytest.raises(UserError, match=r"did you mean qat\.epochs"):
        helped("--config", "tiny", "qat.epoch=3")


def test_defaults_can_be_written_as_they_are_shown():
    shown = {s.path: s.default for s in SETTINGS}
    config = load("tiny", ["qat.max_steps=null", "evaluate.tasks=[]", "evaluate.control=true"])
    assert config.section("qat").max_steps is shown["qat.max_steps"] is None
    assert config.evaluate.tasks == shown["evaluate.tasks"] and config.evaluate.control is shown["evaluate.control"]


def test_help_into_a_pipe_that_is_closed_ends_without_a_traceback():
    command = f"{BIN / 'tune'} run qat --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Stage 1, QAT") and done.stderr == ""
