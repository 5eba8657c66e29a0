"""SpinQuant: a BF16 checkpoint and a text to calibrate on in, a quantized .pte and a page out; nothing is trained.

    tune run spinquant --config tiny_spinquant                                 minutes, nothing to download
    tune run spinquant --config llama3_2/1B_spinquant checkpoint_dir=/path/to/Llama-3.2-1B-Instruct

    corpus, base            what the config starts from, if it says how to make it
    calibrate               what each linear reads, and how much errors in what it writes would cost
    candidate_…             not rotated, R4, R2 + R4, R1 + R2 + R4: learned, merged, rounded, judged on text not seen
    spinquant               the best of them, Meta layout; loads in ExecuTorch with `--use_spin_quant native`
    export                  the .pte; each hand-over measured and gated
    evaluate, page        held-out text; report/report.md

Run it again to resume. One process on one GPU, or a CPU; the samples are the same on either.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llamaq.checkpoints.base import StateDict
from llamaq.checkpoints.quantized import load_quantized, save_quantized
from llamaq.config import Config
from llamaq.data.datasets import build_dataset
from llamaq.errors import UserError
from llamaq.evaluate.scores import agreement, share_of_kl
from llamaq.evaluate.stages import Candidate, Models, check, measure, score_all, score_metrics, score_stage
from llamaq.export.exporter import load_eager
from llamaq.export.gates import check_gate, copy_tokenizer, gate_settings, gate_tokens
from llamaq.model.causal_lm import CausalLM, build_decoder, build_model, meta_decoder, pick_device
from llamaq.quant.prepare import freeze, prepare
from llamaq.quant.scheme import Scheme
from llamaq.recipes.export_executorch import export
from llamaq.recipes.qat import start
from llamaq.report import page, plots
from llamaq.report.publish import data_line, measured_facts, report_stage
from llamaq.runs.main import main
from llamaq.runs.run import Run, from_rank_zero, on_rank_zero, say
from llamaq.runs.tracking import Tracker, progress
from llamaq.spinquant.calibrate import Statistics, collect, from_tensors, to_tensors
from llamaq.spinquant.expected_noise import EndToEnd, ExpectedNoise, Learned, learn_as_published, learn_by_noise, refine
from llamaq.spinquant.gptq import Rounding, round_layers
from llamaq.spinquant.polish import polish
from llamaq.spinquant.rotations import Rotations, Shape, attach_online, fuse_norms, rotate
from llamaq.train.resume import save_tensors
from llamaq.train.sft import start_inputs, start_weights, tokenizer_of

OUTLIER_ROWS = 1024  # rows of a matrix that the report's picture of outliers looks at


# --- text ------------------------------------------------------------------------------------------------------------


def windows(c: Config) -> tuple[Tensor, Tensor]:
    """Calibration [n, s] and selection [m, s] tokens: windows of `tokenizer.max_seq_len` from shuffled samples.

    Raises:
        UserError: a dataset has less text than it is to give.
    """
    s, tokenizer = c.rotations, tokenizer_of(c)
    length = tokenizer.max_seq_len
    if not length:
        raise UserError("tokenizer.max_seq_len is not set: calibration needs the length of its windows")
    calibration, selection = [], []
    for i, part in enumerate(s.calibration):
        extra = -(-s.num_selection // len(s.calibration))
        wanted = part.num_samples + extra
        dataset = build_dataset(part.dataset, tokenizer, f"spinquant.calibration[{i}].dataset")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(c.seed + i)).tolist()
        stream: list[int] = []
        for index in order:  # short samples are strung together, each with its own beginning of text
            stream += list(dataset[index]["tokens"])
            if len(stream) >= wanted * length:
                break
        have = len(stream) // length
        if have < wanted:
            raise UserError(
                f"spinquant.calibration[{i}].dataset has text for {have} windows of {length} tokens, and "
                f"{part.num_samples} to calibrate and {extra} to select are asked for: lower num_samples, "
                "spinquant.num_selection or tokenizer.max_seq_len, or give it more text"
            )
        cut = torch.tensor(stream[: wanted * length]).view(wanted, length)
        calibration.append(cut[: part.num_samples])
        selection.append(cut[part.num_samples :])
    return torch.cat(calibration), torch.cat(selection)[: s.num_selection]


def text_settings(c: Config) -> dict[str, Any]:
    s = c.rotations
    return {
        "model": c.model, "tokenizer": c.tokenizer, "seed": c.seed, "batch_windows": s.batch_size,
        "calibration": [[p.dataset, p.num_samples] for p in s.calibration], "num_selection": s.num_selection,
    }  # fmt: skip


def bar(title: str, unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    return partial(progress, title=title, unit=unit)


# --- calibrate -------------------------------------------------------------------------------------------------------


def calibrate(run: Run) -> Path:
    """One forward and backward pass over the calibration text."""
    c = run.config

    def build(folder: Path) -> dict[str, Any]:
        text, _ = windows(c)
        shape = Shape.of(meta_decoder(c.model))
        decoder: Any = build_decoder(c.model, fuse_norms(start_weights(c), shape)).eval().requires_grad_(False)
        decoder.to(pick_device(c.device))
        began = time.monotonic()
        batches = list(text.split(c.rotations.batch_size))
        statistics = collect(decoder, shape, batches, c.seed, bar("calibrate", "batch"))
        save_tensors(folder / "statistics.safetensors", to_tensors(statistics))
        return {"tokens": text.numel(), "seconds": time.monotonic() - began}

    return run.stage("calibrate", on_rank_zero(build), text_settings(c), start_inputs(c))


# --- candidates ------------------------------------------------------------------------------------------------------


def candidate_names(c: Config) -> list[tuple[str, set[str], int]]:
    """(name, rotations, seed) of every candidate; what nothing random enters has no seed."""
    found = []
    for kind in c.rotations.candidates:
        which = set() if kind == "none" else set(kind.split("_"))
        learned = bool(which - {"r4"})
        for seed in range(c.seed, c.seed + c.rotations.num_seeds) if learned else [c.seed]:
            found.append((f"{kind}_seed{seed}" if learned else kind, which, seed))
    return found


def candidate(run: Run, name: str, which: set[str], seed: int) -> Path:
    """Learn, merge, round and judge one set of rotations."""
    c, s = run.config, run.config.rotations

    def build(folder: Path) -> dict[str, Any]:
        device, weights = pick_device(c.device), start_weights(c)
        shape = Shape.of(meta_decoder(c.model))
        text, unseen = windows(c)
        learned, seconds = learn_or_load(run, folder, name, which, seed, weights, shape, text)
        rotated = rotate(weights, shape, learned.rotations)
        student, layers, round_seconds = round_model(c, name, rotated, learned.rotations.r4, text, device, run.scheme)
        bf16 = build_model(c.model, weights, None).eval().requires_grad_(False).to(device)
        student.to(device)
        polished = polish_model(c, name, student, bf16, text, device)
        judged = judge(student, bf16, unseen, s.batch_size, device, name)
        contract = learned.rotations.contract() if which else None
        save_quantized(folder / "model", student.decoder.cpu(), run.scheme, contract, student.head.cpu())
        say(f"{name}: KL from BF16 {judged.mean():.3e} nats a token on {unseen.numel()} tokens")
        return {
            "kl": float(judged.mean()),
            "kl_interval": 1.96 * float(judged.std() / len(judged) ** 0.5),
            "learn_seconds": seconds,
            "round_seconds": round_seconds,
            "learn_losses": [learned.losses[0], learned.losses[-1]] if learned.losses else [],
            "polish_losses": [polished[0], polished[-1]] if polished else [],
            "orthogonality_error": learned.rotations.orthogonality_error(),
            "layers": layers,
            "outliers": outliers(weights, rotated, shape, learned.rotations, run.path("calibrate")),
        }

    rounding = [s.rounding, s.damping, s.correct_mismatch, s.polish_steps, s.polish_lr if s.polish_steps else None]
    settings = text_settings(c) | {"which": sorted(which), "rounding": rounding}
    if which - {"r4"}:
        settings |= {"learning": [s.objective, s.steps, s.lr, s.rows, s.refine_steps, s.refine_lr], "start": seed}
    return run.stage(f"candidate_{name}", on_rank_zero(build), settings, [run.need("calibrate"), *start_inputs(c)])


def learn_or_load(
    run: Run, folder: Path, name: str, which: set[str], seed: int, weights: StateDict, shape: Shape, text: Tensor
) -> tuple[Learned, float]:
    """Rotations, and seconds their learning took; an interrupted candidate has kept them."""
    start = Rotations.random(shape, which, seed)
    if start.r1 is None and start.r2 is None:
        return Learned(start, []), 0.0
    kept, facts = folder / "rotations.safetensors", folder / "learning.json"
    if not facts.is_file():
        began = time.monotonic()
        learned = learn(run, folder, name, start, weights, shape, text)
        matrices = {"r1": learned.rotations.r1, "r2": learned.rotations.r2}
        save_tensors(kept, {k: v.cpu() for k, v in matrices.items() if v is not None})
        facts.write_text(json.dumps({"losses": learned.losses, "seconds": time.monotonic() - began}))
    matrices, told = load_file(kept), json.loads(facts.read_text())
    return Learned(Rotations(matrices.get("r1"), matrices.get("r2"), start.r4), told["losses"]), told["seconds"]


def learn(
    run: Run, folder: Path, name: str, start: Rotations, weights: StateDict, shape: Shape, text: Tensor
) -> Learned:
    """By the objective the settings name, then refined if they say so."""
    c, s, device = run.config, run.config.rotations, pick_device(run.config.device)
    batches = list(text.split(s.batch_size))
    untied = weights | {"output.weight": weights.get("output.weight", weights["tok_embeddings.weight"])}

    def end_to_end(scheme: Any) -> EndToEnd:
        decoder: Any = build_decoder(c.model, untied).eval().to(device)
        on_device = {k: v.to(device) for k, v in untied.items()}
        return EndToEnd(decoder, on_device, shape, start.r4, scheme)

    if s.objective == "published":
        learned = learn_as_published(end_to_end(None), start, batches, s.steps, s.lr, bar(f"{name}: learn", "step"))
    else:
        fused = fuse_norms(weights, shape) if start.r1 is not None else weights
        statistics = load_statistics(run.path("calibrate"), device)
        noise = ExpectedNoise(
            {k: v.to(device) for k, v in fused.items()}, shape, statistics, run.scheme, start.r1 is not None, s.rows,
            c.seed, device,
        )  # fmt: skip
        learned = learn_by_noise(noise, start, s.steps, s.lr, bar(f"{name}: learn", "step"))
    if s.refine_steps:
        teacher: Any = build_decoder(c.model, untied).eval().requires_grad_(False).to(device)
        refined = refine(
            end_to_end(run.scheme), teacher, learned.rotations, batches, s.refine_steps, s.refine_lr,
            bar(f"{name}: refine", "step"),
        )  # fmt: skip
        learned = Learned(refined.rotations, [*learned.losses, *refined.losses])
    with Tracker(c, run.id, f"candidate_{name}", folder) as tracker:
        for step, loss in enumerate(learned.losses, 1):
            tracker.log(step, {"learn/loss": loss})
    return learned


def load_statistics(folder: Path, device: Any) -> Statistics:
    return from_tensors(load_file(folder / "statistics.safetensors"), device)


@torch.no_grad()
def round_model(
    c: Config, name: str, rotated: StateDict, r4: int, text: Tensor, device: torch.device, scheme: Scheme
) -> tuple[CausalLM, list[dict[str, Any]], float]:
    """The frozen model, how well each linear was rounded, and seconds."""
    s = c.rotations
    student, exact = prepare(build_decoder(c.model, rotated), scheme), build_decoder(c.model, rotated)
    for decoder in (student, exact):
        attach_online(decoder.eval().requires_grad_(False), r4)
    began = time.monotonic()
    how = Rounding(method=s.rounding, damping=s.damping, correct_mismatch=s.correct_mismatch)
    batches = list(text.split(s.batch_size))
    reports = round_layers(student, batches, scheme.linear, how, exact, device, bar(f"{name}: round", "layer"))
    model = CausalLM(freeze(student))  # pyright: ignore[reportArgumentType]  (still torchtune's decoder)
    return model, [vars(r) for r in reports], time.monotonic() - began


def polish_model(
    c: Config, name: str, student: CausalLM, bf16: CausalLM, text: Tensor, device: torch.device
) -> list[float]:
    """Scales and norms by KL from the BF16 model, if the settings say so; the losses."""
    s = c.rotations
    if not s.polish_steps:
        return []

    def loss(tokens: Tensor) -> Tensor:
        labels = torch.zeros_like(tokens)  # every position counts; only the distributions are compared
        scored = student(tokens, labels=labels, teacher=bf16)
        assert isinstance(scored, tuple) and scored[1] is not None
        return scored[1].mean()

    batches = list(text.to(device).split(s.batch_size))
    return polish(student.decoder, loss, batches, s.polish_steps, s.polish_lr, bar(f"{name}: polish", "step"))


@torch.no_grad()
def judge(student: CausalLM, bf16: CausalLM, text: Tensor, batch_size: int, device: torch.device, name: str) -> Tensor:
    """KL from the BF16 model window by window, in nats a token, float64 [windows]."""
    found = []
    for tokens in bar(f"{name}: judge", "batch")(text.split(batch_size)):
        _, kl = student(tokens.to(device), labels=torch.zeros_like(tokens, device=device), teacher=bf16)
        found.append(kl.double().mean(1).cpu())
    return torch.cat(found)


@torch.no_grad()
def outliers(
    weights: StateDict, rotated: StateDict, shape: Shape, r: Rotations, calibrated: Path
) -> dict[str, dict[str, list[float]]]:
    """Largest magnitude over root mean square by layer, before and after: weights' groups, attention's input, MLP's."""
    statistics = load_statistics(calibrated, "cpu")

    def peak(x: Tensor, group: int) -> float:
        x = x[:OUTLIER_ROWS].float().unflatten(-1, (-1, group))
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp_min(1e-12)).mean())

    def of(w: StateDict, r1: Tensor | None) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"weights of a group": [], "tokens attention reads": [], "tokens MLP reads": []}
        for i, layer in enumerate(statistics.layers):
            names = [n for n in w if (n.startswith(f"layers.{i}.") and n.endswith("_proj.weight")) or
                     (n.startswith(f"layers.{i}.mlp.w") and n.endswith(".weight"))]  # fmt: skip
            found["weights of a group"].append(sum(peak(w[n], 32) for n in names) / len(names))
            for key, x, norm in (("attention", layer.attn_x, "sa"), ("MLP", layer.mlp_x, "mlp")):
                # without R1 the norm's gain is still in front of the linears
                x = x * weights[f"layers.{i}.{norm}_norm.scale"] if r1 is None else x @ r1.float()
                found[f"tokens {key} reads"].append(peak(x, shape.dim))
        return found

    return {"before": of(weights, None), "after": of(rotated, r.r1)}


