"""Every form of the Llama family: what trains is what is frozen, converted, in ExecuTorch's model and in the .pte."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ADAPTERS, FORMS, random_weights, saved_rotated, saved_variant, trained_like
from safetensors.torch import load_file

from llamaq.chat.eager import CachedModel
from llamaq.checkpoints.meta import PARAMS, WEIGHTS, model_params, save_float
from llamaq.checkpoints.peft import load_peft, save_peft
from llamaq.checkpoints.quantized import load_quantized, save_quantized
from llamaq.config import ExportConfig
from llamaq.errors import UserError
from llamaq.export.exporter import export_pte, load_eager
from llamaq.export.gates import windows_of
from llamaq.export.patches import beyond_stock
from llamaq.export.pte import Pte, check_constants, size_parts
from llamaq.model.build import build_model, meta_decoder
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import agreement
from llamaq.quant.modules import UntiedHead
from llamaq.quant.prepare import freeze
from llamaq.quant.scheme import Scheme

TOKENS = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(2))
EACH = pytest.mark.parametrize("model", FORMS.values(), ids=FORMS)


def frozen_by_hand(latent: CausalLM) -> CausalLM:
    """Freeze as the Python page does."""
    decoder: Any = freeze(copy.deepcopy(latent.decoder))
    return CausalLM(decoder)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapters"])
@EACH
@torch.no_grad()
def test_latent_frozen_converted_and_executorchs_eager_model_are_equal_bit_for_bit(tmp_path, model, adapted):
    if adapted:
        latent = trained_like(Scheme(), model=model)
        frozen = trained_like(Scheme(), frozen=True, weights=latent.weights(), model=model)
    else:
        latent = build_model(model, random_weights(model), Scheme()).eval()
        frozen = build_model(model, latent.weights(), Scheme(), frozen=True).eval()
    save_quantized(tmp_path, frozen.decoder, Scheme())
    back = CausalLM(load_quantized(tmp_path, build_model(model, random_weights(model), Scheme()).decoder))
    expected = latent(TOKENS)
    assert torch.equal(frozen(TOKENS), expected)
    assert torch.equal(back(TOKENS), expected)
    assert torch.equal(frozen_by_hand(latent)(TOKENS), expected)
    assert torch.equal(load_eager(tmp_path, 64)(TOKENS), expected)
    tied = model.get("tie_word_embeddings", True)
    tensors = torch.load(tmp_path / WEIGHTS, weights_only=True)
    assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"]) == tied
    assert isinstance(back.head, UntiedHead) != tied


@EACH
@torch.no_grad()
def test_rotated_llamaq_and_executorch_read_the_same_model(tmp_path, model):
    ours = saved_rotated(tmp_path, {"r1", "r2", "r4"}, model=model)(TOKENS)[0]
    decoder = build_model(model, random_weights(model), Scheme()).decoder
    assert torch.equal(CausalLM(load_quantized(tmp_path, decoder)).eval()(TOKENS)[0], ours)
    result = agreement(ours, load_eager(tmp_path, TOKENS.shape[1])(TOKENS)[0])
    assert result["relative_error"] < 1e-6 and result["top1"] == 1.0


@EACH
@torch.no_grad()
def test_full_precision_is_executorchs_own_model(tmp_path, model):
    weights = {k: v.bfloat16().float() for k, v in random_weights(model).items()}
    save_float(tmp_path, weights, model_params(meta_decoder(model)))
    result = agreement(build_model(model, weights, None)(TOKENS)[0], load_eager(tmp_path, 64)(TOKENS)[0])
    assert result["relative_error"] < 1e-6


@EACH
@torch.no_grad()
def test_a_chat_with_a_cache_computes_what_one_pass_does(model):
    weights = random_weights(model)
    cached = CachedModel(build_model(model, weights, Scheme()), 64)
    first, then = cached.step(TOKENS[0, :20].tolist(), 0), cached.step(TOKENS[0, 20:21].tolist(), 20)
    expected = build_model(model, weights, Scheme()).eval()(TOKENS[:, :21])[0, [19, 20]]
    assert agreement(expected, torch.stack([first, then]))["relative_error"] < 1e-5


def test_an_untied_head_is_trained_and_saved_under_its_own_name():
    model = build_model(FORMS["untied"], random_weights(FORMS["untied"]), Scheme())
    labels = TOKENS.roll(-1, 1)
    scored = model(TOKENS, labels=labels)
    assert isinstance(scored, tuple)
    (-scored[0].sum()).backward()
    matrix: Any = model.head.matrix
    assert matrix.weight.grad is not None and matrix.weight.grad.abs().sum() > 0
    assert torch.equal(model.weights()["output.weight"], matrix.weight)
    assert not any(name.startswith(("head", "decoder")) for name in model.weights())


def test_adapters_of_half_split_models_keep_hugging_faces_order(tmp_path):
    model = trained_like(Scheme(), frozen=True, model=FORMS["qwen2"])
    save_quantized(tmp_path, model.decoder, Scheme())
    save_peft(tmp_path / "adapter", model.decoder, *ADAPTERS)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    b = stored["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    tensors = torch.load(tmp_path / WEIGHTS, weights_only=True)
    assert torch.equal(b, tensors["layers.1.attention.wq.adaptor.B.weight"])
    back = load_peft(tmp_path / "adapter", json.loads((tmp_path / PARAMS).read_text()), tensors)
    assert all(torch.equal(t, tensors[name]) for name, t in back.items())


def test_what_the_stock_exporter_leaves_out_is_known(tmp_path):
    said = {}
    for name, kind in (("qwen2", "qat"), ("qwen2", "qat_lora"), ("qwen3", "spinquant"), ("qwen2", "spinquant")):
        saved_variant(tmp_path / name / kind, kind, FORMS[name])
        said[name, kind] = beyond_stock(json.loads((tmp_path / name / kind / PARAMS).read_text()))
    assert said["qwen2", "qat"] == said["qwen2", "spinquant"] == ""
    assert "biases" in said["qwen2", "qat_lora"] and "blocks of 64" in said["qwen3", "spinquant"]


def test_what_executorch_cannot_compute_is_refused_with_its_numbers():
    scaling = FORMS["untied"]["rope_scaling"]
    for change, words in (
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings=4096: ExecuTorch.*8192"),
        ({"low_freq_factor": 2.0}, r"low_freq_factor=2\.0: ExecuTorch.*has 1"),
    ):
        decoder = meta_decoder(FORMS["untied"] | {"rope_scaling": scaling | change})
        with pytest.raises(UserError, match=words):
            model_params(decoder)
    decoder: Any = meta_decoder(FORMS["untied"])
    decoder.layers[0].mlp.w2.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(UserError, match=r"mlp\.w2 have biases"):
        model_params(decoder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("untied", "qat_lora"), ("qwen2", "qat_lora"), ("qwen3", "qat"), ("qwen3", "spinquant"), ("linear", "spinquant")],
)
@torch.no_grad()
def test_exported_files_compute_what_was_trained(tmp_path, name, kind):
    model = saved_variant(tmp_path / "model", kind, FORMS[name])
    options = replace(ExportConfig(), max_seq_length=16, max_context_length=64, dynamic_shape=False)
    export_pte(tmp_path / "model", tmp_path / "model.pte", options, {"get_bos_id": 1, "get_eos_ids": [2]})
    assert check_constants(tmp_path / "model", tmp_path / "model.pte") > 0
    assert size_parts(tmp_path / "model", tmp_path / "model.pte")["program"] > 0
    pte, contexts = Pte(tmp_path / "model.pte"), windows_of(TOKENS[0].tolist(), 1 if kind == "spinquant" else 8)
    expected = torch.cat([model(torch.tensor([t]))[0] for t in contexts])
    result = agreement(expected, torch.cat([pte.logits(t) for t in contexts]))
    assert result["token_error"] <= 1e-4 and result["top1"] == 1
    assert agreement(model(TOKENS)[0], pte.logits(TOKENS[0].tolist()))["kl"] <= 1e-3
