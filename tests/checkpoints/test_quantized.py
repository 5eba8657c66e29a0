"""The converted checkpoint: its keys, its bits through ExecuTorch's own loader, and the adapters for PEFT."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ADAPTERS, MODEL, random_weights, trained_like
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune

from llamaq.checkpoints.hugging_face import hf_rows
from llamaq.checkpoints.load import load_checkpoint
from llamaq.checkpoints.meta import feed_forward_width, ffn_params, model_params, save_float
from llamaq.checkpoints.peft import save_peft, with_adapters
from llamaq.checkpoints.quantized import load_quantized, save_quantized
from llamaq.config import ExportConfig
from llamaq.errors import UserError
from llamaq.export.exporter import check_keys, executorch_arguments, load_eager
from llamaq.model.build import build_decoder, build_model
from llamaq.model.causal_lm import CausalLM
from llamaq.quant.prepare import quantized_linears
from llamaq.quant.scheme import Scheme

TOKENS = torch.randint(0, 768, (1, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    latent = trained_like(Scheme())
    frozen = trained_like(Scheme(), frozen=True, weights=dict(latent.decoder.state_dict()))
    save_quantized(folder, frozen.decoder, Scheme())
    return folder, latent, frozen


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


def test_layout(exported):
    folder, _, _ = exported
    tensors = tensors_of(folder)
    assert len(tensors) == 2 * (7 * 4 + 2) + 1 + 4
    first = next(iter(tensors))
    assert first.endswith("norm.weight") and tensors[first].dtype.is_floating_point  # ExecuTorch reads its dtype
    w1 = tensors["layers.0.feed_forward.w1.weight"]
    assert w1.dtype == torch.int8 and w1.shape == (256, 64) and w1.min() >= -8 and w1.max() <= 7
    scales = tensors["layers.0.feed_forward.w1.scales"]
    assert scales.dtype == torch.float32 and scales.shape == (256, 2)
    assert torch.equal(scales, scales.bfloat16().float())
    assert tensors["layers.1.attention.wv.adaptor.B.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    assert torch.equal(tensors["output.scales"], tensors["tok_embeddings.scales"])


def test_params_are_what_both_loaders_need(exported):
    params = json.loads((exported[0] / "params.json").read_text())
    assert params["quantization_args"] == {
        "scheme": "int4_weight_int8_dynamic_activation",
        "group_size": 32,
        "spinquant": False,
    }
    assert params["lora_args"] == {"rank": 16, "scale": 2.0}
    assert params["use_scaled_rope"] is True


def test_executorch_loads_it_and_computes_the_same_bits(exported):
    """Its own loader, `-qat -lora 16 --preq_mode 8da4w_output_8da8w …`: no key missing or left over, equal logits."""
    folder, latent, frozen = exported
    eager = load_eager(folder, 64)
    with torch.no_grad():
        assert torch.equal(latent(TOKENS), frozen(TOKENS))
        assert torch.equal(eager(TOKENS), latent(TOKENS))


def test_the_command_line_is_the_published_one(exported, tmp_path):
    arguments = executorch_arguments(exported[0], tmp_path / "m.pte", ExportConfig(), {"get_bos_id": 1})
    said = " ".join(arguments)
    assert "-qat -lora 16" in said and "--preq_mode 8da4w_output_8da8w --preq_group_size 32" in said
    assert "--preq_embedding_quantize 8,0" in said and "-X -d fp32" in said and "--xnnpack-extended-ops" in said


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_keys_executorch_would_pass_over_silently_are_found(exported, tmp_path, change):
    folder, _, _ = exported
    eager, tensors = load_eager(folder, 64), tensors_of(folder)
    if change == "missing":
        del tensors["layers.0.attention.wq.scales"]
    else:
        tensors["layers.0.attention.wq.scale"] = torch.ones(1)
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"layers\.0\.attention\.wq\.scale"):
        check_keys(tmp_path, eager)


def test_read_back(exported):
    folder, latent, _ = exported
    decoder = build_model(MODEL, random_weights(), Scheme()).decoder
    with torch.no_grad():
        assert torch.equal(CausalLM(load_quantized(folder, decoder))(TOKENS), latent(TOKENS))


def test_another_scale_is_folded_into_b_exactly(tmp_path):
    """Alpha / rank = 1 must ship as ExecuTorch's fixed 2.0 times B / 2, which bf16 holds exactly."""
    weights = dict(trained_like(Scheme()).decoder.state_dict())
    frozen = build_model(MODEL, weights, Scheme(), (16, 16.0), frozen=True)
    save_quantized(tmp_path, frozen.decoder, Scheme())
    with torch.no_grad():
        assert torch.equal(load_eager(tmp_path, 64)(TOKENS), frozen(TOKENS))


