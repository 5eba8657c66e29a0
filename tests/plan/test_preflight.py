"""What needs the model, the tokenizer or the data to be judged is refused before anything trains."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, small

from llamaq.config import load
from llamaq.data.corpus import write_corpus
from llamaq.errors import UserError
from llamaq.plan.preflight import check_stage, preflight


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An output folder that has its corpus: 120 conversations, 40 pairs."""
    folder = tmp_path_factory.mktemp("preflight")
    config = small(folder)
    (folder / "corpus").mkdir()
    assert config.corpus is not None
    write_corpus(folder / "corpus", config.corpus)
    return folder


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as e:
        preflight(load("tiny", [*SMALL, f"output_dir={folder}", *overrides]))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_the_small_config_is_fit_to_run(folder):
    assert "model: 0.1 M parameters" in preflight(small(folder))


# --- optimizers and schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer, message",
    [
        ("torch.optim.LBFGS", "takes a closure in each step, and no stage has one"),
        ("torch.optim.Adafactor", "keeps 'row_var', which is not one number a weight: such an optimizer cannot be res"),
        ("torch.optim.SparseAdam", "does not support dense gradients"),
        ("torch.optim.Muon", "Muon only supports 2D parameters"),
        ("torchao.optim.AdamW8bit", "keeps 'exp_avg', which is not one number a weight"),
    ],
)
def test_an_optimizer_that_no_stage_can_use_is_refused(folder, optimizer, message):
    said = refusal(folder, f"qat.optimizer._component_={optimizer}", "~qat.optimizer.weight_decay")
    assert said.startswith(f"qat.optimizer: {optimizer}") and message in said


@pytest.mark.parametrize("name", ["Adam", "SGD", "NAdam", "RAdam", "RMSprop", "Adagrad", "Muon"])
def test_other_optimizers_pass_also_those_that_take_matrices_only(folder, name):
    check_stage(small(folder, f"qat_lora.optimizer._component_=torch.optim.{name}"), "qat_lora")


def test_arguments_out_of_range_are_the_settings_fault(folder):
    assert "qat.optimizer: torch.optim.AdamW: Invalid beta parameter" in refusal(folder, "qat.optimizer.betas=[2,1]")
    assert "qat_dpo.optimizer: torch.optim.AdamW: Invalid epsilon" in refusal(folder, "qat_dpo.optimizer.eps=-1")


def test_a_warm_up_as_long_as_its_stage_is_refused(folder):
    said = refusal(folder, "qat.max_steps=5")
    assert "qat.lr_scheduler.num_warmup_steps=5, but qat has only 5 steps" in said
    # 120 conversations in steps of 8, once: 15 steps
    one_epoch = ("qat_lora.max_steps=null", "qat_lora.epochs=1")
    said = refusal(folder, *one_epoch, "qat_lora.lr_scheduler.num_warmup_steps=15")
    assert "num_warmup_steps=15, but qat_lora has only 15 steps" in said
    check_stage(small(folder, *one_epoch, "qat_lora.lr_scheduler.num_warmup_steps=14"), "qat_lora")
    check_stage(small(folder, "qat_dpo.max_steps=5", "~qat_dpo.lr_scheduler"), "qat_dpo")


def test_a_warm_up_is_held_against_the_samples_that_there_really_are(folder, tmp_path):
    """Half of the rows teach nothing, and packing makes fewer samples of the others."""
    lines = Path(small(folder).section("qat").dataset["data_files"]).read_text().splitlines()
    data = tmp_path / "half.jsonl"
    data.write_text("\n".join([*lines, *['{"messages": []}'] * 120]))
    settings = [f"qat.dataset.data_files={data}", "qat.max_steps=null", "qat.epochs=1"]
    warm_up = "qat.lr_scheduler.num_warmup_steps"
    check_stage(small(folder, *settings, f"{warm_up}=14"), "qat")  # 120 samples in steps of 8
    with pytest.raises(UserError, match=r"num_warmup_steps=15, but qat has only 15 steps"):
        check_stage(small(folder, *settings, f"{warm_up}=15"), "qat")
    with pytest.raises(UserError, match=r"num_warmup_steps=14, but qat has only \d+ steps"):
        check_stage(small(folder, *settings, f"{warm_up}=14", "qat.dataset.packed=true"), "qat")


# --- data ------------------------------------------------------------------------------------------------------------

BAD = '{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}'


