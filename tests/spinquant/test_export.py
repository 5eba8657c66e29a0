"""Rotated checkpoints through ExecuTorch's own loader; a rotation that is forgotten or contradicted is noticed."""

import json

import pytest
import torch
from conftest import MODEL, random_weights, saved_rotated

from llamaq.checkpoints.quantized import load_quantized
from llamaq.errors import UserError
from llamaq.export import exporter
from llamaq.model.build import build_decoder
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import agreement
from llamaq.quant.prepare import prepare
from llamaq.quant.scheme import Scheme

TOKENS = torch.arange(3, 40)[None]


@pytest.mark.parametrize(
    ("which", "hidden"),
    [
        (set(), 256),
        ({"r4"}, 256),
        ({"r2", "r4"}, 256),
        ({"r1", "r2", "r4"}, 256),
        ({"r1", "r2", "r4"}, 192),
        ({"r1", "r2"}, 256),
    ],
    ids=["none", "r4", "r2_r4", "all", "all in blocks", "offline only"],
)
@torch.no_grad()
def test_llamaq_and_executorch_read_the_same_model(tmp_path, which, hidden):
    ours = saved_rotated(tmp_path / "m", which, hidden)(TOKENS)[0]
    model = MODEL | {"intermediate_dim": hidden}
    decoder = prepare(build_decoder(model, random_weights(model)), Scheme())
    back = CausalLM(load_quantized(tmp_path / "m", decoder)).eval()(TOKENS)[0]
    assert torch.equal(ours, back)
    eager = exporter.load_eager(tmp_path / "m", TOKENS.shape[1])(TOKENS)[0]
    result = agreement(ours, eager)
    assert result["relative_error"] < 1e-6 and result["top1"] == 1.0
    params = json.loads((tmp_path / "m" / "params.json").read_text())
    assert params["quantization_args"]["spinquant"] is ("r4" in which)


@torch.no_grad()
def test_leaving_the_online_transform_out_is_noticed(tmp_path, monkeypatch):
    ours = saved_rotated(tmp_path / "m", {"r1", "r2", "r4"})(TOKENS)[0]
    arguments = exporter.executorch_arguments

    def without(*a, **k):
        return [x for x in arguments(*a, **k) if x not in ("--use_spin_quant", "native")] + ["-qat"]

    monkeypatch.setattr(exporter, "executorch_arguments", without)
    wrong = exporter.load_eager(tmp_path / "m", TOKENS.shape[1])(TOKENS)[0]
    assert agreement(ours, wrong)["relative_error"] > 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spinquant": False}, "contradicts"),
        ({"rotation": None}, "which rotations"),
        ({"rotation": {"r1": True, "r2": True, "r4": 128}}, "does not fit"),
    ],
)
def test_a_contradicted_contract_is_refused_everywhere(tmp_path, change, words):
    saved_rotated(tmp_path / "m", {"r1", "r2", "r4"})
    path = tmp_path / "m" / "params.json"
    params = json.loads(path.read_text())
    params["quantization_args"] |= change
    path.write_text(json.dumps(params))
    decoder = prepare(build_decoder(MODEL, random_weights()), Scheme())
    with pytest.raises(UserError, match=words):
        load_quantized(tmp_path / "m", decoder)
    with pytest.raises(UserError, match=words):
        exporter.load_eager(tmp_path / "m", 8)