# --- the best of them ------------------------------------------------------------------------------------------------


def choose(c: Config, judged: dict[str, float]) -> str:
    """The candidate that ships: the least KL, unless one is forced.

    Raises:
        UserError: the one forced is not among the candidates.
    """
    force = c.rotations.force
    if force is not None and force not in judged:
        raise UserError(f"spinquant.force={force} is none of the candidates: {', '.join(judged)}")
    return force or min(judged, key=judged.__getitem__)


@torch.no_grad()
def shipped_model(run: Run) -> CausalLM:
    """What `spinquant/model` holds, as llamaq computes it: float32 on the CPU."""
    decoder = prepare(build_decoder(run.config.model, start_weights(run.config)), run.scheme)
    return CausalLM(load_quantized(run.path("spinquant") / "model", decoder)).eval()


def select(run: Run) -> Path:
    """The best candidate, checked through ExecuTorch's own loader."""
    c = run.config
    names = [name for name, _, _ in candidate_names(c)]
    candidates = {name: run.need(f"candidate_{name}") for name in names}
    chosen = from_rank_zero(lambda: choose(c, {n: run.metrics(f"candidate_{n}")["kl"] for n in names}))

    def build(folder: Path) -> dict[str, Any]:
        shutil.copytree(candidates[chosen] / "model", folder / "model", dirs_exist_ok=True)
        copy_tokenizer(c, folder / "model")
        decoder = prepare(build_decoder(c.model, start_weights(c)), run.scheme)
        ours = CausalLM(load_quantized(folder / "model", decoder)).eval()
        tokens = torch.tensor([gate_tokens(run)])
        eager = load_eager(folder / "model", tokens.shape[1])
        with torch.no_grad():
            result = agreement(ours(tokens)[0], eager(tokens)[0])
        check_gate(run, "llamaq → ExecuTorch eager", result, "relative_error", "top1")
        say(f"ships {chosen}")
        return {"chosen": chosen, "forced": c.rotations.force is not None, "executorch_eager": result}

    settings = {"force": c.rotations.force, "tokenizer": c.tokenizer} | gate_settings(run)
    return run.stage("spinquant", on_rank_zero(build), settings, list(candidates.values()))