def test_float_checkpoints_read_back(tmp_path):
    weights = {k: v.bfloat16().float() for k, v in random_weights().items()}
    save_float(tmp_path, weights, model_params(build_decoder(MODEL, weights)))
    loaded = load_checkpoint(tmp_path, build_decoder(MODEL))
    assert all(torch.equal(loaded[k], weights[k]) for k in weights)


@pytest.mark.parametrize("dim, hidden", [(2048, 8192), (3072, 8192), (256, 1024), (64, 256), (128, 512), (896, 4864)])
def test_ffn_params_reproduce_the_width(dim, hidden):
    found = ffn_params(dim, hidden)
    assert found is not None
    multiplier, multiple_of = found
    width = int(2 * 4 * dim / 3)  # llama-models' FeedForward
    width = multiple_of * ((int(multiplier * width) + multiple_of - 1) // multiple_of)
    assert width == hidden and feed_forward_width({"dim": dim, **width_params(dim, hidden)}) == hidden


def width_params(dim: int, hidden: int) -> dict[str, float]:
    found = ffn_params(dim, hidden)
    assert found is not None
    return {"ffn_dim_multiplier": found[0], "multiple_of": found[1]}


def test_a_width_that_the_formula_does_not_make_is_written_as_it_is():
    params = model_params(build_decoder(MODEL | {"intermediate_dim": 250}))
    assert ffn_params(64, 250) is None
    assert params["hidden_dim"] == feed_forward_width(params) == 250 and "multiple_of" not in params


def test_rope_scalings_as_executorch_computes_them(tmp_path):
    known = model_params(build_decoder(MODEL))
    assert known["use_scaled_rope"] is True and "rope_scale_factor" not in known
    for factor, executorch_model in ((32, "llama3_2"), (8, "llama3_1")):
        params = model_params(build_decoder(MODEL | {"scale_factor": factor}))
        (tmp_path / "params.json").write_text(json.dumps(params))
        assert f"--model {executorch_model} " in " ".join(executorch_arguments(tmp_path, tmp_path, ExportConfig()))
    assert params["rope_scale_factor"] == 8


def test_a_method_s_checkpoint_is_written_again_where_an_interrupted_export_left_half_of_it(exported, tmp_path):
    folder, _, frozen = exported
    save_peft(tmp_path / "adapter", frozen.decoder, *ADAPTERS)
    whole = tensors_of(with_adapters(folder, tmp_path / "adapter", tmp_path / "whole", trusted=True))
    (tmp_path / "methods" / "other").mkdir(parents=True)
    (tmp_path / "methods" / "other" / "consolidated.00.pth").write_bytes(b"half of it")
    again = tensors_of(with_adapters(folder, tmp_path / "adapter", tmp_path / "methods" / "other", trusted=True))
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)
    assert (tmp_path / "methods/other/params.json").read_text() == (folder / "params.json").read_text()


def test_peft_adapters_act_on_the_hugging_face_weights_as_ours_on_metas(tmp_path):
    model = trained_like(Scheme())
    save_peft(tmp_path, model.decoder, *ADAPTERS)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 16 and config["lora_alpha"] == 32.0 and len(config["target_modules"]) == 7
    assert len(tensors) == 2 * 7 * 2
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    delta = tensors[f"{prefix}.lora_B.weight"].float() @ tensors[f"{prefix}.lora_A.weight"].float()
    back = hf_to_tune({"model.layers.1.self_attn.q_proj.weight": delta}, num_heads=4, num_kv_heads=2, dim=64)
    adapter = quantized_linears(model.decoder)["layers.1.attn.q_proj"].adapter
    assert adapter is not None
    expected = adapter.b.bfloat16().float() @ adapter.a.bfloat16().float()
    assert torch.allclose(back["layers.1.attn.q_proj.weight"], expected, atol=1e-6)
    assert torch.equal(hf_rows(torch.arange(8.0)[:, None], heads=2)[:, 0], torch.tensor([0.0, 2, 1, 3, 4, 6, 5, 7]))