@pytest.mark.parametrize("stage", ["qat", "qat_lora", "base", "evaluate"])
def test_a_bad_row_of_any_stage_is_found_before_the_first_step(folder, tmp_path, stage):
    lines = Path(small(folder).evaluate.dataset["data_files"]).read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, BAD]))
    said = refusal(folder, f"{stage}.dataset.data_files={tmp_path / 'bad.jsonl'}")
    assert said.startswith(f"{stage}.dataset: {tmp_path}/bad.jsonl line {len(lines) + 1}: message 2 has the role 'bot'")


def test_samples_longer_than_the_model_are_found_where_the_tokenizer_does_not_cut(folder, tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 700}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    said = refusal(folder, "tokenizer.max_seq_len=null", f"evaluate.dataset.data_files={tmp_path / 'long.jsonl'}")
    assert "evaluate.dataset: a sample has" in said and "set tokenizer.max_seq_len=512" in said


def test_what_was_tokenized_is_kept_as_long_as_the_run_reads_it(folder, tmp_path):
    c = small(folder)
    preflight(c)
    prepared = Path(c.output_dir) / "prepared"
    before = {p.name: p.stat().st_mtime_ns for p in prepared.iterdir()}
    preflight(c)
    assert {p.name: p.stat().st_mtime_ns for p in prepared.iterdir()} == before and len(before) == 3
    text = Path(c.evaluate.dataset["data_files"]).read_text()
    (tmp_path / "other.jsonl").write_text(text.splitlines()[0])
    preflight(small(folder, f"evaluate.dataset.data_files={tmp_path / 'other.jsonl'}"))
    after = {p.name for p in prepared.iterdir()}
    assert len(after) == 3 and len(after & before.keys()) == 2


# --- lengths and sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["tokenizer.max_seq_len=513"], "tokenizer.max_seq_len=513 is above the model's max_seq_len=512"),
        (["export.max_context_length=600"], "export.max_context_length=600 is above the model's max_seq_len=512"),
        (["export.max_new_tokens=240"], "has 30 tokens, and export.max_context_length=256 leaves room for 15"),
        (["export.prompt=" + "word " * 300], "export.prompt='word word word word word word word word '… has"),
        (["export.adapters.sql=/no/adapter"], "export.adapters.sql=/no/adapter: no such folder"),
        (["adapters.rank=128", "adapters.alpha=256"], "adapters.rank=128 is above the model's width, 64"),
        (["model.num_heads=3"], "cannot build a model of these sizes: embed_dim (64) must be divisible by num_heads"),
        (["model.embed_dim=63.5"], "model: torchtune.models.llama3_2.llama3_2"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named(folder, overrides, message):
    assert message in refusal(folder, *overrides)


def test_a_checkpoint_that_is_another_model_or_quantized_is_refused_before_anything_trains(folder, tmp_path):
    from folders import write_folder

    write_folder(tmp_path)
    start = ["~base", f"checkpoint_dir={tmp_path}"]
    said = refusal(folder, *start)
    assert f"{tmp_path}/config.json: vocab_size is 768, but the model of this config has vocab_size 640" in said
    (tmp_path / "model.safetensors").unlink()
    assert "download the weights too" in refusal(folder, *start)


def test_adapters_of_others_are_checked_before_anything_trains(folder, tmp_path):
    said = refusal(folder, f"export.adapters.sql={tmp_path}")
    assert said == f"export.adapters.sql={tmp_path} has no adapter_config.json; give a folder that PEFT has written"
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16, "lora_alpha": 32}')
    said = refusal(folder, f"export.adapters.sql={tmp_path}")
    assert "has no backbone.json" in said and "set export.trust_adapters=true" in said
    said = refusal(folder, f"export.adapters.sql={tmp_path}", "export.trust_adapters=true")
    assert f"{tmp_path}/adapter_model.safetensors is missing" in said


def test_adapters_that_the_run_still_makes_are_waited_for(folder):
    preflight(small(folder, f"export.adapters.sql={folder}/convert/adapter"))


def test_a_path_with_spaces_and_a_home_folder_works(folder, monkeypatch):
    home = folder / "my home"
    (home / "my runs").mkdir(parents=True)
    shutil.copytree(folder / "corpus", home / "my runs" / "a run" / "corpus")
    monkeypatch.setenv("HOME", str(home))
    config = load("tiny", [*SMALL, "output_dir=~/my runs/a run"])
    assert config.tokenizer["path"] == f"{home}/my runs/a run/corpus/tokenizer.model"
    preflight(config)
