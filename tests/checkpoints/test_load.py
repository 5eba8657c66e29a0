"""The three layouts give the same weights; what does not fit is refused by name."""

import json

import pytest
import torch
from conftest import MODEL, random_weights
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf, tune_to_meta

from llamaq.checkpoints.load import load_checkpoint
from llamaq.errors import UserError
from llamaq.model.build import build_decoder

HF_CONFIG = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_meta(folder, weights, **extra):
    torch.save(tune_to_meta(weights) | extra, folder / "consolidated.00.pth")


def write_hf(folder, weights, config=HF_CONFIG, **extra):
    tensors = tune_to_hf(weights, num_heads=4, num_kv_heads=2, dim=64) | extra
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def weights():
    return random_weights()


def load(folder):
    with torch.device("meta"):
        decoder = build_decoder(MODEL)
    return load_checkpoint(folder, decoder)


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
    write_hf(tmp_path, weights, **{"lm_head.weight": weights["tok_embeddings.weight"] + 1})
    refused(tmp_path, "differs from the embedding.*tie")


def test_no_folder_and_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "is not a folder")
    refused(tmp_path, r"has no checkpoint: expected consolidated\.00\.pth")


def test_missing_keys_and_keys_of_another_model(tmp_path, weights):
    gone = weights.pop("layers.1.mlp.w2.weight")
    write_meta(tmp_path, weights)
    refused(tmp_path, r"1 keys missing \(first: layers\.1\.mlp\.w2\.weight\)")
    write_meta(tmp_path, weights | {"layers.1.mlp.w2.weight": gone, "layers.2.mlp.w2.weight": gone})
    refused(tmp_path, r"1 keys not of this model \(first: layers\.2\.mlp\.w2\.weight\)")


def test_a_resized_vocabulary(tmp_path, weights):
    write_meta(tmp_path, weights | {"tok_embeddings.weight": torch.zeros(800, 64)})
    refused(tmp_path, r"\(800, 64\).*\(768, 64\).*the vocabulary was resized")


def test_another_models_config_json(tmp_path, weights):
    write_hf(tmp_path, weights, HF_CONFIG | {"num_key_value_heads": 4})
    refused(tmp_path, "num_key_value_heads is 4, but the model of this config has 2")


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
