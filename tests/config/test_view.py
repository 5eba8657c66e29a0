"""What a stage may read, and what of it decides whether the stage runs again."""

from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from llamaq.config import Config, load
from llamaq.config.view import NEUTRAL, View, only
from llamaq.errors import UserError


@pytest.fixture(scope="module")
def config() -> Config:
    return load("tiny", ["wandb.mode=disabled", "qat.dataset.batch_size=3"])


def settings(c: Config) -> dict[str, Any]:
    assert isinstance(c, View)
    return c.settings()


def test_a_stage_reads_what_it_declares_and_what_cannot_change_a_result(config):
    c = only(config, "qat", "tokenizer.max_seq_len", "export.gate_tokens", "qat_dpo.loss")
    assert c.qat is config.qat and c.device == "cpu" and c.wandb.mode == "disabled"
    assert c.tokenizer == {"max_seq_len": 128}
    assert c.export.gate_tokens == 128
    assert c.section("qat_dpo").loss == config.section("qat_dpo").loss
    assert c.section("qat_dpo").batch_size == 16  # neutral


@pytest.mark.parametrize("path", ["model", "seed", "dtype", "export.prompt", "qat_dpo.optimizer"])
def test_reading_anything_else_is_an_error(config, path):
    node: Any = only(config, "qat", "export.gate_tokens", "qat_dpo.loss")
    with pytest.raises(AssertionError, match=f"'{path}' is read by a stage that does not declare it"):
        for name in path.split("."):
            node = getattr(node, name)


def test_a_setting_that_does_not_exist_is_an_error(config):
    with pytest.raises(AttributeError):
        _ = only(config, "qat").qad  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        settings(only(config, "qat.lr"))


def test_a_section_that_is_not_there(config):
    c = only(config, "spinquant.steps")
    assert c.spinquant is None and settings(c) == {"spinquant": {"steps": None}}
    with pytest.raises(UserError, match="this recipe needs the section 'spinquant'"):
        c.section("spinquant")


def test_neutral_settings_are_left_out_by_their_full_path_only(config):
    found = settings(only(config, "qat", "seed"))
    assert set(found) == {"qat", "seed"}
    assert "batch_size" not in found["qat"] and "keep_checkpoints" not in found["qat"]
    assert found["qat"]["global_batch_size"] == 32
    assert found["qat"]["dataset"]["batch_size"] == 3  # an argument of the user's dataset, which may change results


def test_a_neutral_setting_counts_where_a_stage_names_it(config):
    found = settings(only(config, "qat_dpo.dataset", "qat_dpo.batch_size"))
    assert set(found["qat_dpo"]) == {"dataset", "batch_size"} and found["qat_dpo"]["batch_size"] == 16


def test_a_list_of_sections_is_recorded_as_plain_values():
    c = load("tiny_spinquant", ["wandb.mode=disabled"])
    found = settings(only(c, "spinquant.calibration"))["spinquant"]["calibration"]
    assert found[0]["num_samples"] == 128 and found[0]["dataset"]["source"] == "json"


def test_every_neutral_path_is_a_setting():
    def exists(schema: Any, path: str) -> bool:
        name, _, rest = path.partition(".")
        if name not in {f.name for f in fields(schema)}:
            return False
        kinds = {
            "base": "TrainingConfig",
            "qat": "TrainingConfig",
            "qat_lora": "TrainingConfig",
            "qat_dpo": "DPOConfig",
            "evaluate": "EvaluateConfig",
            "export": "ExportConfig",
        }
        if not rest:
            return True
        import llamaq.config as config

        inner = getattr(config, kinds[name])
        return is_dataclass(inner) and exists(inner, rest)

    assert all(exists(Config, path) for path in NEUTRAL)
    assert not exists(Config, "qat.batchsize") and not exists(Config, "devices")
