"""The stages that measure the models of a run: scores, exported files, sensitivity, tasks, speed.

A run is the training chain or SpinQuant; each says in `Models` which models it has and how to build them, and all else
is the same for both. Stages that are up to date are kept, so asking for more costs only that.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaq.config import Config
from llamaq.data.datasets import build_dataset, collate_sft
from llamaq.errors import UserError
from llamaq.evaluate.harness import EagerReader, PteReader, Reader, check_tasks, harness_model, perplexity, run_tasks
from llamaq.evaluate.scores import Scores, agreement, score, score_file
from llamaq.evaluate.sensitivity import advice, divergence, sensitivity
from llamaq.export.benchmark import benchmark
from llamaq.export.exporter import load_eager
from llamaq.export.gates import GATE_CONTEXT, export_model, gate_tokens
from llamaq.export.pte import Pte
from llamaq.model.causal_lm import CausalLM, pick_device
from llamaq.quant.prepare import quantized_linears
from llamaq.runs.run import Run, on_rank_zero, say, sha256_file
from llamaq.train.sft import tokenizer_of


@dataclass
class Candidate:
    """How to build a model, float32 on the CPU, and what it is made of."""

    make: Callable[[], CausalLM]
    inputs: list[Path]


@dataclass
class Models:
    """The models of a run: which there are, which one ships, and in which contexts its .pte is compared."""

    known: dict[str, Candidate]
    shipped: str
    source: str  # the stage whose model/ holds its codes
    context: int = GATE_CONTEXT

    def wanted(self, c: Config) -> list[str]:
        """`evaluate.models`, or all there are and, as files, what ships and its BF16 baseline."""
        return wanted_models(c, list(self.known), self.shipped)

    def files(self, c: Config) -> list[str]:
        """The names of those that are to be measured as .pte files."""
        return [n.removesuffix(".pte") for n in self.wanted(c) if n.endswith(".pte")]


def wanted_models(c: Config, known: list[str], shipped: str) -> list[str]:
    """See `Models.wanted`.

    Raises:
        UserError: a name that the run does not have.
    """
    names = c.evaluate.models or [*known, "bf16.pte", f"{shipped}.pte"]
    for name in names:
        if name.removesuffix(".pte") not in known:
            raise UserError(
                f"evaluate.models: no '{name}' in this run; it has {', '.join(known)}, each also as NAME.pte"
            )
    return names


def check(c: Config, known: list[str], shipped: str) -> None:
    """Find what is wrong with the evaluation's settings before anything is trained."""
    wanted_models(c, known, shipped)
    if c.evaluate.tasks:
        check_tasks(c.evaluate.tasks, _tasks_dir(c))
    if c.evaluate.perplexity_text and not Path(c.evaluate.perplexity_text).is_file():
        raise UserError(f"evaluate.perplexity_text={c.evaluate.perplexity_text}: no such file")


def _tasks_dir(c: Config) -> Path | None:
    return Path(c.evaluate.tasks_dir) if c.evaluate.tasks_dir else None


def score_stage(run: Run, models: Models, build: Callable[[Path], dict[str, Any]]) -> Path:
    """The stage `evaluate`, whatever else it computes from the scores."""
    c, names = run.config, eager_names(run.config, models)
    settings = {
        "dataset": c.evaluate.dataset, "max_samples": c.evaluate.max_samples, "model": c.model,
        "tokenizer": c.tokenizer, "adapters": c.adapters, "models": names,
    }  # fmt: skip
    return run.stage("evaluate", on_rank_zero(build), settings, inputs_of(models, names))


def eager_names(c: Config, models: Models) -> list[str]:
    """The models to score; references always, as the others are compared with them."""
    wanted = models.wanted(c)
    return [n for n in models.known if n in wanted or n in ("bf16", "control")]


def inputs_of(models: Models, names: list[str]) -> list[Path]:
    return list(dict.fromkeys(p for n in names for p in models.known[n].inputs))


def score_all(run: Run, models: Models) -> dict[str, Scores]:
    """Per-sample scores of every model; the references stay in memory, the others come and go."""
    c, device = run.config, pick_device(run.config.device)
    tokenizer = tokenizer_of(c)
    samples = heldout_samples(run, c.evaluate.max_samples)
    names = eager_names(c, models)
    references = {k: models.known[k].make().eval().to(device) for k in ("bf16", "control") if k in names}
    scores = {}
    for name in names:
        model = references[name] if name in references else models.known[name].make().eval().to(device)
        scores[name] = score(
            model, references, samples, lambda s: collate_sft(s, tokenizer.pad_id), c.evaluate.batch_size, name
        )
        del model
        gc.collect()
    return scores


