"""The Cayley map is exact and its gradient right; both ways of moving a rotation keep it orthogonal."""

import pytest
import torch
from toy import SHAPE

from llamaq.model.shape import Shape
from llamaq.spinquant.cayley import CayleyRotations, cayley, sgdg_step
from llamaq.spinquant.rotations import Rotations


def test_the_cayley_map_of_1_is_a_turn_by_90_degrees():
    torch.testing.assert_close(cayley(torch.tensor([[0.0, 1], [0, 0]])), torch.tensor([[0.0, -1], [1, 0]]))


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
