"""The gates: absolute limits, and what rounding alone does to a model."""

import math

import pytest
import torch
from conftest import MODEL, random_weights

from llamaq.config import ExportConfig
from llamaq.errors import UserError
from llamaq.export.gates import Expected, check_gate, rounding_noise
from llamaq.model.build import build_model
from llamaq.quant.scheme import Scheme

NOISE = {"token_error": 0.02, "kl": 0.025, "top1": 0.9}


@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [("token_error", 0.06, 0.061), ("kl", 0.075, 0.0751), ("top1", 0.71, 0.69), ("kl", 1e-3, math.nan)],
)
def test_three_times_what_rounding_does_passes_and_no_more(name, passes, fails):
    limits = ExportConfig()
    check_gate(limits, "model", {name: passes}, name, noise=NOISE)
    with pytest.raises(UserError, match=rf"gate missed: model has {name} .* and rounding alone gives"):
        check_gate(limits, "model", {name: fails}, name, noise=NOISE)


def test_a_limit_counts_where_rounding_does_less_and_alone_where_it_is_asked_to():
    quiet = {"token_error": 1e-7, "kl": 1e-9, "top1": 1.0}
    check_gate(ExportConfig(), "model", {"kl": 9e-4, "top1": 1.0}, "kl", "top1", noise=quiet)
    with pytest.raises(UserError, match=r"top1 0\.99, export\.min_top1_agreement is 1"):
        check_gate(ExportConfig(), "model", {"top1": 0.99}, "top1", noise=quiet)
    with pytest.raises(UserError, match=r"kl 0\.002, export\.max_kl is 0\.001"):
        check_gate(ExportConfig(noise_factor=0), "model", {"kl": 2e-3}, "kl", noise=NOISE)
    with pytest.raises(UserError, match=r"is 0\.001: what would ship"):
        check_gate(ExportConfig(), "model", {"kl": 2e-3}, "kl")


def test_noise_is_last_places_in_a_shallow_model_and_leaves_the_model_as_it_was():
    weights = {k: v * 8 if k.endswith(".weight") and v.ndim == 2 else v for k, v in random_weights(MODEL).items()}
    model = build_model(MODEL, weights, Scheme(), frozen=True).eval()
    tokens = torch.randint(0, MODEL["vocab_size"], (24,), generator=torch.Generator().manual_seed(3)).tolist()

    def logits_of(contexts: list[list[int]]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(torch.tensor([t]))[0] for t in contexts]

    before = Expected.of(logits_of, tokens, 4)
    with torch.no_grad():
        noise = rounding_noise(model, before, tokens, 4)
    assert 0 < noise["pte"]["token_error"] < 1e-4  # most tokens; some meet a border between int8 levels
    assert noise["pte"]["relative_error"] < 0.1
    after = Expected.of(logits_of, tokens, 4)
    assert torch.equal(before.long, after.long) and torch.equal(before.short, after.short)
