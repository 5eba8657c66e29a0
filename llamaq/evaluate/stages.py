"""Define the stages that measure the models of a run: scores, exported files, sensitivity, tasks, speed.

A training chain and a SpinQuant run share these stages; each says in `Models` which models it has and how to build
them. Stages that are up to date are kept, so asking for more costs only what is new.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llamaq.config import Config
from llamaq.config.view import only
from llamaq.data.batches import collate_sft
from llamaq.data.datasets import build_dataset, cache_of
from llamaq.data.tokenizer import tokenizer_of
from llamaq.errors import UserError
from llamaq.evaluate.files import compare_forms, score_pte
from llamaq.evaluate.models import MODEL_SETTINGS, REFERENCES, Models
from llamaq.evaluate.readers import EagerReader, PteReader
from llamaq.evaluate.scores import Collate, Scores, score_metrics, score_models
from llamaq.evaluate.sensitivity import advice, sensitivity
from llamaq.evaluate.tasks import measure_tasks
from llamaq.export.benchmark import benchmark
from llamaq.export.exporter import load_eager
from llamaq.export.gates import gate_tokens
from llamaq.export.pte import Pte
from llamaq.export.stages import export_model
from llamaq.model.build import pick_device
from llamaq.runs.files import sha256_file
from llamaq.runs.ranks import on_rank_zero, say
from llamaq.runs.run import Run

HELD_OUT = ("model", "tokenizer", "evaluate.dataset")  # what reading the held-out text depends on
EXPORTING = "tune run export_executorch, or tune run spinquant"  # what makes the file that ships


def measure(run: Run, models: Models) -> list[str]:
    """Measure everything that the config asks for beyond the scores; return the names of the stages."""
    e = run.config.evaluate
    exported = {name: exported_folder(run, models, name) for name in models.to_export(run.config)}
    stages = [folder.name for folder in exported.values()]
    if exported:
        stages.append(files_stage(run, models, exported).name)
        if e.speed:
            stages.append(speed_stage(run, exported).name)
    if e.sensitivity_samples:
        stages.append(sensitivity_stage(run, models).name)
    if e.tasks or e.perplexity_text:
        stages += [tasks_stage(run, models, name).name for name in models.wanted(run.config)]
    return list(dict.fromkeys(stages))


def exported_folder(run: Run, models: Models, name: str) -> Path:
    """Return the stage folder with the .pte of a model. What ships has one; the others are exported now."""
    if name == models.shipped:
        return run.need("export", made_by=EXPORTING)
    source = models.known[name]
    return export_model(run, name, source.make, source.inputs, models.context, source.full_precision)


def heldout_samples(c: Config, limit: int | None = None) -> list[Any]:
    """Return the samples of `evaluate.dataset`, or the first so many."""
    dataset = build_dataset(c.evaluate.dataset, tokenizer_of(c), "evaluate.dataset", cache_of(c))
    return [dataset[i] for i in range(min(len(dataset), limit or len(dataset)))]


def collate_of(c: Config) -> Collate:
    """Return what makes a batch of held-out samples."""
    return partial(collate_sft, pad_id=tokenizer_of(c).pad_id)


def score_stage(run: Run, models: Models, summarize: Callable[[dict[str, Scores]], dict[str, Any]]) -> Path:
    """Score the models on held-out text, as llamaq computes them: the stage `evaluate`.

    Args:
        run: the run.
        models: its models.
        summarize: computes further metrics from all scores, such as the share that training wins back.
    """
    c = only(run.config, *HELD_OUT, *MODEL_SETTINGS, "evaluate.max_samples")
    names = models.to_score(run.config)

    def build(folder: Path) -> dict[str, Any]:
        samples = heldout_samples(c, c.evaluate.max_samples)
        makers = {name: models.known[name].make for name in names}
        references = [name for name in REFERENCES if name in names]
        device = pick_device(c.device)
        scores = score_models(makers, references, samples, collate_of(c), c.evaluate.batch_size, device)
        return score_metrics(scores) | summarize(scores)

    return run.stage(
        "evaluate", on_rank_zero(build), c, models.inputs_of(names), arguments={"models": names}, version=2
    )


def files_stage(run: Run, models: Models, exported: dict[str, Path]) -> Path:
    """Read held-out text through each .pte, and compare the forms of what ships: the stage `files`.

    Args:
        run: the run.
        models: its models.
        exported: name → stage folder with the model's .pte.
    """
    gates = ("export.gate_tokens", "export.max_context_length")
    c = only(run.config, *HELD_OUT, *MODEL_SETTINGS, "evaluate.file_tokens", *gates)
    codes = run.need(models.codes, made_by=EXPORTING)
    ptes = {name: folder / "model.pte" for name, folder in exported.items()}

    def build(folder: Path) -> dict[str, Any]:
        samples, collate, e = heldout_samples(c), collate_of(c), c.evaluate
        bf16 = models.known["bf16"].make().eval()
        scores = {}
        for name, file in ptes.items():
            own = models.known[name].make().eval()
            scores[name] = score_pte(file, own, bf16, samples, collate, e.file_tokens, e.batch_size, name)
        tokens, shipped = gate_tokens(c), models.known[models.shipped].make().eval()
        converted = load_eager(codes / "model", len(tokens))
        return {"scores": scores, **compare_forms(bf16, shipped, converted, ptes.get(models.shipped), tokens)}

    inputs = [*exported.values(), codes, *models.inputs_of(["bf16", *exported, models.shipped])]
    return run.stage("files", on_rank_zero(build), c, inputs, arguments={"models": list(exported)}, version=2)


def speed_stage(run: Run, exported: dict[str, Path]) -> Path:
    """Measure size, speed and memory of the .pte files, each in processes of its own: the stage `speed`.

    Args:
        run: the run.
        exported: name → stage folder with the model's .pte; the first one is what the others are compared with.
    """
    c = only(run.config, "evaluate.speed_prompt_tokens", "evaluate.speed_new_tokens", "evaluate.threads")
    files = {name: folder / "model.pte" for name, folder in exported.items()}

    def build(folder: Path) -> dict[str, Any]:
        e = c.evaluate
        say("measuring speed: nothing else should run on this machine meanwhile …")
        result = benchmark(list(files.values()), e.speed_prompt_tokens, e.speed_new_tokens, threads=e.threads)
        if result["failed"]:
            raise UserError("\n".join(result["failed"].values()))
        return result | {"models": {name: result["models"][str(path)] for name, path in files.items()}}

    inputs = list(exported.values())
    return run.stage("speed", on_rank_zero(build), c, inputs, arguments={"models": list(exported)})


def sensitivity_stage(run: Run, models: Models) -> Path:
    """Measure what quantizing each linear of the BF16 model costs: the stage `sensitivity`."""
    c = only(run.config, *HELD_OUT, "scheme", "evaluate.sensitivity_samples")
    ptq = models.known["ptq"]

    def build(folder: Path) -> dict[str, Any]:
        device, samples = pick_device(c.device), heldout_samples(c, c.evaluate.sensitivity_samples)
        batches = [torch.as_tensor(s["tokens"], device=device)[None] for s in samples]
        s = sensitivity(ptq.make().eval().to(device), batches)
        return {**asdict(s), "advice": advice(s), "samples": len(samples), "tokens": sum(b.numel() for b in batches)}

    return run.stage("sensitivity", on_rank_zero(build), c, ptq.inputs)


def tasks_stage(run: Run, models: Models, name: str) -> Path:
    """Run lm-evaluation-harness on one model, or with `.pte` on its file: the stage `tasks_NAME`."""
    asked = ("tasks", "tasks_dir", "task_limit", "num_fewshot", "tasks_chat", "perplexity_text")
    settings = ("tokenizer", "seed", "export.max_context_length", *(f"evaluate.{key}" for key in asked))
    c = only(run.config, *MODEL_SETTINGS, *settings)
    key = name.removesuffix(".pte")
    source = models.known[key]
    exported = exported_folder(run, models, key) if name != key else None

    def build(folder: Path) -> dict[str, Any]:
        say(f"tasks of {name}: {', '.join(c.evaluate.tasks)} …")
        if exported is not None:
            file = exported / "model.pte"
            reader, read = PteReader(Pte(file)), {"file": file.name, "sha256": sha256_file(file)}
        else:
            model = source.make().eval().to(pick_device(c.device))
            reader = EagerReader(model, c.export.max_context_length, c.evaluate.batch_size)
            read = {"file": None, "sha256": None}
        return read | {"results": measure_tasks(c.evaluate, reader, tokenizer_of(c), c.seed)}

    inputs = source.inputs if exported is None else [exported]
    return run.stage(f"tasks_{name}", on_rank_zero(build), c, inputs, version=2)
