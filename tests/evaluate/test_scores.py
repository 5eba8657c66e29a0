"""Scores against plain formulas, and the report's arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import trained_like

from llamaq.data.batches import collate_sft
from llamaq.evaluate.scores import (
    Scores,
    score_file,
    score_metrics,
    score_model,
    score_models,
    share_of_kl,
    share_won_back,
)
from llamaq.model import compare
from llamaq.model.compare import agreement
from llamaq.quant.scheme import Scheme
from llamaq.report import tables


def make_samples() -> list[dict]:
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 768, (n,), generator=g).tolist() for n in (9, 17, 5, 12)]
    return [{"tokens": t, "labels": [-100, -100, *t[2:]]} for t in rows]


@pytest.mark.parametrize("batch_size, chunk", [(1, 1024), (3, 7)])
def test_scores_equal_the_formulas_sample_by_sample(batch_size, chunk, monkeypatch):
    monkeypatch.setattr(compare, "HEAD_CHUNK_TOKENS", chunk)
    model, reference, samples = trained_like(Scheme()), trained_like(None), make_samples()
    result = score_model(model, {"ref": reference}, samples, lambda s: collate_sft(s, 0), batch_size, "x")
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


def test_a_file_scores_as_its_model_does_up_to_the_tokens_asked_for():
    """The model itself stands for the file: the first samples that fit, cut to the file's context."""
    model, reference, samples = trained_like(Scheme()), trained_like(None), make_samples()

    def logits_of(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens]))[0]

    def collate(batch: list[dict]) -> dict:
        return collate_sft(batch, 0)

    read = score_file(logits_of, {"ref": reference}, samples, collate, max_tokens=27, max_length=100, title="x")
    expected = score_model(model, {"ref": reference}, samples[:2], collate, 1, "x")
    assert read.tokens.tolist() == expected.tokens.tolist() == [7, 15]
    assert read.means() == pytest.approx(expected.means(), rel=1e-5, abs=1e-7)
    assert len(score_file(logits_of, {}, samples, collate, max_tokens=1, max_length=100, title="x").tokens) == 1
    cut = score_file(logits_of, {}, samples, collate, max_tokens=1000, max_length=6, title="x")
    assert cut.tokens.tolist() == [5, 5, 3, 5]  # tokens up to the sixth are read, and each predicts the next


def test_models_are_scored_against_references_that_are_built_once():
    built = []

    def maker(name: str, scheme: Scheme | None):
        def make():
            built.append(name)
            return trained_like(scheme)

        return make

    makers = {"bf16": maker("bf16", None), "ptq": maker("ptq", Scheme())}
    found = score_models(makers, ["bf16"], make_samples(), lambda s: collate_sft(s, 0), 2, torch.device("cpu"))
    assert built == ["bf16", "ptq"]
    assert float(found["bf16"].kl["bf16"].sum()) == 0 < float(found["ptq"].kl["bf16"].sum())
    metrics = score_metrics(found)
    assert metrics["samples"] == 4 and metrics["tokens"] == 7 + 15 + 3 + 10
    assert metrics["scores"]["bf16"]["top1/bf16"] == 1


def test_share_won_back():
    control, ptq = scores([10, 20, 30, 40]), scores([11, 21, 31, 41])
    model = scores([10.25, 20.25, 30.25, 40.25])
    share = share_won_back(ptq, model, control)
    assert share["share"] == share["low"] == share["high"] == 0.75  # the same in every sample: no uncertainty
    assert share["lost_nats_per_token"] == pytest.approx(0.1)
    uneven = share_won_back(ptq, scores([10.0, 20.0, 31.0, 41.0]), control)
    assert uneven["share"] == 0.5 and uneven["low"] < 0.5 < uneven["high"]


def test_share_of_kl_is_of_what_ptq_loses():
    ptq, model = scores([1.0] * 4), scores([1.0] * 4)
    ptq.kl["bf16"], model.kl["bf16"] = torch.tensor([4.0, 8, 2, 6]).double(), torch.tensor([1.0, 2, 0.5, 1.5]).double()
    assert share_of_kl(ptq, model, "bf16") == {"share": 0.75, "low": 0.75, "high": 0.75}
    model.kl["bf16"] = torch.tensor([4.0, 0, 0, 1]).double()
    uneven = share_of_kl(ptq, model, "bf16")
    assert uneven["share"] == 0.75 and uneven["low"] < 0.75 < uneven["high"] <= 1


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
    text = tables.quality_table(
        {"bf16": {"nll": 1.0, "perplexity": 2.718, "kl/bf16": 0.0, "top1/bf16": 1.0, "top5/bf16": 1.0}}
    )
    assert text.splitlines()[2] == "| BF16 start | 1.0000 | 2.718 | 0.00e+00 | 1.0000 | 1.0000 |"
    same = {"relative_error": 0.0, "token_error": 0.0, "sqnr_db": math.inf, "kl": 0.0, "top1": 1.0}
    assert "∞" in tables.hand_over_table({"converted": same})
