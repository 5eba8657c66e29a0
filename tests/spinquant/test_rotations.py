"""A rotated model is the same function, for every subset of rotations and every shape; the contract is checked."""

import itertools
import math

import pytest
import torch

from llamaq.errors import UserError
from llamaq.model.build import build_decoder, meta_decoder
from llamaq.model.hadamard import hadamard
from llamaq.model.online import attach_online, check_contract, online_block, online_gain, online_transform
from llamaq.model.shape import Shape
from llamaq.spinquant.rotations import Rotations, fuse_norms, rotate

SUBSETS = [set(c) for n in range(4) for c in itertools.combinations(("r1", "r2", "r4"), n)]


def model(dim=96, heads=4, kv_heads=2, hidden=256, name="llama3_2.llama3_2", **more) -> dict:
    return {
        "_component_": f"torchtune.models.{name}",
        "vocab_size": 50,
        "num_layers": 2,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "embed_dim": dim,
        "intermediate_dim": hidden,
        "max_seq_len": 32,
        **more,
    }


def weights_of(component: dict) -> dict[str, torch.Tensor]:
    weights = {k: v.detach().double() for k, v in build_decoder(component).state_dict().items()}
    return {k: torch.rand_like(v) + 0.5 if "norm" in k else torch.randn_like(v) * 0.2 for k, v in weights.items()}


@pytest.fixture(autouse=True)
def _float64_all_through(monkeypatch):
    """Torchtune's norms and RoPE compute in float32 by calling `.float()`."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@torch.no_grad()
def logits(component: dict, weights: dict[str, torch.Tensor], block: int = 0) -> torch.Tensor:
    decoder = build_decoder(component, weights).double().eval()
    attach_online(decoder, block)
    return decoder(torch.arange(12)[None])


def relative_change(component: dict, weights: dict, changed: dict, block: int = 0) -> float:
    expected = logits(component, weights)
    return float((logits(component, changed, block) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("which", SUBSETS, ids=lambda s: "+".join(sorted(s)) or "none")
@pytest.mark.parametrize(
    "component",
    [
        model(),
        model(name="llama3.llama3"),  # untied
        model(name="qwen2.qwen2", tie_word_embeddings=True),  # biases on q, k and v
        model(heads=4, kv_heads=4),
    ],
    ids=["tied", "untied", "biases", "multi-head"],
)
def test_rotated_models_give_the_same_logits_in_float64(component, which):
    weights, shape = weights_of(component), Shape.of(meta_decoder(component))
    r = Rotations.random(shape, which, seed=1)
    assert relative_change(component, weights, rotate(weights, shape, r), r.r4) < 1e-9


@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 128])
@pytest.mark.parametrize("hidden", [768, 3584])
def test_head_dims_and_widths(head_dim, hidden):
    component = model(dim=2 * head_dim, heads=2, kv_heads=1, hidden=hidden)
    weights, shape = weights_of(component), Shape.of(meta_decoder(component))
    r = Rotations.random(shape, {"r1", "r2", "r4"}, seed=0)
    assert relative_change(component, weights, rotate(weights, shape, r), r.r4) < 1e-9


@pytest.mark.parametrize("hidden", [8192, 4864])
def test_wide_feed_forwards(hidden):
    component = model(dim=32, heads=2, kv_heads=1, hidden=hidden)
    weights, shape = weights_of(component), Shape.of(meta_decoder(component))
    r = Rotations.random(shape, {"r1", "r2", "r4"}, seed=0)
    assert relative_change(component, weights, rotate(weights, shape, r), r.r4) < 1e-9


def test_the_published_mistakes_would_be_noticed():
    """Centring embedding rows, leaving R4 out, and rotating a tied matrix twice change the function."""
    component = model()
    weights, shape = weights_of(component), Shape.of(meta_decoder(component))
    r = Rotations.random(shape, {"r1", "r2", "r4"}, seed=0)
    rotated = rotate(weights, shape, r)
    assert relative_change(component, weights, rotated, block=0) > 0.01
    centred = fuse_norms(weights, shape)
    centred["tok_embeddings.weight"] -= centred["tok_embeddings.weight"].mean(1, keepdim=True)
    assert relative_change(component, weights, rotate(centred, shape, r), r.r4) > 1e-3
    assert not torch.equal(rotated["output.weight"], rotated["tok_embeddings.weight"])


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 36, 44, 48, 60, 64, 76, 80, 96, 108, 128, 140, 148, 3072, 4864])
def test_hadamard_matrices(n):
    h = hadamard(n)
    assert h is not None and set(h.unique().tolist()) <= {-1, 1}
    assert torch.equal(h.float() @ h.float().T, n * torch.eye(n))


def test_orders_without_a_construction_get_a_random_rotation():
    assert hadamard(172) is None and hadamard(18944) is not None
    shape = Shape(layers=1, dim=92, heads=2, kv_heads=1, head_dim=46, hidden=64)
    assert Rotations.random(shape, {"r1", "r2"}, seed=0).orthogonality_error() < 1e-12


@pytest.mark.parametrize("n", [2, 64, 8192, 28, 56, 3584])
def test_the_online_transform_is_executorchs_operator(n):
    from llamaq.export.patches import hadamard_operator

    x = torch.randn(3, n)
    torch.testing.assert_close(online_transform(x, online_block(n)), hadamard_operator()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [64, 56, 3584])
def test_the_online_transform_is_the_dense_matrix(n):
    h, x = hadamard(n), torch.randn(3, n, dtype=torch.float64)
    assert h is not None
    torch.testing.assert_close(online_transform(x, n), online_gain(n) / math.sqrt(n) * x @ h.double())


def test_blocks_where_executorch_takes_no_whole_width():
    assert [online_block(n) for n in (8192, 14336, 768, 11008, 4864, 18944)] == [8192, 14336, 256, 256, 256, 512]


def test_same_seed_same_rotations():
    shape = Shape.of(meta_decoder(model()))
    a, b, c = (Rotations.random(shape, {"r1", "r2"}, seed=s) for s in (3, 3, 4))
    assert a.r1 is not None and b.r1 is not None and c.r1 is not None
    assert torch.equal(a.r1, b.r1) and not torch.equal(a.r1, c.r1)


def test_real_shapes():
    for name, heads, head_dim in (("llama3_2_1b", 32, 64), ("llama3_2_3b", 24, 128)):
        shape = Shape.of(meta_decoder({"_component_": f"torchtune.models.llama3_2.{name}"}))
        assert (shape.heads, shape.kv_heads, shape.head_dim, shape.hidden) == (heads, 8, head_dim, 8192)
        assert hadamard(shape.dim) is not None and online_block(shape.hidden) == 8192


def test_contract():
    good = {"r1": True, "r2": True, "r4": 256}
    assert check_contract(good, True, 256, "x") == 256
    assert check_contract({**good, "r4": 0}, False, 256, "x") == 0 and check_contract(None, False, 256, "x") == 0
    for contract, spinquant, hidden, words in (
        (None, True, 256, "which rotations"),
        ({**good, "r4": 0}, True, 256, "contradicts"),
        (good, False, 256, "contradicts"),
        (good, True, 512, "does not fit"),
    ):
        with pytest.raises(UserError, match=words):
            check_contract(contract, spinquant, hidden, "x")
