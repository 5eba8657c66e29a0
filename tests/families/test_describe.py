"""A checkpoint folder says what model it is, without a weight read; what is not supported is refused by name."""

import json
import struct
import time
from math import prod
from typing import Any

import pytest
import torch
from conftest import MODEL
from folders import CONFIG, QWEN2, QWEN3, tensors_of, write_config, write_folder
from safetensors.torch import save_file

from llamaq.errors import UserError
from llamaq.families import describe

NEW = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": CONFIG["rope_scaling"] | {"rope_theta": 1e4}}
LINEAR = {"type": "linear", "factor": 4.0}


def model_of(folder) -> dict:
    model = describe(folder).model
    assert model is not None
    return model


# --- config.json ------------------------------------------------------------------------------------------------------


def test_a_tied_llama_is_what_the_shipped_configs_write(tmp_path):
    write_folder(tmp_path)
    assert model_of(tmp_path) == MODEL


@pytest.mark.parametrize(
    "config, changed",
    [
        # transformers 5's spelling, and the older one of the kind
        (
            {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": CONFIG["rope_scaling"] | {"rope_theta": 1e4}},
            {"rope_base": 10000},
        ),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e6}, {"scale_factor": 1, "rope_base": 1000000}),
        ({"rope_scaling": None, "rope_theta": ...}, {"scale_factor": 1, "rope_base": 10000}),
        ({"rope_scaling": CONFIG["rope_scaling"] | {"factor": 8.0}}, {"scale_factor": 8}),
        ({"rms_norm_eps": 1e-6}, {"norm_eps": 1e-6}),
        ({"rms_norm_eps": 9.999999747378752e-06}, {}),  # float32's 1e-5, as converters from GGUF write it
        ({"max_position_embeddings": 131072}, {"max_seq_len": 131072}),
        ({"vocab_size": 771}, {"vocab_size": 771}),
        ({"model_type": "mistral", "sliding_window": None}, {}),
        ({"tie_word_embeddings": ...}, {}),  # and no lm_head.weight: tied
    ],
)
def test_numbers_of_config_json_become_the_builders_arguments(config, changed, tmp_path):
    write_folder(tmp_path, **config)
    assert model_of(tmp_path) == MODEL | changed


@pytest.mark.parametrize("tied", [False, ...])
def test_a_head_of_its_own_is_untied_whether_config_json_says_so_or_nothing(tied, tmp_path):
    write_folder(tmp_path, head=True, tie_word_embeddings=tied)
    assert model_of(tmp_path) == MODEL | {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    "config, builder, expected",
    [
        ({"rope_scaling": LINEAR}, "llama", {"rope_scaling": {"rope_type": "linear", "factor": 4}, "head_dim": 16}),
        ({"head_dim": 32}, "llama", {"head_dim": 32, "norm_eps": 1e-5}),
        (QWEN2, "qwen2", {"rope_scaling": {"rope_type": "default"}, "tie_word_embeddings": True}),
        (QWEN3, "qwen3", {"head_dim": 32, "intermediate_dim": 256}),
    ],
)
def test_what_torchtunes_llama_cannot_say_goes_to_our_builders(config, builder, expected, tmp_path):
    write_folder(tmp_path, **config)
    model = model_of(tmp_path)
    assert model["_component_"] == f"llamaq.model.builders.{builder}"
    assert model.items() >= expected.items()


REFUSED = {
    "gemma": ({"model_type": "gemma3_text"}, "model_type is gemma3_text, which is not supported; supported are llama"),
    "no model_type": ({"model_type": ...}, "names no model_type"),
    "mixture of experts": ({"model_type": "qwen2_moe"}, "model_type is qwen2_moe, which is not supported"),
    "sliding window": ({"model_type": "mistral", "sliding_window": 4096}, "mistral with sliding_window=4096"),
    "sliding window by default": ({"model_type": "mistral"}, "mistral with sliding_window=4096 (the default)"),
    "sliding window of Qwen": (QWEN2 | {"use_sliding_window": True}, "qwen2 with use_sliding_window=True"),
    "some sliding layers": (QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]}, "has sliding_attention"),
    "biases": ({"attention_bias": True}, "llama with attention_bias=True: only Qwen2.5's biases"),
    "biases of the MLP": ({"mlp_bias": True}, "llama with mlp_bias=True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is gelu; ExecuTorch's Llama computes silu only"),
    "dynamic RoPE": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "is of type dynamic; supported",
    ),
    "yarn": ({"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "is of type yarn"),
    "factor": ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor is 4; it has to be a number"),
    "two thetas": (
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": None},
        "says of rope_theta 10000.0 and 500000.0; delete",
    ),
    "two scalings": (
        {"rope_parameters": {"rope_type": "default"}},
        "says of RoPE's scaling {'rope_type': 'default'} a",
    ),
    "partial RoPE": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "only causal language models"),
    "code of its own": ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "the model brings code of its own"),
    "missing size": ({"num_hidden_layers": ...}, "num_hidden_layers is missing; it has to be a positive integer"),
    "size as text": ({"hidden_size": "64"}, "hidden_size is '64'; it has to be a positive integer"),
    "untied without a head": ({"tie_word_embeddings": False}, "no weights have lm_head.weight"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already (config.json has a quan"),
}


@pytest.mark.parametrize("config, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_supported_is_named(config, message, tmp_path):
    write_config(tmp_path, **config)
    save_file(tensors_of(), tmp_path / "model.safetensors")
    refused(tmp_path, message)


def refused(folder, message: str) -> None:
    with pytest.raises(UserError) as e:
        describe(folder)
    assert message in str(e.value) and "\n" not in str(e.value), e.value


@pytest.mark.parametrize(
    "content, state", [("", "is empty"), ('{"model_type": "lla', "is not valid JSON"), ("[]", "holds a list")]
)
def test_a_torn_config_json_or_index(content, state, tmp_path):
    write_folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    refused(tmp_path, f"{index} {state}")
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, f"{tmp_path / 'config.json'} {state}")
    write_config(tmp_path)
    index.write_text('{"metadata": {}}')
    refused(tmp_path, f"{index} has no weight_map")


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_tensor_in_two_files_is_refused(tmp_path):
    tensors = write_folder(tmp_path)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "model_old.safetensors")
    refused(tmp_path, "model.safetensors and model_old.safetensors both have model.norm.weight; keep")
    weights = {k: "part.safetensors" for k in tensors}
    (tmp_path / "model_old.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    refused(tmp_path, "model.safetensors and part.safetensors both have model.norm.weight")


def test_two_epochs_of_torchtune_are_refused(tmp_path):
    for name in ("model_0.pt", "model_1.pt"):
        torch.save({"norm.scale": torch.ones(4)}, tmp_path / name)
    refused(tmp_path, "model_0.pt and model_1.pt both have norm.scale")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused(dtype, tmp_path):
    tensors = write_folder(tmp_path)
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {key: tensors[key].to(dtype)}, tmp_path / "model.safetensors")
    refused(tmp_path, f"is quantized already (model.safetensors has {key} as ")


