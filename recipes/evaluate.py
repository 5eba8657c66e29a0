"""What every model of a run is worth: quality, agreement, tasks, size and speed, and where the loss comes from.

    tune run evaluate --config llama3_2/1B_qat_lora_dpo [key=value …]        (after the chain, or `tune run spinquant`)
    tune run evaluate --config … evaluate.tasks=[mmlu,arc_challenge,gsm8k] evaluate.models=[bf16,ptq,final,final.pte]

    evaluate           held-out loss, KL and agreement of the models as llamaq computes them
    export_NAME        .pte files of models that do not ship, where evaluate.models asks for NAME.pte
    files              the same numbers read through each .pte, and agreement of the forms that what ships takes
    sensitivity        what quantizing each linear costs
    tasks_NAME         lm-evaluation-harness, on models and on .pte files
    speed              size, speed and memory of the .pte files on this machine
    report             report.md, plots, report.json, and README.md, the model card

NAME is bf16 (what the run starts from), ptq (that, rounded to nearest), control and ptq_control (trained alike without
quantization), qat, qat_lora, final, spinquant. Stages that are up to date are kept, so asking for more costs only that.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import llamaq
from llamaq.config import Config
from llamaq.errors import UserError
from llamaq.evaluate import card, plots, report
from llamaq.evaluate.harness import EagerReader, PteReader, Reader, check_tasks, harness_model, perplexity, run_tasks
from llamaq.evaluate.scores import Scores, agreement, score, score_file, share_won_back
from llamaq.evaluate.sensitivity import LINEARS, advice, divergence, sensitivity
from llamaq.export.benchmark import MEASURES, benchmark, summary
from llamaq.export.pte import Pte, load_eager
from llamaq.pipeline import Run, from_rank_zero, package_versions, say, sha256_file
from llamaq.quant.prepare import merge_adapters
from llamaq.recipes.export_executorch import (
    GATE_CONTEXT,
    export_model,
    final_model,
    gate_tokens,
    on_rank_zero,
    trained_model,
)
from llamaq.recipes.qat import qat
from llamaq.recipes.qat_lora import qat_lora
from llamaq.runner import main
from llamaq.tracking import Tracker
from llamaq.train.data import build_dataset, collate_sft
from llamaq.train.memory import shape_of
from llamaq.train.model import CausalLM, build_model, pick_device
from llamaq.train.stages import loss_curve, start_inputs, start_weights, tokenizer_of, weights_of


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


def chain_names(c: Config) -> tuple[list[str], str]:
    """Names of the chain's models, and of the one that ships."""
    stages = ["qat", "qat_lora", "final"][: ["qat", "qat_lora", "qat_dpo"].index(c.export.stage) + 1]
    names = ["bf16", "ptq", *(["control", "ptq_control"] if c.evaluate.control else []), *stages]
    return names, stages[-1]


def chain_models(run: Run) -> Models:
    """The models of the training chain."""
    c, scheme = run.config, run.scheme

    def control(scheme: Any) -> CausalLM:
        weights = weights_of(run.path("control_qat"), run.path("control_lora"))
        merged = merge_adapters(build_model(c.model, weights, None, (c.adapters.rank, c.adapters.alpha)))
        return build_model(c.model, merged.get_submodule("decoder").state_dict(), scheme)

    controls = [run.path("control_qat"), run.path("control_lora")]
    every = {
        "bf16": Candidate(lambda: build_model(c.model, start_weights(c), None), start_inputs(c)),
        "ptq": Candidate(lambda: build_model(c.model, start_weights(c), scheme), start_inputs(c)),
        "control": Candidate(lambda: control(None), controls),
        "ptq_control": Candidate(lambda: control(scheme), controls),
        "qat": Candidate(lambda: trained_model(run, "qat"), [run.path("qat")]),
        "qat_lora": Candidate(
            lambda: trained_model(run, "qat_lora", frozen=True), [run.path("qat"), run.path("qat_lora")]
        ),
        "final": Candidate(lambda: final_model(run), [run.path("qat_dpo")]),
    }
    names, shipped = chain_names(c)
    return Models({n: every[n] for n in names}, shipped, "convert")


