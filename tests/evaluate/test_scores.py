"""Scores against plain formulas, and the report's arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import trained_like

from llamaq.data.datasets import collate_sft
from llamaq.evaluate.scores import Scores, agreement, score, share_won_back
from llamaq.model import causal_lm as model_module
from llamaq.quant.scheme import Scheme
from llamaq.report import page


def make_samples() -> list[dict]:
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 768, (n,), generator=g).tolist() for n in (9, 17, 5, 12)]
    return [{"tokens": t, "labels": [-100, -100, *t[2:]]} for t in rows]


@pytest.mark.parametrize("batch_size, chunk", [(1, 1024), (3, 7)])
def test_scores_equal_the_formulas_sample_by_sample(batch_size, chunk, monkeypatch):
    monkeypatch.setattr(model_module, "HEAD_CHUNK_TOKENS", chunk)
    model, reference, samples = trained_like(Scheme()), trained_like(None), make_samples()
    result = score(model, {"ref": reference}, samples, lambda s: collate_sft(s, 0), batch_size, "x")
    for i, sample in enumerate(samples):
        tokens = torch.tensor([sample["tokens"]])
        with torch.no_grad():
            q, p = model(tokens)[0, 1:-1].log_softmax(-1), reference(tokens)[0, 1:-1].log_softmax(-1)
        labels = tokens[0, 2:]
        assert result.tokens[i] == len(labels)
        assert result.nll[i] == pytest.approx(F.nll_loss(q, labels, reduction="sum").item(), rel=1e-5)
        assert result.kl["ref"][i] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3, abs=1e-5)
        assert result.top1["ref"][i] == (p.argmax(-1) == q.argmax(-1)).sum()
    means = result.means()
    assert means["perplexity"] == pytest.approx(math.exp(float(result.nll.sum() / result.tokens.sum())))


def scores(nll: list[float]) -> Scores:
    return Scores(torch.full((len(nll),), 10.0, dtype=torch.float64), torch.tensor(nll, dtype=torch.float64), {}, {})


def test_share_won_back():
    control, ptq = scores([10, 20, 30, 40]), scores([11, 21, 31, 41])
    model = scores([10.25, 20.25, 30.25, 40.25])
    share = share_won_back(ptq, model, control)
    assert share["share"] == share["low"] == share["high"] == 0.75  # the same in every sample: no uncertainty
    assert share["lost_nats_per_token"] == pytest.approx(0.1)
    uneven = share_won_back(ptq, scores([10.0, 20.0, 31.0, 41.0]), control)
    assert uneven["share"] == 0.5 and uneven["low"] < 0.5 < uneven["high"]


def test_agreement_of_equal_and_of_scaled_logits():
    logits = torch.randn(50, 30)
    equal = agreement(logits, logits.clone())
    assert equal["relative_error"] == equal["kl"] == 0 and equal["top1"] == 1 and equal["sqnr_db"] == math.inf
    off = agreement(logits, logits * 1.01)
    assert off["relative_error"] == pytest.approx(0.01, rel=1e-4) and off["sqnr_db"] == pytest.approx(40, rel=1e-3)
    one_token = logits.clone()
    one_token[7] += 1
    assert agreement(logits, one_token)["token_error"] == 0 < agreement(logits, one_token)["relative_error"]


def test_tables():
    text = page.quality_table(
        {"bf16": {"nll": 1.0, "perplexity": 2.718, "kl/bf16": 0.0, "top1/bf16": 1.0, "top5/bf16": 1.0}}
    )
    assert text.splitlines()[2] == "| BF16 start | 1.0000 | 2.718 | 0.00e+00 | 1.0000 | 1.0000 |"
    same = {"relative_error": 0.0, "token_error": 0.0, "sqnr_db": math.inf, "kl": 0.0, "top1": 1.0}
    assert "∞" in page.hand_over_table({"converted": same})
