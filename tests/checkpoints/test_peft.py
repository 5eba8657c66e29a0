"""Adapters that others have trained: applied if that is exact, else refused by name."""

import json

import pytest
import torch
from conftest import ADAPTERS, trained_like
from safetensors.torch import load_file, save_file

from llamaq.checkpoints.peft import save_peft, with_adapters
from llamaq.checkpoints.peft_config import BACKBONE, check_peft
from llamaq.checkpoints.quantized import save_quantized
from llamaq.errors import UserError
from llamaq.quant.scheme import Scheme

PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A quantized checkpoint with adapters, and the same adapters as PEFT writes them."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("peft"), trained_like(Scheme(), frozen=True)
    save_quantized(folder / "model", model.decoder, Scheme())
    save_peft(folder / "adapter", model.decoder, *ADAPTERS)
    return folder


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """Copy the adapters, to be changed."""
    for file in (checkpoint / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(adapter, **changes):
    path = adapter / "adapter_config.json"
    values = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
    path.write_text(json.dumps(values))


def applied(checkpoint, adapter, trusted=True):
    done = with_adapters(checkpoint / "model", adapter, adapter / "done", trusted)
    return torch.load(done / "consolidated.00.pth", weights_only=True)


def refusal(checkpoint, adapter, trusted=True) -> str:
    with pytest.raises(UserError) as e:
        applied(checkpoint, adapter, trusted)
    assert "\n" not in str(e.value)
    return str(e.value)


FEATURES = {
    "IA3": ({"peft_type": "IA3"}, "peft_type is IA3; only LORA is supported"),
    "DoRA": ({"use_dora": True}, "use_dora=true is not supported"),
    "rsLoRA": ({"use_rslora": True, "lora_alpha": 24}, "use_rslora) is 6, no power of two"),
    "modules_to_save": ({"modules_to_save": ["embed_tokens"]}, 'modules_to_save=["embed_tokens"] is not supported'),
    "rank_pattern": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern={'q_proj': 8} is not supported"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern={'q_proj': 8} is not supported"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out=true is not supported"),
    "bias": ({"bias": "lora_only"}, "bias=lora_only is not supported"),
    "bias of B": ({"lora_bias": True}, "lora_bias=true is not supported"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 changes the base weights"),
    "something new": ({"use_magic": {"a": 1}}, 'use_magic={"a": 1} is not supported'),
    "scale": ({"lora_alpha": 24}, "lora_alpha / r is 1.5, no power of two"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None; it has to be a number above 0"),
    "no rank": ({"r": ...}, "r is None; it has to be the rank"),
    "another rank": ({"r": 8}, "rank 8, but the checkpoint's adapters have 16"),
    "layers": ({"layers_to_transform": [1]}, "has 14 tensors that are not applied (first: base_model.model.model.lay"),
}


@pytest.mark.parametrize("changes, message", FEATURES.values(), ids=FEATURES.keys())
def test_what_changes_the_function_is_refused_by_name(changes, message, checkpoint, adapter):
    change(adapter, **changes)
    assert message in refusal(checkpoint, adapter)
    if "tensors" not in message:
        with pytest.raises(UserError):  # before there is a checkpoint
            check_peft(adapter, 16, trusted=True)


TENSORS = {
    "another layer": ({f"{PREFIX}.2.mlp.up_proj.lora_A.weight": torch.ones(16, 64)}, "has 1 tensors that are not app"),
    "an embedding": ({"base_model.model.model.embed_tokens.weight": torch.ones(768, 64)}, "has 1 tensors that are n"),
    "NaN": ({f"{PREFIX}.1.mlp.up_proj.lora_A.weight": torch.full((16, 64), torch.nan)}, "1024 of 1024 values that are"),
    "shape": ({f"{PREFIX}.1.mlp.up_proj.lora_A.weight": torch.ones(16, 65)}, "is [16, 65], needed is [16, 64]"),
    "missing": ({f"{PREFIX}.1.mlp.up_proj.lora_A.weight": None}, "lora_A.weight is missing, needed is [16, 64]"),
    "int8": ({f"{PREFIX}.1.mlp.up_proj.lora_A.weight": torch.ones(16, 64, dtype=torch.int8)}, "is quantized"),
}


@pytest.mark.parametrize("changes, message", TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused(changes, message, checkpoint, adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in (load_file(path) | changes).items() if v is not None}, path)
    assert message in refusal(checkpoint, adapter)


def test_files_that_are_missing_or_torn(checkpoint, adapter):
    assert "has no backbone.json" in refusal(checkpoint, adapter, trusted=False)
    (adapter / BACKBONE).write_text('{"sha')
    assert f"{BACKBONE} is not valid JSON" in refusal(checkpoint, adapter)
    (adapter / BACKBONE).write_text("{}")
    assert "names no sha256" in refusal(checkpoint, adapter)
    (adapter / BACKBONE).unlink()
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is the file whole?" in refusal(checkpoint, adapter)
    weights.rename(adapter / "adapter_model.bin")
    assert "is missing (adapter_model.bin is: save it again" in refusal(checkpoint, adapter)
    (adapter / "adapter_config.json").write_text("")
    assert "adapter_config.json is empty" in refusal(checkpoint, adapter)
    (adapter / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in refusal(checkpoint, adapter)
    assert "no such folder" in refusal(checkpoint, adapter / "no")


def test_rslora_and_neutral_settings_are_applied(checkpoint, adapter):
    plain = applied(checkpoint, adapter)
    # alpha / √16 = 2, as alpha / 16 was
    change(adapter, use_rslora=True, lora_alpha=8, inference_mode=True, rank_pattern={"q_proj": 16}, use_dora=False)
    again = applied(checkpoint, adapter)
    assert all(torch.equal(plain[k], again[k]) for k in plain)
    change(adapter, use_rslora=False, lora_alpha=16)  # half the scale goes into B
    key = "layers.0.attention.wq.adaptor.{}.weight"
    half = applied(checkpoint, adapter)
    assert torch.equal(half[key.format("B")] * 2, plain[key.format("B")])
    assert torch.equal(half[key.format("A")], plain[key.format("A")])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.self_attn\.(q|v)_proj"])
def test_adapters_on_some_linears_are_zeros_on_the_others(targets, checkpoint, adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "q_proj" in k or "v_proj" in k}, path)
    change(adapter, target_modules=targets)
    tensors = applied(checkpoint, adapter)
    assert tensors["layers.1.attention.wv.adaptor.B.weight"].any()
    for name in ("attention.wk", "feed_forward.w2"):
        assert not tensors[f"layers.1.{name}.adaptor.B.weight"].any()
