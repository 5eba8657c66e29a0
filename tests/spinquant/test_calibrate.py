"""Statistics are what one pass through the whole model gives, and survive writing."""

import pytest
import torch
from conftest import MODEL
from toy import SHAPE, toy_statistics, toy_tokens, toy_weights

from llamaq.model.build import build_decoder
from llamaq.spinquant.calibrate import Statistics, collect, from_tensors, to_tensors
from llamaq.spinquant.rotations import fuse_norms


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return toy_weights()


@pytest.fixture(scope="module")
def statistics(weights) -> Statistics:
    return toy_statistics(weights)


def test_statistics_are_the_moments_of_what_linears_read(weights, statistics):
    decoder = build_decoder(MODEL, fuse_norms(weights, SHAPE)).eval()
    read = []
    decoder.get_submodule("layers.1.mlp.w1").register_forward_pre_hook(lambda m, a: read.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in toy_tokens():
            decoder(batch)
    x = torch.cat(read)
    torch.testing.assert_close(statistics.layers[1].mlp_in, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_fisher_is_the_gradients_second_moment(weights):
    """Layer by layer, with sampled labels, it is what one backward pass through the whole model gives."""
    decoder = build_decoder(MODEL, fuse_norms(weights, SHAPE)).eval()
    batch = toy_tokens(1)
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
