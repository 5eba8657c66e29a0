"""The three layouts give the same weights; what does not fit is refused by name."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import MODEL, random_weights
from folders import CONFIG, QWEN2, write_config, write_folder
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf, tune_to_meta

from llamaq.checkpoints.load import check_start, load_checkpoint
from llamaq.checkpoints.meta import model_params, save_float
from llamaq.errors import UserError
from llamaq.model.build import meta_decoder


def write_meta(folder, weights, **extra):
    torch.save(tune_to_meta(weights) | extra, folder / "consolidated.00.pth")


def write_hf(folder, weights, config: Mapping[str, Any] = MappingProxyType({}), **extra):
    tensors = tune_to_hf(weights, num_heads=4, num_kv_heads=2, dim=64) | extra
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    write_config(folder, **config)


@pytest.fixture
def weights():
    return random_weights()


def load(folder, model=MODEL):
    return load_checkpoint(folder, meta_decoder(model))


def same(loaded, weights):
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[k], weights[k]) and loaded[k].dtype == torch.float32 for k in weights)


@pytest.mark.parametrize("head", [True, False])
def test_meta_with_and_without_output_weight(tmp_path, weights, head):
    write_meta(tmp_path, weights, **({"output.weight": weights["tok_embeddings.weight"]} if head else {}))
    same(load(tmp_path), weights)


@pytest.mark.parametrize("head", [True, False])
def test_hugging_face_unpermuted_with_and_without_lm_head(tmp_path, weights, head):
    write_hf(tmp_path, weights, **({"lm_head.weight": weights["tok_embeddings.weight"].clone()} if head else {}))
    same(load(tmp_path), weights)


def test_hugging_face_in_shards(tmp_path, weights):
    write_hf(tmp_path, weights)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(tensors)}
    for name in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    same(load(tmp_path), weights)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_torchtunes_own(tmp_path, weights, suffix):
    path = tmp_path / f"model.{suffix}"
    torch.save(weights, path) if suffix == "pt" else save_file(weights, path)
    same(load(tmp_path), weights)


def test_bf16_checkpoints_become_float32(tmp_path, weights):
    write_meta(tmp_path, {k: v.bfloat16() for k, v in weights.items()})
    same(load(tmp_path), {k: v.bfloat16().float() for k, v in weights.items()})


def refused(tmp_path, match):
    with pytest.raises(UserError, match=match):
        load(tmp_path)


def test_an_untied_head_is_refused_with_the_reason(tmp_path, weights):
    other = {"lm_head.weight": weights["tok_embeddings.weight"] + 1}
    write_hf(tmp_path, weights, {"tie_word_embeddings": False}, **other)
    refused(tmp_path, "differs from the embedding.*ties them.*tie_word_embeddings=false")
    write_hf(tmp_path, weights, **other)
    refused(tmp_path, "tie_word_embeddings is true, but lm_head.weight differs.*transformers 4 ignores.*5 uses it")


def test_a_head_of_its_own_is_read_where_the_model_has_one(tmp_path):
    untied = MODEL | {"tie_word_embeddings": False}
    weights = random_weights(untied)
    write_hf(tmp_path, weights, {"tie_word_embeddings": False})
    same(load(tmp_path, untied), weights)


def test_no_folder_and_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "is not a folder")
    refused(tmp_path, r"has no checkpoint: expected consolidated\.00\.pth")


def test_missing_keys_and_keys_of_another_model(tmp_path, weights):
    gone = weights.pop("layers.1.mlp.w2.weight")
    write_meta(tmp_path, weights)
    refused(tmp_path, r"1 keys missing \(first: layers\.1\.mlp\.w2\.weight\)")
    write_meta(tmp_path, weights | {"layers.1.mlp.w2.weight": gone, "layers.2.mlp.w2.weight": gone})
    refused(tmp_path, r"1 keys not of this model \(first: layers\.2\.feed_forward\.w2\.weight\)")


def test_a_resized_vocabulary(tmp_path, weights):
    write_meta(tmp_path, weights | {"tok_embeddings.weight": torch.zeros(800, 64)})
    refused(tmp_path, r"\(800, 64\).*\(768, 64\).*the vocabulary was resized")


CONTRADICTIONS = {
    "kv heads": ({"num_key_value_heads": 4}, "num_key_value_heads is 4, .* has num_kv_heads 2"),
    "theta": ({"rope_theta": 1e4}, "rope_theta is 10000.0, .* has rope_base 500000"),
    "no scaling": ({"rope_scaling": None}, "RoPE's scaling is {'rope_type': 'default'}, .* 'factor': 32"),
    "another factor": ({"rope_scaling": CONFIG["rope_scaling"] | {"factor": 8.0}}, "'factor': 8.0.* 'factor': 32"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'rope_type': 'linear'"),
    "eps": ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, .* has norm_eps 1e-05"),
    "feed-forward": ({"intermediate_size": 512}, "intermediate_size is 512, .* has intermediate_dim 256"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, .* has num_layers 2"),
    "vocabulary": ({"vocab_size": 770}, "vocab_size is 770, .* has vocab_size 768"),
    "head width": ({"head_dim": 32}, "head_dim is 32, .* has head_dim 16"),
    "positions": ({"max_position_embeddings": 128}, "max_position_embeddings is 128, .* has max_seq_len 256"),
    "family": (QWEN2, "model_type is qwen2, .* has family llama"),
}


@pytest.mark.parametrize("config, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_number_that_contradicts_config_json_is_named_with_both_values(config, message, tmp_path, weights):
    write_hf(tmp_path, weights, config)
    refused(tmp_path, message + r".*leave out the section model \(~model\)")
    with pytest.raises(UserError, match=message):
        check_start(tmp_path, meta_decoder(MODEL))  # before a weight is read


@pytest.mark.parametrize(
    "change, message",
    [({"norm_eps": 1e-6}, "norm_eps is 1e-05"), ({"rope_base": 10000}, "rope_theta"), ({"scale_factor": 1}, "scaled")],
)
def test_params_json_is_compared_too(change, message, tmp_path, weights):
    save_float(tmp_path, weights, model_params(meta_decoder(MODEL)))
    load(tmp_path)
    with pytest.raises(UserError, match=f"params.json: .*{message}"):
        load(tmp_path, MODEL | change)


def test_fewer_positions_than_the_checkpoint_has_are_a_choice(tmp_path, weights):
    write_hf(tmp_path, weights)
    same(load(tmp_path, MODEL | {"max_seq_len": 128}), weights)


def test_weights_that_are_not_those_of_config_json(tmp_path, weights):
    write_hf(tmp_path, weights | {"tok_embeddings.weight": torch.zeros(770, 64)})
    message = r"model.embed_tokens.weight has shape \(770, 64\), the model of config.json \(768, 64\); the vocabulary"
    refused(tmp_path, message)
    with pytest.raises(UserError, match=message):
        check_start(tmp_path, meta_decoder(MODEL))
    write_hf(tmp_path, weights, {}, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    refused(tmp_path, r"1 keys not of this model \(first: model.layers.0.self_attn.q_proj.bias\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_counted(value, tmp_path, weights):
    weights["layers.1.mlp.w2.weight"][3, :2] = value
    write_hf(tmp_path, weights)
    refused(tmp_path, "model.layers.1.mlp.down_proj.weight has 2 of 16384 values that are NaN or infinite")


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list instead of a model's weights"),
        (torch.ones(2), "holds a Tensor instead"),
        ({}, "holds an empty dict"),
        ({"norm.scale": torch.ones(2), "epoch": 3}, "holds more than tensors .'epoch' is a int."),
        ({"norm.scale": torch.ones(2, dtype=torch.int8)}, "is quantized already"),
    ],
)
def test_a_pickle_that_is_no_model(content, message, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path, message)


@pytest.mark.parametrize("below", ["model", "state_dict"])
def test_weights_below_a_key_are_found(below, tmp_path, weights):
    torch.save({below: weights, "epoch": 3}, tmp_path / "checkpoint.pt")
    same(load(tmp_path), weights)


def test_bin_files_are_read_in_shards_too(tmp_path):
    tensors = write_folder(tmp_path)
    expected = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = {k: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, k in enumerate(tensors)}
    for name in set(names.values()):
        torch.save({k: v for k, v in tensors.items() if names[k] == name}, tmp_path / name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    same(load(tmp_path), expected)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.safetensors"])
def test_torn_files_are_named(tmp_path, weights, name):
    write_meta(tmp_path, weights) if name.endswith("pth") else write_hf(tmp_path, weights)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    refused(tmp_path, f"{name}.*is the file whole")


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"norm.weight": Evil()}, tmp_path / "consolidated.00.pth")
    refused(tmp_path, "cannot be read")
    assert not (tmp_path / "ran").exists()