# --- evaluation and page -------------------------------------------------------------------------------------------


SHIPPED = "spinquant"


def models_of(run: Run) -> Models:
    """BF16, PTQ of it, and what ships; a rotated model's .pte is compared on contexts of one token (see pte_gates)."""
    c = run.config
    known = {
        "bf16": Candidate(lambda: build_model(c.model, start_weights(c), None), start_inputs(c)),
        "ptq": Candidate(lambda: build_model(c.model, start_weights(c), run.scheme), start_inputs(c)),
        SHIPPED: Candidate(lambda: shipped_model(run), [run.path(SHIPPED)]),
    }
    return Models(known, SHIPPED, SHIPPED, context=1)


def evaluate(run: Run) -> Path:
    """BF16, PTQ of it, and what ships, on the held-out text."""
    models = models_of(run)

    def build(folder: Path) -> dict[str, Any]:
        scores = score_all(run, models)
        share = None
        if {"ptq", SHIPPED} <= set(scores):
            share = share_of_kl(scores["ptq"], scores[SHIPPED], "bf16")
        return score_metrics(scores) | {"share": share}

    return score_stage(run, models, build)


def evaluate_and_report(run: Run) -> Path:
    """Scores, measurements and page; returns the report's folder."""
    run.need("export", made_from=[run.need(SHIPPED)])
    evaluate(run)
    return write_report(run, measure(run, models_of(run)))