def test_an_adapter_instead_of_a_model_or_beside_one_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}')
    refused(tmp_path, "holds a LoRA adapter and no model for meta-llama/Llama-3.2-1B (adapter_config.json); merge")
    write_folder(tmp_path)
    refused(tmp_path, "holds a model and beside it a LoRA adapter")


def test_what_training_leaves_beside_a_model_is_no_weight(tmp_path):
    write_folder(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "optimizer.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
    assert [p.name for p in describe(tmp_path).weights] == ["model.safetensors"]


def test_only_bin_files_are_read_too_and_a_tied_head_in_them_counts_once(tmp_path):
    write_config(tmp_path, tie_word_embeddings=...)
    tensors = tensors_of()
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")
    assert model_of(tmp_path) == MODEL
    refused_without = tmp_path / "nothing"
    write_config(refused_without)
    refused(refused_without, "has a config.json but no *.safetensors; download the weights too")


def test_folders_that_are_none(tmp_path):
    refused("someone/some-model", "is not a folder; give the folder that holds the checkpoint's files (is it the name")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "its .gguf file is quantized for llama.cpp")
    refused(tmp_path / "model.gguf", "it is a file: give the folder it lies in")


def test_a_1b_folder_is_described_at_once_and_no_weight_is_read(tmp_path):
    """The file is all hole: 2.5 GB that are not there."""
    size: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    write_config(tmp_path, **size, num_hidden_layers=16, vocab_size=128256)
    with torch.device("meta"):
        shapes = {k: list(v.shape) for k, v in tensors_of(**size, num_hidden_layers=16, vocab_size=128256).items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
    begun = time.perf_counter()
    assert model_of(tmp_path)["num_layers"] == 16
    assert time.perf_counter() - begun < 1


# --- Meta -------------------------------------------------------------------------------------------------------------

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 500000.0}


def write_meta(folder, params, **extra):
    from conftest import random_weights
    from torchtune.models.convert_weights import tune_to_meta

    tensors = tune_to_meta(random_weights())
    extra = {k: tensors["tok_embeddings.weight"] if v == "tied" else v for k, v in extra.items()}
    torch.save(tensors | extra, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))


def test_a_meta_folder_describes_itself_and_the_header_says_what_params_json_does_not(tmp_path):
    write_meta(tmp_path, PARAMS | {"use_scaled_rope": True}, **{"output.weight": "tied"})
    assert model_of(tmp_path) == MODEL | {"max_seq_len": 131072}
    write_meta(tmp_path, {"n_heads": 4, "rope_theta": 1e4, "norm_eps": 1e-6, "vocab_size": -1})
    assert model_of(tmp_path) == MODEL | {"max_seq_len": 8192, "scale_factor": 1, "rope_base": 10000, "norm_eps": 1e-6}


def test_an_untied_meta_folder_and_one_without_rope_theta(tmp_path):
    write_meta(tmp_path, PARAMS, **{"output.weight": torch.randn(768, 64)})
    assert model_of(tmp_path)["tie_word_embeddings"] is False
    write_meta(tmp_path, {k: v for k, v in PARAMS.items() if k != "rope_theta"})
    refused(tmp_path, "has no rope_theta; add it (Llama 3 has 500000.0, Llama 2 10000.0)")
    (tmp_path / "consolidated.01.pth").touch()
    refused(tmp_path, "holds a model in parallel parts")


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_what_llamaq_writes_in_metas_layout_is_read_back_as_the_same_model(changes, tmp_path):
    from conftest import random_weights

    from llamaq.checkpoints.meta import model_params, save_float
    from llamaq.model.architecture import architecture_of
    from llamaq.model.build import build_decoder

    for builder, own in (
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4}}),
        ("qwen2", {}),
        ("qwen3", {}),
    ):
        sizes = {k: v for k, v in MODEL.items() if k != "scale_factor"} | {
            "_component_": f"llamaq.model.builders.{builder}"
        }
        model = sizes | own | changes
        weights = random_weights(model)
        save_float(tmp_path / builder, weights, model_params(build_decoder(model, weights)))
        found = describe(tmp_path / builder).architecture
        assert found is not None
        assert [d[0] for d in found.differences(architecture_of(build_decoder(model, weights)))] == ["max_seq_len"]