def check(c: Config, known: list[str], shipped: str) -> None:
    """Find what is wrong with the evaluation's settings before anything is trained."""
    wanted_models(c, known, shipped)
    if c.evaluate.tasks:
        check_tasks(c.evaluate.tasks, _tasks_dir(c))
    if c.evaluate.perplexity_text and not Path(c.evaluate.perplexity_text).is_file():
        raise UserError(f"evaluate.perplexity_text={c.evaluate.perplexity_text}: no such file")


def _tasks_dir(c: Config) -> Path | None:
    return Path(c.evaluate.tasks_dir) if c.evaluate.tasks_dir else None


def evaluate(run: Run) -> Path:
    """Scores of every model of the chain, against the BF16 start and the control."""
    c = run.config
    if c.evaluate.control:
        qat(run, control=True)
        qat_lora(run, control=True)
    models = chain_models(run)

    def build(folder: Path) -> dict[str, Any]:
        scores = score_all(run, models)
        shares = {}
        if {"control", "ptq_control", "qat_lora"} <= set(scores):
            # only stage 2 has seen what the control has: stage 1 fewer steps, stage 3 other data
            shares = {"qat_lora": share_won_back(scores["ptq_control"], scores["qat_lora"], scores["control"])}
        return score_metrics(scores) | {"shares": shares}

    return score_stage(run, models, build)


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


# --- the exported files ----------------------------------------------------------------------------------------------


def file_of(run: Run, models: Models, name: str) -> Path:
    """The stage folder that holds the .pte of a model, exported now if it does not ship."""
    if name == models.shipped:
        return run.need("export")
    known = models.known[name]
    return export_model(run, name, lambda: known.make().eval(), known.inputs, models.context)


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
    return {"pairs": pairs, "blocks": blocks}


def speed(run: Run, folders: dict[str, Path]) -> Path:
    """Size, speed and memory of the .pte files, each in processes of its own."""
    e = run.config.evaluate

    def build(folder: Path) -> dict[str, Any]:
        say("measuring speed: leave the machine alone meanwhile …")
        files = {name: f / "model.pte" for name, f in folders.items()}
        result = benchmark(list(files.values()), e.speed_prompt_tokens, e.speed_new_tokens, threads=e.threads)
        result["models"] = {name: result["models"][str(path)] for name, path in files.items()}
        return result

    settings = {"prompt_tokens": e.speed_prompt_tokens, "new_tokens": e.speed_new_tokens, "threads": e.threads}
    return run.stage("speed", on_rank_zero(build), settings, list(folders.values()))


# --- where the loss comes from, and tasks ----------------------------------------------------------------------------


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


# --- the report ------------------------------------------------------------------------------------------------------


def write_report(run: Run, measured: list[str]) -> Path:
    """The report's page, plots, JSON and model card of the chain, also logged to W&B.

    Args:
        run: the run.
        measured: stages of `measure`.
    """
    c = run.config
    shipped = ("qat", "qat_lora", "qat_dpo")[: ("qat", "qat_lora", "qat_dpo").index(c.export.stage) + 1]
    stages = [*shipped, "convert", "export", "evaluate", *(m for m in measured if m != "export")]

    def render(folder: Path, facts: dict[str, Any]) -> str:
        names = {report.MODELS[k]: s for k, s in facts["scores"].items()}
        baseline = "control" if "control" in facts["scores"] else "bf16"
        plots.losses(folder / "losses.png", curves(run))
        plots.quality(folder / "quality.png", {n: s["nll"] for n, s in names.items()}, report.MODELS[baseline])
        plots.agreement(
            folder / "agreement.png", {n: s[f"kl/{baseline}"] for n, s in names.items()},
            {n: s[f"top1/{baseline}"] for n, s in names.items()}, report.MODELS[baseline],
        )  # fmt: skip
        return report.render(facts)

    return report_stage(run, stages, lambda: gather(run, list(shipped), measured), render, chain_card(c))