def write_report(run: Run, measured: list[str]) -> Path:
    """The report's page, plots, JSON and model card, also logged to W&B."""
    names = [name for name, _, _ in candidate_names(run.config)]
    stages = ["calibrate", *(f"candidate_{n}" for n in names), SHIPPED, "export", "evaluate",
              *(m for m in measured if m != "export")]  # fmt: skip

    def render(folder: Path, facts: dict[str, Any]) -> str:
        chosen, candidates = facts["chosen"], facts["candidates"]
        scores = {page.MODELS[k]: s for k, s in facts["scores"].items()}
        bf16 = page.MODELS["bf16"]
        plots.quality(folder / "quality.png", {n: s["nll"] for n, s in scores.items()}, bf16)
        plots.agreement(
            folder / "agreement.png", {n: s["kl/bf16"] for n, s in scores.items()},
            {n: s["top1/bf16"] for n, s in scores.items()}, bf16,
        )  # fmt: skip
        kl = {n: (m["kl"], m["kl_interval"]) for n, m in candidates.items()}
        plots.selection(folder / "selection.png", kl, chosen)
        plots.outliers(folder / "outliers.png", *(candidates[chosen]["outliers"][k] for k in ("before", "after")))
        plots.layer_errors(folder / "layer_errors.png", layer_errors(candidates, chosen))
        return page.render_spinquant(facts)

    return report_stage(run, stages, lambda: gather(run, names, measured), render, card_of(run))


