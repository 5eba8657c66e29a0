"""Sensitivity maps and where models part, on models whose answer is known."""

import pytest
import torch
from conftest import MODEL, random_weights

from llamaq.evaluate.files import numerics
from llamaq.evaluate.sensitivity import (
    ENDS,
    Sensitivity,
    advice,
    divergence,
    first_divergence,
    quantize_only,
    sensitivity,
    units_of,
)
from llamaq.model.build import build_model
from llamaq.model.names import LINEARS
from llamaq.quant.scheme import Scheme

TOKENS = torch.randint(0, 768, (2, 24), generator=torch.Generator().manual_seed(1))


def spoiled(name: str) -> dict[str, torch.Tensor]:
    """Weights in which one linear has a huge weight in every group of 32, so that int4 leaves nothing of the others."""
    weights = random_weights()
    weights[name].view(-1, 32)[:, 0] = 3.0
    return weights


@pytest.mark.parametrize("unit", ["layers.0.mlp.w1", "layers.1.mlp.w3"])
def test_a_spoiled_linear_stands_out_in_both_maps(unit):
    model = build_model(MODEL, spoiled(f"{unit}.weight"), Scheme()).eval()
    s = sensitivity(model, [TOKENS])
    assert len(s.alone) == 2 * 7 + 1
    assert max(s.alone, key=s.alone.__getitem__) == unit
    saved = s.saved()
    assert max(saved, key=saved.__getitem__) == unit
    assert f"`{unit}`" in advice(s)[0]


def test_by_hand():
    """Nothing quantized is the float model; everything, the fake-quantized one; formats are put back."""
    weights = random_weights()
    model, bf16 = build_model(MODEL, weights, Scheme()).eval(), build_model(MODEL, weights, None).eval()
    units = units_of(model)
    with torch.no_grad():
        whole = model(TOKENS)
        with quantize_only(units, set()):
            assert torch.equal(model(TOKENS), bf16(TOKENS))
        p, q = bf16(TOKENS).log_softmax(-1), whole.log_softmax(-1)
        s = sensitivity(model, [TOKENS[:1], TOKENS[1:]])
        assert s.whole == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
        assert torch.equal(model(TOKENS), whole)
        only_ends = build_model(MODEL, weights, Scheme()).eval()
        for name, modules in units_of(only_ends).items():
            if name != ENDS:
                modules[0].fmt = None
        q = only_ends(TOKENS).log_softmax(-1)
    assert s.alone[ENDS] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_advice():
    """Literal maps: outliers before down_proj, one bad attention matrix kind, and nothing in particular."""
    even = {f"layers.{i}.{kind}": 1.0 for i in range(2) for kind in LINEARS} | {ENDS: 0.5}
    down = even | {"layers.0.mlp.w2": 12.0}
    lines = advice(Sensitivity(whole=sum(down.values()), alone=down, left_out=down))
    assert "`layers.0.mlp.w2` 47 %" in lines[0] and "R4" in lines[1] and len(lines) == 2
    lines = advice(Sensitivity(whole=7.0, alone=even | {"layers.1.attn.k_proj": 9.0}, left_out=even))
    assert "`attn.k_proj` takes 44 %" in lines[1] and "0.3 times" in lines[2] and "cancel" in lines[2]
    assert "No kind" in advice(Sensitivity(whole=14.5, alone=even, left_out=even))[1]
    assert "embedding and head take 42 %" in advice(Sensitivity(24.0, even | {ENDS: 10.0}, even))[2]


def test_divergence_names_the_block():
    weights = random_weights()
    other = {k: v.clone() for k, v in weights.items()}
    other["layers.1.mlp.w2.weight"] += 0.1
    a, b = build_model(MODEL, weights, None).eval(), build_model(MODEL, other, None).eval()
    errors = divergence(a, b, ("decoder.layers", "decoder.layers"), TOKENS[:1])
    assert errors[0] == 0 and errors[1] > 1e-3
    assert first_divergence(errors, 1e-4) == 1
    assert first_divergence([0.0, 0.0], 1e-4) is None


def test_what_arithmetic_alone_does():
    """A last place in float32 moves few logits, bf16 all; afterwards the model computes as before."""
    model = build_model(MODEL, random_weights(), Scheme()).eval()
    with torch.no_grad():
        before = model(TOKENS[:1])
        found = numerics(model, TOKENS[:1])
        assert torch.equal(model(TOKENS[:1]), before)
    assert 0 < found["float32"]["relative_error"] < 2e-3 < found["bf16"]["token_error"] < 0.1