def report_stage(
    run: Run, stages: list[str], facts_of: Callable[[], dict[str, Any]],
    render: Callable[[Path, dict[str, Any]], str], for_card: dict[str, Any],
) -> Path:  # fmt: skip
    """The stage `report` of any run: report.md, its plots, report.json, README.md, and the same in W&B.

    Args:
        run: the run.
        stages: what the report reads.
        facts_of: everything it states.
        render: draws the plots of this kind of run into a folder and returns the page.
        for_card: what the card says besides.
    """
    c = run.config
    inputs = [run.need(s) for s in stages]
    metrics = from_rank_zero(lambda: {s: run.metrics(s) for s in stages})  # what the page shows of them

    def build(folder: Path) -> dict[str, Any]:
        facts = facts_of()
        draw_measured(folder, facts["measured"])
        report.write(folder, render(folder, facts))
        (folder / "report.json").write_text(json.dumps(facts | {"stages": metrics}, indent=1, default=str))
        page = card.render(facts | for_card | {"folder": run.folder})
        (folder / "README.md").write_text(page, encoding="utf-8")
        with Tracker(c, run.id, "report", folder) as tracker:
            scores = {report.MODELS[k]: s for k, s in facts["scores"].items()}
            tracker.table("quality", ["model", *facts["scores"]["bf16"]], [[n, *s.values()] for n, s in scores.items()])
            log_measured(tracker, facts["measured"])
            for picture in sorted(folder.glob("*.png")):
                tracker.image(picture.stem, picture)
            tracker.summary({"hand_overs": facts["hand_overs"], "shares": facts.get("shares", facts.get("share"))})
        return {"finished": facts["finished"]}

    folder = run.stage("report", on_rank_zero(build), {"version": llamaq.__version__, "metrics": metrics}, inputs)
    from_rank_zero(lambda: card.publish(run.folder, (folder / "README.md").read_text(encoding="utf-8")))
    return folder


def chain_card(c: Config) -> dict[str, Any]:
    """What the model card says of a chain's data and settings."""
    stages = ["qat", "qat_lora", "qat_dpo"][: ["qat", "qat_lora", "qat_dpo"].index(c.export.stage) + 1]
    trainings = {s: c.training(s) for s in stages}
    return {
        "base": Path(c.checkpoint_dir).name if c.base is None else "a model trained here",
        "license": "llama3.2" if c.base is None else "other",
        "shipped": chain_names(c)[1],
        "checkpoint": Path(c.output_dir) / "convert" / "model",
        "rotation": None,
        "max_seq_length": c.export.max_seq_length,
        "max_context_length": c.export.max_context_length,
        "data": {s: data_line(t.dataset) for s, t in trainings.items()} | {"held out": data_line(c.evaluate.dataset)},
        "hyperparameters": {
            s: f"{t.optimizer['_component_'].rpartition('.')[2]}, lr {t.optimizer.get('lr')}, global batch "
            f"{t.global_batch_size}, {'' if t.max_steps is None else f'at most {t.max_steps} steps, '}{t.epochs} epochs"
            for s, t in trainings.items()
        },
    }


def data_line(dataset: dict[str, Any]) -> str:
    """A dataset in a few words: the file's name, not its path, and who reads it."""
    source = dataset.get("data_files") or dataset.get("source")
    return f"`{Path(str(source)).name}` by `{dataset['_component_']}`"


def draw_measured(folder: Path, measured: dict[str, Any]) -> None:
    """Plots of what was measured beyond the scores."""
    if files := measured.get("files"):
        plots.blocks(folder / "blocks.png", files["blocks"])
    if result := measured.get("speed"):
        panels = {}
        for key, (title, unit, _, _) in MEASURES.items():
            scale = 2**20 if unit == "MiB" else 1
            panels[f"{title}, {unit}"] = {
                report.model_title(f"{name}.pte"): tuple(v / scale for v in summary(m[key]))
                for name, m in result["models"].items()
            }
        plots.speed(folder / "speed.png", panels)
    if s := measured.get("sensitivity"):
        saved = {unit: s["whole"] - kl for unit, kl in s["left_out"].items()}
        plots.sensitivity(folder / "sensitivity.png", s["alone"], saved, LINEARS)
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for stage, result in measured.items():
        if stage.startswith("tasks_"):
            for task, r in result["results"].items():
                for metric, m in r["metrics"].items():
                    row = values.setdefault(f"{task}, {metric}", {})
                    row[report.model_title(stage.removeprefix("tasks_"))] = (m["value"], m.get("stderr") or 0.0)
    if values:
        plots.tasks(folder / "tasks.png", values)