def card_of(run: Run) -> dict[str, Any]:
    """What the model card says of calibration and settings."""
    c, s = run.config, run.config.rotations
    learning = "published objective" if s.objective == "published" else "expected quantization noise"
    return {
        "base": Path(c.checkpoint_dir).name if c.base is None else "a model trained here",
        "license": "llama3.2" if c.base is None else "other",
        "checkpoint": run.path(SHIPPED) / "model",
        "rotation": run.metrics(SHIPPED)["chosen"],
        "max_seq_length": c.export.max_seq_length,
        "max_context_length": c.export.max_context_length,
        "data": {f"calibration {i + 1}": f"{p.num_samples} windows of {data_line(p.dataset)}"
                 for i, p in enumerate(s.calibration)} | {"held out": data_line(c.evaluate.dataset)},
        "hyperparameters": {
            "rotations": f"{learning}, {s.steps} steps, lr {s.lr}, then {s.refine_steps} steps by KL",
            "rounding": f"{s.rounding}, damping {s.damping}",
            "polish": f"{s.polish_steps} steps, lr {s.polish_lr}",
        },
    }  # fmt: skip


def layer_errors(candidates: dict[str, Any], chosen: str) -> dict[str, list[float]]:
    """Mean relative error of a layer's linears: the chosen candidate's, rounded to nearest and by GPTQ, and none's."""

    def by_layer(name: str, key: str) -> list[float]:
        layers: dict[str, list[float]] = {}
        for linear in candidates[name]["layers"]:
            layers.setdefault(linear["name"].split(".")[1], []).append(linear[key])
        return [sum(v) / len(v) for v in layers.values()]

    others = ["none"] if "none" in candidates and chosen != "none" else []
    return {f"{n}, {how}": by_layer(n, key) for n in (*others, chosen)
            for how, key in (("to nearest", "nearest"), ("as rounded", "rounded"))}  # fmt: skip