def score_metrics(scores: dict[str, Scores]) -> dict[str, Any]:
    tokens = scores["bf16"].tokens
    return {
        "samples": len(tokens),
        "tokens": int(tokens.sum()),
        "scores": {k: s.means() for k, s in scores.items()},
    }


def heldout_samples(run: Run, limit: int | None) -> list[Any]:
    dataset = build_dataset(run.config.evaluate.dataset, tokenizer_of(run.config), "evaluate.dataset")
    return [dataset[i] for i in range(min(len(dataset), limit or len(dataset)))]


def file_of(run: Run, models: Models, name: str) -> Path:
    """The stage folder that holds the .pte of a model, exported now if it does not ship."""
    if name == models.shipped:
        return run.need("export")
    known = models.known[name]
    return export_model(run, name, known.make, known.inputs, models.context)


def measure(run: Run, models: Models) -> list[str]:
    """All that is measured beyond the scores; returns the names of the stages."""
    c = run.config
    folders = {name: file_of(run, models, name) for name in models.files(c)}
    stages = [f.name for f in folders.values()]
    if folders:
        stages.append(score_files(run, models, folders).name)
        if c.evaluate.speed:
            stages.append(speed(run, folders).name)
    if c.evaluate.sensitivity_samples:
        stages.append(sensitivities(run, models).name)
    if c.evaluate.tasks or c.evaluate.perplexity_text:
        stages += [tasks(run, models, name).name for name in models.wanted(c)]
    return list(dict.fromkeys(stages))


def score_files(run: Run, models: Models, folders: dict[str, Path]) -> Path:
    """Held-out text read through each .pte, beside the same text read by the same model as llamaq computes it."""
    c = run.config

    @torch.no_grad()
    def build(folder: Path) -> dict[str, Any]:
        tokenizer, samples = tokenizer_of(c), heldout_samples(run, None)
        bf16 = models.known["bf16"].make().eval()
        scores: dict[str, dict[str, Any]] = {}
        for name, exported in folders.items():
            own = models.known[name].make().eval()
            pte = Pte(exported / "model.pte")
            read = score_file(
                pte.logits, {"bf16": bf16, "own": own}, samples, lambda s: collate_sft(s, tokenizer.pad_id),
                c.evaluate.file_tokens, pte.max_context_length, f"{name}.pte",
            )  # fmt: skip
            n = len(read.tokens)
            eager = score(own, {}, samples[:n], lambda s: collate_sft(s, tokenizer.pad_id), c.evaluate.batch_size, name)
            scores[name] = read.means() | {
                "eager_nll": eager.means()["nll"], "samples": n, "tokens": int(read.tokens.sum()),
                "sha256": sha256_file(exported / "model.pte"),
            }  # fmt: skip
        tokens = gate_tokens(run)
        return {"scores": scores, **forms(run, models, folders, bf16, tokens)}

    settings = {
        "dataset": c.evaluate.dataset,
        "file_tokens": c.evaluate.file_tokens,
        "gate_tokens": c.export.gate_tokens,
    }
    return run.stage("files", on_rank_zero(build), settings, [*folders.values(), *inputs_of(models, ["bf16"])])


def forms(
    run: Run, models: Models, folders: dict[str, Path], bf16: CausalLM, tokens: list[int]
) -> dict[str, Any]:  # fmt: skip
    """What ships in all the forms it takes: each against each, and by block how far the residual stream is off."""
    shipped, t = models.known[models.shipped].make().eval(), torch.tensor([tokens])
    eager = load_eager(run.path(models.source) / "model", len(tokens))
    logits = {"bf16": bf16(t)[0], "fake-quantized": shipped(t)[0], "converted": eager(t)[0]}
    if models.shipped in folders:
        logits[".pte"] = Pte(folders[models.shipped] / "model.pte").logits(tokens)
    pairs = {a: {b: agreement(logits[a], logits[b]) for b in logits} for a in logits}
    blocks = {
        "BF16 → fake-quantized": divergence(bf16, shipped, ("decoder.layers", "decoder.layers"), t),
        "fake-quantized → converted": divergence(shipped, eager, ("decoder.layers", "layers"), t),
    }
    return {"pairs": pairs, "blocks": blocks, "numerics": numerics(shipped, t)}


