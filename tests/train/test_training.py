"""The loss inside the forward pass, the objectives, the engine, and the loop: splits, ranks, resume, DPO."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ADAPTERS, MODEL, random_weights, small, trained_like

from llamaq.checkpoints.torchtune import save_weights, weights_of
from llamaq.errors import UserError
from llamaq.model import compare
from llamaq.model.build import build_model, ready_to_train
from llamaq.quant.modules import QuantizedLinear
from llamaq.quant.scheme import Scheme
from llamaq.runs.run import Run
from llamaq.runs.tracking import read_metrics
from llamaq.train import resume
from llamaq.train.loop import total_steps, train
from llamaq.train.objectives import DPO, SFT, answer_logprobs

TOKENS = torch.randint(0, 768, (3, 20), generator=torch.Generator().manual_seed(1))


def labels_of(tokens: torch.Tensor) -> torch.Tensor:
    labels = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], dim=1)
    labels[:, :4] = -100
    return labels


def samples(count: int = 24, seed: int = 0) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        n = int(torch.randint(8, 20, (1,), generator=g))
        tokens = torch.randint(0, 640, (n,), generator=g).tolist()
        rows.append({"tokens": tokens, "labels": [-100] * 3 + tokens[3:]})
    return rows


def pairs(count: int = 16) -> list[dict]:
    chosen, rejected = samples(count, 1), samples(count, 2)
    return [
        {
            "chosen_input_ids": c["tokens"],
            "chosen_labels": c["labels"],
            "rejected_input_ids": r["tokens"],
            "rejected_labels": r["labels"],
        }
        for c, r in zip(chosen, rejected, strict=True)
    ]


def test_logprobs_are_cross_entropy_of_the_logits_in_any_chunks(monkeypatch):
    model, labels = trained_like(Scheme()), labels_of(TOKENS)
    expected = -F.cross_entropy(model(TOKENS).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    for chunk in (1024, 7):
        monkeypatch.setattr(compare, "HEAD_CHUNK_TOKENS", chunk)
        logprobs, kl = model(TOKENS, labels=labels)
        assert kl is None and torch.allclose(logprobs, expected, atol=1e-5)
        assert (logprobs[labels == -100] == 0).all()


def test_gradients_do_not_depend_on_the_chunks(monkeypatch):
    gradients = []
    for chunk in (1024, 7):
        monkeypatch.setattr(compare, "HEAD_CHUNK_TOKENS", chunk)
        model = trained_like(Scheme())
        model(TOKENS, labels=labels_of(TOKENS))[0].sum().backward()
        gradients.append(model.decoder.tok_embeddings.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_a_teacher_equal_to_the_student_has_kl_zero_and_another_has_the_kl_of_the_logits():
    student, labels = trained_like(Scheme()), labels_of(TOKENS)
    _, kl = student(TOKENS, labels=labels, teacher=student)
    assert kl.abs().max() < 1e-6
    teacher = trained_like(None)
    _, kl = student(TOKENS, labels=labels, teacher=teacher)
    p, q = teacher(TOKENS).log_softmax(-1), student(TOKENS).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(kl, torch.where(labels != -100, expected, 0.0), atol=1e-5)


def test_sft_sums_over_tokens_and_mixes_the_teacher_in():
    model, objective = trained_like(Scheme()), SFT(pad_id=0)
    batch = objective.collate(samples(4))
    loss, sums = objective(model, batch)
    assert objective.count(batch) == int((batch["labels"] != -100).sum())
    assert math.isclose(loss.item(), sums["loss"].item())
    mixed, parts = SFT(0, teacher=trained_like(None), distill_weight=0.25)(model, batch)
    assert math.isclose(mixed.item(), 0.75 * parts["nll"].item() + 0.25 * parts["distill_kl"].item(), rel_tol=1e-5)
    assert math.isclose(parts["nll"].item(), loss.item(), rel_tol=1e-5)


def dpo_objective() -> DPO:
    from torchtune.rlhf.loss import DPOLoss

    return DPO(0, DPOLoss(beta=0.1))


def with_reference(model, rows: list[dict]) -> list[dict]:
    objective = dpo_objective()
    with torch.no_grad():
        scores = torch.stack(answer_logprobs(model, objective.collate(rows)).chunk(2), 1).tolist()
    return [row | {"reference": s} for row, s in zip(rows, scores, strict=True)]


def test_dpo_starts_at_ln_2_with_the_frozen_model_as_reference():
    """Stage 3's latent model against log-probabilities of stage 2's frozen one."""
    policy = trained_like(Scheme())
    reference = trained_like(Scheme(), frozen=True, weights=dict(policy.decoder.state_dict()))
    objective, rows = dpo_objective(), pairs()
    batch = objective.collate(with_reference(reference, rows))
    loss, sums = objective(policy, batch)
    assert abs(loss.item() / len(rows) - math.log(2)) < 1e-5
    assert sums["rewards/margin"].abs() < 1e-4


def test_dpo_metrics_against_numbers_worked_out_by_hand():
    logprobs = {"chosen": [-2.0, -5.0], "rejected": [-4.0, -3.0]}
    reference = {"chosen": [-3.0, -4.0], "rejected": [-3.0, -4.0]}
    batch = {
        "tokens": torch.zeros(4, 2, dtype=torch.long),
        "labels": torch.zeros(4, 2, dtype=torch.long),
        "reference": torch.tensor(reference["chosen"] + reference["rejected"]),
    }
    values = torch.tensor([*logprobs["chosen"], *logprobs["rejected"]])
    loss, sums = dpo_objective()(lambda tokens, labels: (torch.stack([values, torch.zeros(4)], 1), None), batch)
    # pair 1 prefers the chosen answer by 2 nats more than the reference, pair 2 the rejected one
    expected = -F.logsigmoid(torch.tensor([0.2, -0.2])).sum().item()
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)
    means = {k: round(v.item() / 2, 4) for k, v in sums.items()}
    assert means == {
        "loss": round(expected / 2, 4),
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.0,
        "rewards/margin": 0.0,
        "rewards/accuracy": 0.5,
        "logprobs/chosen": -3.5,
        "logprobs/rejected": -3.5,
    }


def run_training(folder: Path, *overrides: str, objective=None, rows=None, until: int | None = None) -> list[dict]:
    """A few steps of `train` on fixed samples; `until` stops as a kill would, after that step."""
    run = Run(small(folder, *overrides))
    model = build_model(run.config.model, None, Scheme(), ADAPTERS, seed=run.config.seed)
    stage, training = run.folder / "qat.partial", run.config.section("qat")
    session = run.session("qat", stage)
    if until is not None:
        original = resume.save

        def stop(path, step, *args, **kwargs):
            original(path, step, *args, **kwargs)
            if step >= until:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "save", stop)
            with pytest.raises(KeyboardInterrupt):
                train(session, run.config, training, model, objective or SFT(0), rows or samples())
    else:
        train(session, run.config, training, model, objective or SFT(0), rows or samples())
    run.close()
    return read_metrics(stage / "metrics.jsonl")


def losses(rows: list[dict]) -> list[float]:
    return [r["loss"] for r in rows]


def test_the_loss_falls_and_does_not_depend_on_the_micro_batch(tmp_path):
    runs = [losses(run_training(tmp_path / str(b), f"qat.batch_size={b}")) for b in (8, 2, 1)]
    assert runs[0][-1] < runs[0][0]
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], rel=1e-4)


def test_resumed_losses_equal_uninterrupted_ones(tmp_path):
    whole = run_training(tmp_path / "whole")
    run_training(tmp_path / "cut", until=4)
    cut = run_training(tmp_path / "cut")
    assert [r["step"] for r in cut] == [1, 2, 3, 4, 5, 6]
    assert losses(cut) == losses(whole)
    assert [r["lr"] for r in cut] == [r["lr"] for r in whole]


def test_a_run_can_switch_what_changes_speed_only_and_still_resume(tmp_path):
    whole = losses(run_training(tmp_path / "whole"))
    run_training(tmp_path / "cut", until=4)
    cut = run_training(tmp_path / "cut", "activation_checkpointing=true", "qat.batch_size=8")
    assert losses(cut) == pytest.approx(whole, rel=1e-4)


def test_weights_are_saved_under_their_own_names_with_recomputed_blocks(tmp_path):
    run = Run(small(tmp_path / "a", "activation_checkpointing=true", "qat.optimizer.lr=0.0"))
    model = build_model(run.config.model, None, Scheme(), ADAPTERS)
    expected = {k: v.clone() for k, v in model.decoder.state_dict().items()}
    session = run.session("qat", tmp_path / "stage")
    _, weights = train(session, run.config, run.config.section("qat"), model, SFT(0), samples())
    save_weights(tmp_path, weights)
    saved = weights_of(tmp_path)
    assert saved.keys() == expected.keys() and all(torch.equal(saved[k], expected[k]) for k in saved)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path, capsys):
    whole = losses(run_training(tmp_path / "whole"))
    run_training(tmp_path / "cut", until=4)
    newest = tmp_path / "cut" / "qat.partial" / "checkpoints" / "step_000004" / "rank_00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert losses(run_training(tmp_path / "cut")) == whole
    said = capsys.readouterr().out
    assert "step_000004 is damaged" in said and "resuming after step 2" in said


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_training(tmp_path / "a", "qat.checkpoint_every_n_steps=1", "qat.keep_checkpoints=2", until=5)
    kept = sorted(p.name for p in (tmp_path / "a" / "qat.partial" / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000005"]


def test_steps_are_epochs_or_max_steps(tmp_path):
    training = small(tmp_path / "a").section("qat")
    training.epochs, training.max_steps = 2, None
    assert total_steps(training, 25) == 7  # ceil(50 / 8)
    training.max_steps = 5
    assert total_steps(training, 25) == 5


def test_gradients_are_clipped_and_the_norm_before_is_logged(tmp_path):
    free = run_training(
        tmp_path / "free",
        "qat.clip_grad_norm=null",
        "qat.optimizer._component_=torch.optim.SGD",
        "qat.optimizer.lr=1.0",
    )
    clipped = run_training(
        tmp_path / "clip",
        "qat.clip_grad_norm=1e-6",
        "qat.optimizer._component_=torch.optim.SGD",
        "qat.optimizer.lr=1.0",
    )
    assert free[0]["grad_norm"] == pytest.approx(clipped[0]["grad_norm"], rel=1e-5)
    assert losses(clipped)[1] == pytest.approx(clipped[1]["loss"], abs=1e-6)
    assert abs(free[-1]["loss"] - free[0]["loss"]) > 100 * abs(
        clipped[-1]["loss"] - losses(run_training(tmp_path / "still", "qat.optimizer.lr=0.0"))[-1]
    )


def test_an_optimizer_that_cannot_be_resumed_is_refused_at_once(tmp_path):
    """Its state is not one number a weight: it could not be handed to another number of ranks."""
    with pytest.raises(UserError, match=r"Adafactor keeps '.*' not weight by weight"):
        run_training(tmp_path / "a", "qat.optimizer._component_=torch.optim.Adafactor", "qat.max_steps=1")


@pytest.mark.parametrize("optimizer", ["torch.optim.SGD", "torch.optim.Adam", "torch.optim.RMSprop"])
def test_other_optimizers_resume_as_well(tmp_path, optimizer):
    more = ["~qat.optimizer.weight_decay", f"qat.optimizer._component_={optimizer}", "qat.optimizer.lr=1e-3"]
    more += ["qat.optimizer.momentum=0.9"] if optimizer != "torch.optim.Adam" else []
    whole = run_training(tmp_path / "whole", *more)
    run_training(tmp_path / "cut", *more, until=4)
    assert losses(run_training(tmp_path / "cut", *more)) == losses(whole)


def test_divergence_is_an_error_that_says_so(tmp_path):
    with pytest.raises(UserError, match="diverged; lower the learning rate"):
        run_training(tmp_path / "a", "qat.optimizer.lr=1e30", "qat.clip_grad_norm=null", "~qat.lr_scheduler")


def test_bf16_and_compile_and_recomputed_blocks_train_alike(tmp_path):
    plain = losses(run_training(tmp_path / "plain"))
    recomputed = losses(run_training(tmp_path / "ac", "activation_checkpointing=true"))
    assert recomputed == pytest.approx(plain, rel=1e-5)
    bf16 = losses(run_training(tmp_path / "bf16", "dtype=bf16"))
    assert bf16 == pytest.approx(plain, rel=2e-2)


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path):
    plain = losses(run_training(tmp_path / "plain"))
    assert losses(run_training(tmp_path / "compiled", "compile=true")) == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["qat", "qat_lora"])
@torch.no_grad()
def test_a_compiled_block_quantizes_bit_for_bit_as_an_eager_one(stage, tmp_path):
    """Logits up to last places for most tokens: one of them can put an activation on the other side of a border."""
    if stage == "qat":
        eager, compiled = (build_model(MODEL, random_weights(MODEL), Scheme()) for _ in range(2))
    else:
        eager, compiled = (trained_like(Scheme(), frozen=True) for _ in range(2))
    ready_to_train(eager, small(tmp_path), torch.device("cpu"))
    ready_to_train(compiled, small(tmp_path, "compile=true"), torch.device("cpu"))
    one, other = (next(m for m in model.modules() if isinstance(m, QuantizedLinear)) for model in (eager, compiled))
    assert torch.equal(torch.compile(other.quantized_weight)(), one.quantized_weight())
    tokens = torch.randint(0, MODEL["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            a, b = (model(tokens).float().flatten(0, 1) for model in (eager, compiled))
        assert ((a - b).norm(dim=-1) / a.norm(dim=-1)).median() <= 1e-6, bf16


TWO_RANKS = """
import json, sys, torch, torch.distributed as dist
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from test_training import dpo_objective, pairs, run_training, samples, with_reference
from conftest import ADAPTERS, small
from llamaq.model.build import build_model
from llamaq.quant.scheme import Scheme
from llamaq.runs.main import leave_process_group
dist.init_process_group("gloo")
torch.manual_seed(0)
rows = pairs()
reference = build_model(small(Path({folder!r}) / "c").model, None, Scheme(), ADAPTERS, seed=5)
rows = with_reference(reference, rows)
sft = run_training(Path({folder!r}) / "sft", "qat.batch_size=2")
dpo = run_training(Path({folder!r}) / "dpo", "qat.batch_size=2", objective=dpo_objective(), rows=rows)
if dist.get_rank() == 0:
    Path({folder!r}, "out.json").write_text(json.dumps([sft, dpo]))
leave_process_group()
"""


def test_logged_metrics_are_the_same_on_one_and_two_ranks(tmp_path):
    """Losses, rewards, margins, accuracy and log-probabilities: torchtune's DPO logs world_size times the loss."""
    here = Path(__file__).parent
    results = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        script = folder / "script.py"
        script.write_text(TWO_RANKS.format(tests=str(here.parent), here=str(here), folder=str(folder)))
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", str(script)],
            check=True,
            timeout=300,
        )
        results.append(json.loads((folder / "out.json").read_text()))
    for one, two in zip(*results, strict=True):
        assert len(one) == len(two) == 6
        for a, b in zip(one, two, strict=True):
            keys = [k for k in a if k not in ("tokens_per_second", "step_seconds", "ranks")]
            assert {k: b[k] for k in keys} == pytest.approx({k: a[k] for k in keys}, rel=2e-3, abs=1e-4)