def gather(run: Run, names: list[str], measured: list[str]) -> dict[str, Any]:
    """Everything the page states, from the stages' manifests."""
    c, s, chosen = run.config, run.config.rotations, run.metrics(SHIPPED)
    return {
        **run.metrics("evaluate"),
        **measured_facts(run, measured),
        "shipped": SHIPPED,
        "chosen": chosen["chosen"],
        "forced": chosen["forced"],
        "candidates": {n: run.metrics(f"candidate_{n}") for n in names},
        "calibration_tokens": run.metrics("calibrate")["tokens"],
        "selection_tokens": s.num_selection * c.tokenizer["max_seq_len"],
        "hand_overs": {"executorch_eager": chosen["executorch_eager"], **run.metrics("export")["hand_overs"]},
        "files": {
            "quantized checkpoint, Meta layout": run.path(SHIPPED) / "model",
            "exported model": run.path("export") / "model.pte",
            "rotations": run.path(f"candidate_{chosen['chosen']}") / "rotations.safetensors",
            "model card": run.folder / "README.md",
            "all numbers": run.path("report") / "report.json",
            "W&B, if offline": f"wandb sync {run.folder}/wandb/offline-run-*",
        },
    }


def recipe(run: Run) -> None:
    c = run.config
    _ = c.rotations  # said before anything is done
    check(c, ["bf16", "ptq", SHIPPED], SHIPPED)
    start(run)
    if c.rotations.force is not None:
        choose(c, {name: 0.0 for name, _, _ in candidate_names(c)})
    calibrate(run)
    for name, which, seed in candidate_names(c):
        candidate(run, name, which, seed)
    select(run)
    export(run, SHIPPED, shipped_model, context=1)
    say(f"\nreport: {evaluate_and_report(run)}/report.md")


if __name__ == "__main__":
    main(recipe, __doc__)