def numerics(model: CausalLM, tokens: Tensor) -> dict[str, dict[str, float]]:
    """How far a model is from itself, tokens [1, s], when only the arithmetic changes, apart from any hand-over.

    `bf16`: under autocast, as it is trained if the run's dtype says so. `float32`: with the output of every linear off
    by a last place (2⁻²³ of it, up, down or not), as summing in another order does; a .pte cannot be closer than that.
    """
    exact = model(tokens)[0]
    with torch.autocast(tokens.device.type, torch.bfloat16):
        bf16 = model(tokens)[0].float()
    generator = torch.Generator().manual_seed(0)

    def last_place_off(module: Any, inputs: Any, y: Tensor) -> Tensor:
        return y * (1 + 2**-23 * torch.randint(-1, 2, y.shape, generator=generator))

    hooks = [m.register_forward_hook(last_place_off) for m in quantized_linears(model.decoder).values()]
    summed_otherwise = model(tokens)[0]
    for hook in hooks:
        hook.remove()
    return {"float32": agreement(exact, summed_otherwise), "bf16": agreement(exact, bf16)}


def speed(run: Run, folders: dict[str, Path]) -> Path:
    """Size, speed and memory of the .pte files, each in processes of its own."""
    e = run.config.evaluate

    def build(folder: Path) -> dict[str, Any]:
        say("measuring speed: leave the machine alone meanwhile …")
        files = {name: f / "model.pte" for name, f in folders.items()}
        result = benchmark(list(files.values()), e.speed_prompt_tokens, e.speed_new_tokens, threads=e.threads)
        if result["failed"]:
            raise UserError("\n".join(result["failed"].values()))
        result["models"] = {name: result["models"][str(path)] for name, path in files.items()}
        return result

    settings = {"prompt_tokens": e.speed_prompt_tokens, "new_tokens": e.speed_new_tokens, "threads": e.threads}
    return run.stage("speed", on_rank_zero(build), settings, list(folders.values()))


def sensitivities(run: Run, models: Models) -> Path:
    """What quantizing each linear of the BF16 model costs, alone and left out."""
    c = run.config

    def build(folder: Path) -> dict[str, Any]:
        device = pick_device(c.device)
        samples = heldout_samples(run, c.evaluate.sensitivity_samples)
        batches = [torch.tensor([s["tokens"]], device=device) for s in samples]
        s = sensitivity(models.known["ptq"].make().eval().to(device), batches)
        return {**asdict(s), "advice": advice(s), "samples": len(samples), "tokens": sum(b.numel() for b in batches)}

    settings = {"dataset": c.evaluate.dataset, "samples": c.evaluate.sensitivity_samples, "model": c.model}
    return run.stage("sensitivity", on_rank_zero(build), settings, inputs_of(models, ["ptq"]))


def text_perplexity(file: Path, reader: Reader, tokenizer: Any) -> dict[str, Any]:
    """Perplexity of a text file's documents, which form feeds part, in the form of a task's result."""
    documents = [d for d in file.read_text(encoding="utf-8").split("\f") if d.strip()]
    result = perplexity(reader, tokenizer, documents)
    names = ("token_perplexity", "word_perplexity", "bits_per_byte")
    return {"metrics": {n: {"value": result[n], "stderr": None} for n in names}, "samples": len(documents)}


def tasks(run: Run, models: Models, name: str) -> Path:
    """lm-evaluation-harness on one model, or on one .pte file."""
    c = run.config
    key = name.removesuffix(".pte")
    source = [file_of(run, models, key)] if name.endswith(".pte") else models.known[key].inputs

    def build(folder: Path) -> dict[str, Any]:
        tokenizer, e = tokenizer_of(c), c.evaluate
        say(f"tasks of {name}: {', '.join(e.tasks)} …")
        if name.endswith(".pte"):
            file = source[0] / "model.pte"
            reader = PteReader(Pte(file))
            what = {"file": file.name, "sha256": sha256_file(file)}
        else:
            model = models.known[key].make().eval().to(pick_device(c.device))
            reader = EagerReader(model, c.export.max_context_length, e.batch_size)
            what = {"file": None, "sha256": None}
        lm = harness_model(reader, tokenizer)
        results = {}
        if e.tasks:
            results = run_tasks(lm, e.tasks, _tasks_dir(c), e.task_limit, e.num_fewshot, c.seed, e.tasks_chat)
        if e.perplexity_text:
            results[Path(e.perplexity_text).name] = text_perplexity(Path(e.perplexity_text), reader, tokenizer)
        return what | {"results": results}

    e = c.evaluate
    settings = {
        "tasks": e.tasks, "tasks_dir": e.tasks_dir, "limit": e.task_limit, "num_fewshot": e.num_fewshot,
        "chat": e.tasks_chat, "perplexity": e.perplexity_text, "tokenizer": c.tokenizer,
        "max_length": c.export.max_context_length,
    }  # fmt: skip
    return run.stage(f"tasks_{name}", on_rank_zero(build), settings, source)
