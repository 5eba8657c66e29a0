"""Learning by the rotated model's loss: no gradient without quantizers, the published way as published, refining."""

import pytest
import torch
from conftest import MODEL
from toy import ALL, SHAPE, toy_tokens, toy_weights

from llamaq.model.build import build_decoder
from llamaq.model.compare import kl_divergence
from llamaq.model.online import attach_online
from llamaq.quant.scheme import Scheme
from llamaq.spinquant.end_to_end import EndToEnd, learn_as_published, refine
from llamaq.spinquant.rotations import Rotations


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return toy_weights()


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
    uniform = torch.zeros(2, 24, 768).log_softmax(-1)
    loss = kl_divergence(uniform, model.logits(r, toy_tokens()[0]).float().log_softmax(-1)).mean()
    for matrix, grad in zip((r.r1, r.r2), torch.autograd.grad(loss, (r.r1, r.r2)), strict=True):
        along = matrix.detach().mT @ grad
        assert grad.norm() > 1e-4  # it does depend on a matrix that is not orthogonal
        assert (along - along.mT).norm() < 1e-5 * grad.norm()  # torchtune's norms and RoPE round to float32


def test_published_learning_runs_and_barely_moves(weights):
    start = Rotations.random(SHAPE, ALL, 0)
    learned = learn_as_published(end_to_end(weights), start, toy_tokens(), 3, 1.5)
    assert learned.rotations.r1 is not None and start.r1 is not None
    assert 0 < (learned.rotations.r1 - start.r1).norm() / 8 < 0.1 and len(learned.losses) == 3
    assert learned.rotations.orthogonality_error() < 1e-12


def test_refining_lowers_the_kl_of_the_quantized_model(weights):
    untied = weights | {"output.weight": weights["tok_embeddings.weight"]}
    teacher = build_decoder(MODEL, untied).eval().requires_grad_(False)
    learned = refine(end_to_end(weights, Scheme()), teacher, Rotations.random(SHAPE, ALL, 0), toy_tokens(1), 120, 1e-2)
    assert min(learned.losses[-5:]) < 0.95 * learned.losses[0]
    assert learned.rotations.orthogonality_error() < 1e-12
