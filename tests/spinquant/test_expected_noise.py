"""The expected noise is the variance that rounding has; learning by it lowers it and is deterministic."""

import pytest
import torch
from toy import ALL, SHAPE, toy_statistics, toy_weights

from llamaq.quant.scheme import Scheme
from llamaq.spinquant.calibrate import Statistics
from llamaq.spinquant.expected_noise import ExpectedNoise, learn_by_noise
from llamaq.spinquant.rotations import Rotations, fuse_norms


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return toy_weights()


@pytest.fixture(scope="module")
def statistics(weights) -> Statistics:
    return toy_statistics(weights)


def noise(weights, statistics, rows: int | None = None) -> ExpectedNoise:
    return ExpectedNoise(fuse_norms(weights, SHAPE), SHAPE, statistics, Scheme(), rows, 0, torch.device("cpu"))


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
