"""Learning: the map is exact, its gradient right, the objective what it says, the published one as published."""

import pytest
import torch
from conftest import MODEL, random_weights

from llamaq.model.causal_lm import build_decoder, meta_decoder
from llamaq.quant.scheme import Scheme
from llamaq.spinquant.calibrate import Statistics, collect, from_tensors, to_tensors
from llamaq.spinquant.expected_noise import (
    CayleyRotations,
    EndToEnd,
    ExpectedNoise,
    cayley,
    kl,
    learn_as_published,
    learn_by_noise,
    refine,
    sgdg_step,
)
from llamaq.spinquant.rotations import Rotations, Shape, attach_online, fuse_norms

ALL = {"r1", "r2", "r4"}
SHAPE = Shape.of(meta_decoder(MODEL))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    w = random_weights()
    w["layers.0.attn.q_proj.weight"][:, 5] *= 30  # an outlier that a rotation can spread
    return w


def tokens(n: int = 4) -> list[torch.Tensor]:
    return list(torch.randint(768, (n, 2, 24), generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def statistics(weights) -> Statistics:
    decoder = build_decoder(MODEL, fuse_norms(weights, SHAPE)).eval().requires_grad_(False)
    return collect(decoder, SHAPE, tokens(), seed=0)


def noise(weights, statistics, rows: int | None = None) -> ExpectedNoise:
    return ExpectedNoise(fuse_norms(weights, SHAPE), SHAPE, statistics, Scheme(), True, rows, 0, torch.device("cpu"))


def test_the_gradient_of_the_cayley_map():
    a = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cayley, (a,))


@pytest.mark.parametrize("steps", [1, 100, 1000])
def test_rotations_stay_orthogonal_however_long_one_learns(steps):
    learner, generator = CayleyRotations(Rotations.random(SHAPE, {"r1"}, 0), "cpu"), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(learner.groups(2e-2))
    (group,) = optimizer.param_groups
    for _ in range(steps):
        group["params"][0].grad = torch.randn(64, 64, generator=generator)
        optimizer.step()
    with torch.no_grad():
        r = learner()
    assert r.orthogonality_error() < 1e-6 and r.projected().orthogonality_error() < 1e-12


def test_published_steps_stay_nearly_orthogonal():
    r = Rotations.random(SHAPE, {"r1"}, 0).r1
    assert r is not None
    r, generator = r.float(), torch.Generator().manual_seed(0)
    for _ in range(100):
        r = sgdg_step(r, torch.randn(64, 64, generator=generator), 1.5)
    assert Rotations(r1=r).orthogonality_error() < 1e-4
    assert Rotations(r1=r).projected().orthogonality_error() < 1e-12


def test_published_steps_go_downhill():
    target = Rotations.random(Shape(1, 16, 2, 1, 8, 64), {"r1"}, 3).r1
    assert target is not None
    r, target = torch.eye(16), target.float()
    if torch.det(target) < 0:
        target[:, 0] *= -1
    before = (r - target).norm()
    for _ in range(300):
        r = sgdg_step(r, r - target, 0.1)
    assert (r - target).norm() < 0.2 * before


def test_learning_lowers_the_expected_noise_and_stays_orthogonal(weights, statistics):
    learned = learn_by_noise(noise(weights, statistics), Rotations.random(SHAPE, ALL, 0), 40, 2e-2)
    assert learned.losses[0] == 1.0 and learned.losses[-1] < 0.95
    assert learned.rotations.orthogonality_error() < 1e-12


def test_learning_is_deterministic_by_seed(weights, statistics):
    a, b, c = (
        learn_by_noise(noise(weights, statistics, rows=16), Rotations.random(SHAPE, ALL, s), 5, 2e-2).rotations.r1
        for s in (0, 0, 1)
    )
    assert a is not None and b is not None and c is not None
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_objective_is_the_variance_of_rounding(weights, statistics, monkeypatch):
    """With the true maximum for the smooth one it is what errors uniform within a step cost: E[Σ F (Δ H Δᵀ)]."""
    monkeypatch.setattr("llamaq.spinquant.expected_noise.SMOOTH", float("inf"))
    w = weights["layers.1.mlp.w1.weight"] * weights["layers.1.mlp_norm.scale"]
    h, fisher = statistics.layers[1].mlp_in, torch.rand(len(w))
    step = w.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(200):
        delta = (torch.rand(w.shape, generator=generator) - 0.5) * step.repeat_interleave(32, 1)
        found.append((fisher[:, None] * (delta @ h) * delta).sum())
    expected = float(torch.stack(found).mean())
    assert float(noise(weights, statistics)._noise(w, fisher, h.diagonal())) == pytest.approx(expected, rel=0.03)


def test_statistics_are_the_moments_of_what_linears_read(weights, statistics):
    decoder = build_decoder(MODEL, fuse_norms(weights, SHAPE)).eval()
    read = []
    decoder.get_submodule("layers.1.mlp.w1").register_forward_pre_hook(lambda m, a: read.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in tokens():
            decoder(batch)
    x = torch.cat(read)
    torch.testing.assert_close(statistics.layers[1].mlp_in, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_fisher_is_the_gradients_second_moment(weights):
    """Layer by layer, with sampled labels, it is what one backward pass through the whole model gives."""
    decoder = build_decoder(MODEL, fuse_norms(weights, SHAPE)).eval()
    batch = tokens(1)
    ours = collect(decoder, SHAPE, batch, seed=5)
    outputs = []
    decoder.get_submodule("layers.0.mlp.w1").register_forward_hook(
        lambda m, a, y: (y.retain_grad(), outputs.append(y))[0]
    )
    generator = torch.Generator().manual_seed(5)
    torch.rand(batch[0].numel(), generator=generator)  # collect first draws the tokens it keeps
    logits = decoder(batch[0]).flatten(0, 1)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    expected = outputs[0].grad.flatten(0, 1).square().mean(0)
    torch.testing.assert_close(ours.layers[0].fisher["mlp.w1"], expected, rtol=1e-3, atol=1e-7)


def test_statistics_survive_writing(statistics):
    back = from_tensors(to_tensors(statistics), "cpu")
    assert torch.equal(back.layers[1].fisher["attn.v_proj"], statistics.layers[1].fisher["attn.v_proj"])
    assert torch.equal(back.layers[0].values_in, statistics.layers[0].values_in)
    assert back.embedding_fisher == statistics.embedding_fisher


def end_to_end(weights, scheme=None) -> EndToEnd:
    untied = weights | {"output.weight": weights["tok_embeddings.weight"]}
    return EndToEnd(build_decoder(MODEL, untied).eval(), untied, SHAPE, 256, scheme)


def test_without_quantizers_the_riemannian_gradient_is_zero(weights):
    """A float model's loss does not depend on its rotation: RᵀG is symmetric."""
    wide = {k: v.double() for k, v in weights.items()}
    model = end_to_end(wide)
    model.decoder.double()
    model.close()
    attach_online(model.decoder, 256)
    r = Rotations.random(SHAPE, ALL, 0)
    assert r.r1 is not None and r.r2 is not None
    r.r1.requires_grad_()
    r.r2.requires_grad_()
    loss = kl(torch.zeros(2, 24, 768), model.logits(r, tokens()[0]))
    for matrix, grad in zip((r.r1, r.r2), torch.autograd.grad(loss, (r.r1, r.r2)), strict=True):
        along = matrix.detach().mT @ grad
        assert grad.norm() > 1e-4  # it does depend on a matrix that is not orthogonal
        assert (along - along.mT).norm() < 1e-5 * grad.norm()  # torchtune's norms and RoPE round to float32


def test_published_learning_runs_and_barely_moves(weights):
    start = Rotations.random(SHAPE, ALL, 0)
    learned = learn_as_published(end_to_end(weights), start, tokens(), 3, 1.5)
    assert learned.rotations.r1 is not None and start.r1 is not None
    assert 0 < (learned.rotations.r1 - start.r1).norm() / 8 < 0.1 and len(learned.losses) == 3
    assert learned.rotations.orthogonality_error() < 1e-12


def test_refining_lowers_the_kl_of_the_quantized_model(weights):
    untied = weights | {"output.weight": weights["tok_embeddings.weight"]}
    teacher = build_decoder(MODEL, untied).eval().requires_grad_(False)
    learned = refine(end_to_end(weights, Scheme()), teacher, Rotations.random(SHAPE, ALL, 0), tokens(1), 30, 5e-3)
    assert min(learned.losses[-5:]) < 0.95 * learned.losses[0]
    assert learned.rotations.orthogonality_error() < 1e-12
