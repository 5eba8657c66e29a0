"""Text stays as typed, `~` leads home, and a YAML file that means text has to say so."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llamaq.config import load, packaged_configs
from llamaq.errors import UserError


@pytest.fixture(autouse=True)
def _home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")


TYPED = ["yes", "no", "On", "007", "1e3", "0x1F", "1_000", "2024-01-01", "12:30", "a: b", "#1", "[x", "*", "é ü", " a "]


@pytest.mark.parametrize("text", TYPED)
def test_text_is_what_was_typed(text):
    settings = ("output_dir", "checkpoint_dir", "export.prompt", "evaluate.tasks_dir", "evaluate.perplexity_text")
    config = load("tiny", [f"{setting}={text}" for setting in (*settings, "export.adapters.sql")])
    e = config.evaluate
    found = config.output_dir, config.checkpoint_dir, config.export.prompt, e.tasks_dir, e.perplexity_text
    assert found == (text,) * 5 and config.export.adapters == {"sql": text}


@pytest.mark.parametrize("text", ["yes", "007", "1e3"])
def test_paths_among_the_arguments_of_a_component_are_text_too(text):
    config = load("tiny_spinquant", [f"tokenizer.path={text}", f"spinquant.calibration.0.dataset.data_files={text}"])
    assert config.tokenizer["path"] == text
    assert config.section("spinquant").calibration[0].dataset["data_files"] == text


def test_lists_of_text_and_what_is_no_text():
    items = ["evaluate.tasks=[yes, 007, 'a b']", "evaluate.models=[bf16]", "qat.dataset.data_files=[1e3, no]"]
    config = load("tiny", [*items, "seed=0x10", "qat.optimizer.lr=1e-5", "compile=yes", "qat.max_steps=null"])
    assert config.evaluate.tasks == ["yes", "007", "a b"] and config.evaluate.models == ["bf16"]
    assert config.section("qat").dataset["data_files"] == ["1e3", "no"]
    assert config.seed == 16 and config.compile is True and config.section("qat").max_steps is None
    assert config.section("qat").optimizer["lr"] == 1e-5
    with pytest.raises(UserError, match=r"evaluate.tasks=mmlu: give a list, e.g. evaluate.tasks=\[mmlu\]"):
        load("tiny", ["evaluate.tasks=mmlu"])


def test_quotes_references_and_null_mean_what_they_mean_in_yaml():
    config = load("tiny", ['output_dir="a b"', "export.prompt='it''s: so'", "wandb.entity=null"])
    assert config.output_dir == "a b" and config.export.prompt == "it's: so" and config.wandb.entity is None
    assert config.tokenizer["path"] == "a b/corpus/tokenizer.model"
    assert load("tiny", ["export.prompt="]).export.prompt == ""
    assert load("tiny", ["export.prompt=run ${seed}"]).export.prompt == "run 0"
    with pytest.raises(UserError, match=r"export\.prompt"):
        load("tiny", ["export.prompt=null"])


def test_home_is_expanded_in_every_path(tmp_path):
    home = tmp_path / "home of mine"
    home.mkdir()
    (home / "zero.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        items = ["output_dir=~/my runs", "data_dir=~/d", "checkpoint_dir=~", "evaluate.tasks_dir=~/t"]
        items += ["evaluate.perplexity_text=~/p.txt", "export.adapters.sql=~/a", "deepspeed.config=~/zero.json"]
        items += ["qat.dataset.data_files=[${data_dir}/x.jsonl,~/y.jsonl]", "qat.dataset.source=~/s"]
        config = load("tiny", [*items, "export.prompt=~/not a path", "qat.dataset.mine=~/z"])
        dataset = config.section("qat").dataset
        assert dataset["data_files"] == [f"{home}/d/x.jsonl", f"{home}/y.jsonl"] and dataset["mine"] == f"{home}/z"
        assert dataset["source"] == f"{home}/s" and config.tokenizer["path"] == f"{home}/my runs/corpus/tokenizer.model"
        e = config.evaluate
        assert (e.tasks_dir, e.perplexity_text) == (f"{home}/t", f"{home}/p.txt")
        folders = config.output_dir, config.data_dir, config.checkpoint_dir
        assert folders == (f"{home}/my runs", f"{home}/d", f"{home}")
        assert config.export.adapters == {"sql": f"{home}/a"} and config.deepspeed.config == f"{home}/zero.json"
        assert config.export.prompt == "~/not a path"


def test_home_is_expanded_in_lists_of_sections():
    config = load("tiny_spinquant", ["spinquant.calibration.0.dataset.data_files=~/c.jsonl"])
    assert config.section("spinquant").calibration[0].dataset["data_files"] == "/home/me/c.jsonl"


@pytest.mark.parametrize(
    "setting, value, read",
    [
        ("output_dir", "yes", "True"),
        ("checkpoint_dir", "007", "7"),
        ("export.prompt", "1e3", "1000.0"),
        ("evaluate.tasks", "[arc, 2024]", "2024"),
        ("qat.dataset.data_files", "[a.jsonl, 5]", "5"),
        ("tokenizer.path", "12", "12"),
    ],
)
def test_a_file_has_to_quote_text_that_looks_like_something_else(tmp_path, setting, value, read):
    def written(value: str) -> Path:
        raw = OmegaConf.load(packaged_configs()["tiny"])
        (tmp_path / "value.yaml").write_text(f"value: {value}\n")
        OmegaConf.update(raw, setting, OmegaConf.load(tmp_path / "value.yaml").value)
        OmegaConf.save(raw, tmp_path / "mine.yaml")
        return tmp_path / "mine.yaml"

    with pytest.raises(UserError) as e:
        load(str(written(value)))
    assert f"mine.yaml: {setting}" in str(e.value)
    assert f"holds text, and YAML reads its value as {read}; write it in quotes" in str(e.value)
    load(str(written(value.replace("2024", "'2024'").replace("5]", "'5']") if "[" in value else f"'{value}'")))


def test_a_config_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(packaged_configs()["tiny"].read_text())
    assert load("~/mine.yaml").output_dir == "runs/tiny"