def log_measured(tracker: Tracker, measured: dict[str, Any]) -> None:
    """Tables of it for W&B."""
    if files := measured.get("files"):
        columns = list(next(iter(files["scores"].values())))
        tracker.table("files", ["file", *columns], [[n, *s.values()] for n, s in files["scores"].items()])
    if result := measured.get("speed"):
        columns = [f"{title} ({unit})" for title, unit, _, _ in MEASURES.values()]
        rows = [
            [name, *(summary(m[key])[0] / (2**20 if unit == "MiB" else 1) for key, (_, unit, _, _) in MEASURES.items())]
            for name, m in result["models"].items()
        ]
        tracker.table("speed", ["file", *columns], rows)
    if s := measured.get("sensitivity"):
        rows = [[unit, kl, s["whole"] - s["left_out"][unit]] for unit, kl in s["alone"].items()]
        tracker.table("sensitivity", ["layer", "kl_alone (nats/token)", "kl_saved (nats/token)"], rows)
    rows = [
        [stage.removeprefix("tasks_"), task, metric, m["value"], m.get("stderr")]
        for stage, result in measured.items()
        if stage.startswith("tasks_")
        for task, r in result["results"].items()
        for metric, m in r["metrics"].items()
    ]
    if rows:
        tracker.table("tasks", ["model", "task", "metric", "value", "stderr"], rows)


def measured_facts(run: Run, measured: list[str]) -> dict[str, Any]:
    """What every report states of the export and of what was measured."""
    c, exported = run.config, run.metrics("export")
    return {
        "name": run.folder.name,
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "version": llamaq.__version__,
        "packages": package_versions(),
        "parameters": shape_of(c.model).weights,
        "group_size": c.scheme.group_size,
        "constants": exported["constants"],
        "gate_tokens": c.export.gate_tokens,
        "max_relative_error": c.export.max_relative_error,
        "min_top1": c.export.min_top1_agreement,
        "max_kl": c.export.max_kl,
        "pte_bytes": exported["bytes"],
        "pte_sha256": exported["sha256"],
        "prompt": exported["prompt"],
        "answer": exported["answer"] or "(nothing)",
        "measured": {"export": exported} | {s: run.metrics(s) for s in measured},
    }


def curves(run: Run) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    panels = {"QAT": ("qat", "control_qat"), "LoRA": ("qat_lora", "control_lora"), "DPO": ("qat_dpo",)}
    return {
        title: {
            "BF16 control" if s.startswith("control") else "quantized": loss_curve(run.path(s))
            for s in stages
            if run.path(s).is_dir()
        }
        for title, stages in panels.items()
    }


def gather(run: Run, trained: list[str], measured: list[str]) -> dict[str, Any]:
    """Everything the chain's page states, from the stages' manifests."""
    c = run.config
    return {
        **run.metrics("evaluate"),
        **measured_facts(run, measured),
        "rank": c.adapters.rank,
        "hand_overs": {**run.metrics("convert"), **run.metrics("export")["hand_overs"]},
        "dpo": run.metrics("qat_dpo") if "qat_dpo" in trained else None,
        "training": [
            {"stage": s, "steps": m["steps"], "first": m["first"]["loss"], "last": m["last"]["loss"]}
            for s in trained
            for m in [run.metrics(s)]
        ],
        "files": {
            "quantized checkpoint, Meta layout": run.path("convert") / "model",
            "adapters for PEFT": run.path("convert") / "adapter",
            "exported model": run.path("export") / "model.pte",
            "model card": run.folder / "README.md",
            "all numbers": run.path("report") / "report.json",
            "metrics of each step": run.folder / "<stage>" / "metrics.jsonl",
            "W&B, if offline": f"wandb sync {run.folder}/wandb/offline-run-*",
        },
    }


def recipe(run: Run) -> None:
    if run.config.spinquant is not None and run.config.qat is None:
        from llamaq.recipes.spinquant import evaluate_and_report

        say(f"report: {evaluate_and_report(run)}/report.md")
        return
    check(run.config, *chain_names(run.config))
    say(f"report: {evaluate_and_report_chain(run)}/report.md")


def evaluate_and_report_chain(run: Run) -> Path:
    """Scores, measurements and report of the training chain; returns the report's folder."""
    evaluate(run)
    return write_report(run, measure(run, chain_models(run)))


if __name__ == "__main__":
    main(recipe, __doc__)
