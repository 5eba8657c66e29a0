"""The schema's checks: every value out of range is one line that names the setting."""

import pytest

from llamaq.config import Config, load, parse_arguments
from llamaq.errors import UserError


@pytest.mark.parametrize(
    "override, message",
    [
        ("export.stage=dpo", "export.stage=dpo: choose qat, qat_lora or qat_dpo"),
        ("export.max_seq_length=0", "export.max_seq_length=0: must be at least 1"),
        ("export.adapters.get_sql=x", "export.adapters.get_sql: a method's name is"),
        ("evaluate.max_samples=0", "evaluate.max_samples=0: must be at least 1"),
        ("evaluate.sensitivity_samples=-1", "evaluate.sensitivity_samples=-1: must not be negative"),
        ("qat_dpo.batch_size=3", "qat_dpo.global_batch_size=16 is not a multiple of qat_dpo.batch_size=3"),
        ("~qat_dpo.loss._component_", "qat_dpo.loss has no _component_"),
        ("base.distill_weight=2", "base.distill_weight=2.0: must be between 0 and 1"),
        ("engine=ray", "engine=ray: choose auto, torch or deepspeed"),
        ("deepspeed.config=zero9", "deepspeed.config=zero9 is neither a file nor one of zero0, zero1"),
        ("deepspeed.settings.bf16=true", "deepspeed.settings.bf16: llamaq sets it, from dtype"),
    ],
)
def test_a_value_out_of_range_is_named(override, message):
    with pytest.raises(UserError) as e:
        load("tiny", [override])
    assert message in str(e.value)


def test_unset_settings_have_no_range():
    config = load("tiny", ["evaluate.max_samples=null", "evaluate.threads=null", "qat.max_steps=null"])
    assert config.evaluate.max_samples is None and config.section("qat").max_steps is None


def test_a_key_in_a_list_is_checked_too():
    with pytest.raises(UserError, match=r"'spinquant.calibration.0.samples'; did you mean spinquant.calibration.0.num"):
        load("tiny_spinquant", ["spinquant.calibration.0.samples=8"])
    with pytest.raises(UserError, match=r"spinquant.calibration\[0\].num_samples=0: must be at least 1"):
        load("tiny_spinquant", ["spinquant.calibration.0.num_samples=0"])


def test_a_section_that_is_not_there():
    with pytest.raises(UserError, match="this recipe needs the section 'qat', and the configuration has none"):
        Config().section("qat")


def test_the_words_of_a_command_line():
    words = ["seed=1", "--config", "tiny", "~base", "qat.dataset.source=a=b"]
    assert parse_arguments(words, "") == ("tiny", ["seed=1", "~base", "qat.dataset.source=a=b"])
    assert parse_arguments(["--config=tiny"], "") == ("tiny", [])
    with pytest.raises(UserError, match="--config needs a name or a file after it"):
        parse_arguments(["--config"], "")
