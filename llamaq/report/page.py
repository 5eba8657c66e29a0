"""The report: what each step of the chain cost or won, as one markdown page a person reads top to bottom."""

from pathlib import Path
from typing import Any

from llamaq.evaluate.sensitivity import first_divergence
from llamaq.export.benchmark import markdown as benchmark_table

SAME_STREAM = 1e-5  # relative error of a residual stream that float32 sums in another order explain

# model key in the evaluation → how the report calls it, in the order of the chain
MODELS = {
    "bf16": "BF16 start",
    "ptq": "PTQ of the start",
    "control": "BF16 control",
    "ptq_control": "PTQ of the control",
    "qat": "QAT",
    "qat_lora": "QAT + LoRA",
    "final": "QAT + LoRA + DPO",
    "spinquant": "SpinQuant",
}
HAND_OVERS = {
    "converted": "fake-quantized → converted",
    "executorch_eager": "fake-quantized → ExecuTorch eager",
    "pte": "fake-quantized → .pte, short contexts",
    "pte_long": "fake-quantized → .pte, one context",
    "kv_cache": "fake-quantized → .pte with int8 KV cache",
    "float32": "linears off by a last place of float32",
    "bf16": "bf16 autocast, as in training",
}


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """A markdown table; of numbers, all columns but the first are right-aligned."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def quality_table(scores: dict[str, dict[str, float]]) -> str:
    references = [k.removeprefix("kl/") for k in next(iter(scores.values())) if k.startswith("kl/")]
    header = ["model", "NLL (nats/token)", "perplexity"]
    for r in references:
        header += [f"KL from {MODELS[r]}", "top-1", "top-5"]
    rows = []
    for key, s in scores.items():
        cells = [MODELS[key], f"{s['nll']:.4f}", f"{s['perplexity']:.3f}"]
        for r in references:
            cells += [f"{s[f'kl/{r}']:.2e}", f"{s[f'top1/{r}']:.4f}", f"{s[f'top5/{r}']:.4f}"]
        rows.append(cells)
    return table(header, rows)


def hand_over_table(results: dict[str, dict[str, float]]) -> str:
    rows = []
    for key, r in results.items():
        sqnr = "∞" if r["relative_error"] == 0 else f"{r['sqnr_db']:.1f}"
        errors = [f"{r['relative_error']:.1e}", f"{r['token_error']:.1e}"]
        title = HAND_OVERS.get(key, f"adapters → method `{key.removeprefix('pte/')}`")
        rows.append([title, *errors, sqnr, f"{r['kl']:.1e}", f"{r['top1']:.4f}"])
    return table(["hand-over", "relative error", "median token's", "SQNR (dB)", "KL (nats/token)", "top-1"], rows)


def dpo_table(first: dict[str, Any], last: dict[str, Any]) -> str:
    keys = [k for k in first if k == "loss" or k.startswith(("rewards/", "logprobs/"))]
    rows = [[k, f"{first[k]:.4f}", f"{last[k]:.4f}"] for k in keys]
    return table(["DPO metric", f"step {first['step']}", f"step {last['step']}"], rows)


def dpo_parts(dpo: dict[str, Any] | None) -> list[str]:
    if dpo is None:
        return []
    skipped = len(dpo["skipped_pairs"])
    return [
        dpo_table(dpo["first"], dpo["last"]),
        f"{dpo['samples']} pairs; {skipped} skipped for want of room for an answer.",
    ]


def share_lines(shares: dict[str, dict[str, float]]) -> str:
    """What training wins of the loss that quantizing the control costs, with its interval."""
    lines = []
    for key, s in shares.items():
        lines.append(
            f"- {MODELS[key]}: **{s['share']:.2f}** (95 % interval {s['low']:.2f} to {s['high']:.2f}): "
            f"{s['won_nats_per_token']:.4f} of {s['lost_nats_per_token']:.4f} nats a token"
        )
    return "\n".join(lines)


def files_table(scores: dict[str, dict[str, Any]]) -> str:
    rows = [
        [f"{MODELS[name]}, `{s['sha256'][:12]}`", f"{s['nll']:.4f}", f"{s['eager_nll']:.4f}", f"{s['kl/bf16']:.2e}",
         f"{s['kl/own']:.1e}", f"{s['top1/own']:.4f}", f"{s['top5/own']:.4f}"]
        for name, s in scores.items()
    ]  # fmt: skip
    header = [".pte, sha256", "NLL (nats/token)", "the model's", "KL from BF16", "KL from the model", "top-1", "top-5"]
    return table(header, rows)


def pairs_table(pairs: dict[str, dict[str, dict[str, float]]]) -> str:
    """Each form against each: KL(row ‖ column), share of equal argmaxes, top-5, SQNR."""

    def cell(r: dict[str, float]) -> str:
        sqnr = "∞" if r["relative_error"] == 0 else f"{r['sqnr_db']:.0f} dB"
        return f"{r['kl']:.1e}, {r['top1']:.3f}, {r['top5']:.3f}, {sqnr}"

    names = list(pairs)
    rows = [[a, *("" if a == b else cell(pairs[a][b]) for b in names)] for a in names]
    return table(["from \\ to", *names], rows)


def first_block(errors: list[float]) -> str:
    """Where two models part, from the relative error of the residual stream after each block."""
    at = first_divergence(errors, SAME_STREAM)
    if at is None:
        return f"no block is off by more than {SAME_STREAM:.0e} (largest: {max(errors):.1e})"
    return f"off from block {at} on ({errors[at]:.1e} there, {errors[-1]:.1e} after the last)"


def parts_table(parts: dict[str, int]) -> str:
    total = sum(parts.values())
    rows = [[k, f"{v / 2**20:,.2f}", f"{100 * v / total:.1f} %"] for k, v in parts.items()]
    return table(["part", "MiB", "share"], [*rows, ["**file**", f"**{total / 2**20:,.2f}**", ""]])


def tasks_table(results: dict[str, dict[str, Any]]) -> str:
    """Meta's form: a row a task and metric, a column a model; standard errors behind ±."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for model, result in results.items():
        for task, r in result["results"].items():
            for metric, m in r["metrics"].items():
                error = f" ± {m['stderr']:.3f}" if m.get("stderr") else ""
                shots = f"{r['num_fewshot']}-shot, " if r.get("num_fewshot") is not None else ""
                value = f"{m['value']:.4f}" if m["value"] < 1e4 else f"{m['value']:.4g}"
                rows.setdefault((f"{task} ({shots}{r['samples']})", metric), {})[model] = value + error
    body = [[task, metric, *(cells.get(m, "") for m in results)] for (task, metric), cells in rows.items()]
    return table(["task (samples)", "metric", *(model_title(m) for m in results)], body)


def model_title(name: str) -> str:
    """What the report calls `ptq` or `final.pte`."""
    return MODELS[name.removesuffix(".pte")] + (", .pte" if name.endswith(".pte") else "")


def measured_parts(measured: dict[str, Any]) -> list[str]:
    """The sections of what was measured beyond the scores; `measured` is stage → metrics."""
    parts = []
    if files := measured.get("files"):
        read = next(iter(files["scores"].values()))
        parts += [
            "## Measured on the exported files",
            f"The first {read['samples']:,} held-out samples ({read['tokens']:,} scored tokens), one token a call "
            "through the KV cache of each file; beside it the same text read by the model as llamaq computes it, in "
            "float32.",
            files_table(files["scores"]),
            "What ships in each form it takes, on the gates' tokens: KL(row ‖ column) in nats a token, top-1, top-5, "
            "SQNR.",
            pairs_table(files["pairs"]),
            "The fake-quantized model against itself where only the arithmetic differs: what float32 itself leaves "
            "open, which is as close as a .pte can be, and what bf16 adds in training.",
            hand_over_table(files["numerics"]),
            "![by block](blocks.png)",
            "\n".join(f"- {hand_over}: {first_block(errors)}" for hand_over, errors in files["blocks"].items()),
        ]
    if speed := measured.get("speed"):
        settings = speed["settings"]
        names = {k: model_title(f"{k}.pte") for k in speed["models"]}
        parts += [
            "## Size and speed",
            f"On {speed['device']} with {settings['threads']} threads: prompt of {settings['prompt_tokens']} tokens, "
            f"{settings['new_tokens']} new ones; medians of {settings['runs'] * settings['rounds']} runs in "
            f"{settings['rounds']} processes of each model's own, quartiles in brackets, bold: ratio to the first. "
            "Memory is the peak resident set less Python's. On a phone: README, *On a phone or an Arm board*.",
            benchmark_table(speed, names),
            "![speed](speed.png)",
            *(f"{names[k]}: sha256 `{m['sha256']}`" for k, m in speed["models"].items()),
        ]
    if exported := measured.get("export"):
        parts += ["What the file that ships consists of:", parts_table(exported["parts"])]
    if s := measured.get("sensitivity"):
        parts += [
            "## Where quantization costs",
            f"PTQ of the BF16 model on {s['tokens']:,} held-out tokens, KL from BF16 in nats a token: all quantized "
            f"{s['whole']:.2e}. Left: only one linear quantized. Right: what is saved if all but one are.",
            "![sensitivity](sensitivity.png)",
            "\n".join(f"- {line}" for line in s["advice"]),
        ]
    if tasks := {k.removeprefix("tasks_"): v for k, v in measured.items() if k.startswith("tasks_")}:
        files = [f"{model_title(k)} `{v['sha256'][:12]}`" for k, v in tasks.items() if v["sha256"]]
        parts += [
            "## Tasks",
            "lm-evaluation-harness; ± is one standard error." + (f" Files: {', '.join(files)}." if files else ""),
            tasks_table(tasks),
            "![tasks](tasks.png)",
        ]
    return parts


def plan_parts(facts: dict[str, Any]) -> list[str]:
    """Memory as it was planned before the run, and what the file that ships took where its speed was measured."""
    rows = [
        [f"{n['what']}, on {n['where']}", f"{n['bytes'] / 2**30:.3f}",
         ", ".join(f"{k} {v / 2**30:.3f}" for k, v in n["parts"].items() if v)]
        for n in facts["plan"]
    ]  # fmt: skip
    measured = facts["measured"].get("speed", {}).get("models", {}).get(facts["shipped"], {}).get("memory_bytes")
    seen = f" `model.pte` took {max(measured) / 2**30:.3f} GiB here." if measured else ""
    return [
        "## Memory",
        "As planned before the run, from shapes alone (llamaq's tests hold such plans against real processes: within "
        f"15 %).{seen}",
        table(["what", "GiB", "of which (GiB)"], rows, numbers=False),
    ]


def render(facts: dict[str, Any]) -> str:
    """The page, from the facts the recipe gathered."""
    dpo = facts["dpo"]
    parts = [
        f"# llamaq report: {facts['name']}",
        f"{facts['finished']} · {facts['parameters'] / 1e6:,.1f} M parameters · int4 groups of {facts['group_size']}, "
        f"int8 embedding and head, int8 activations · adapters rank {facts['rank']} · llamaq {facts['version']}",
        "## Quality by step of the chain",
        f"{facts['samples']:,} held-out samples, {facts['tokens']:,} tokens scored, float32.",
        quality_table(facts["scores"]),
        "![quality](quality.png)",
        "![agreement](agreement.png)",
    ]
    if facts["shares"]:
        parts += [
            "### Share of the quantization loss won back",
            "(NLL[PTQ of the control] − NLL[model]) / (NLL[PTQ of the control] − NLL[control]), paired bootstrap over "
            "samples. The control is the same start trained on the same data for the same steps without quantization.",
            share_lines(facts["shares"]),
        ]
    parts += [
        "## What is trained is what runs",
        f"All {facts['constants']} tensors of the checkpoint (codes, scales, adapters, norms) lie in the .pte bit for "
        f"bit. Logits of {facts['gate_tokens']} held-out tokens, the .pte stepping through its KV cache; gates: "
        f"relative error ≤ {facts['max_relative_error']:.0e} (for the .pte the median token's: one activation rounded "
        f"to the neighbouring int8 level moves its token by some 5e-3), top-1 ≥ {facts['min_top1']:.3f}, KL of the one "
        f"long context ≤ {facts['max_kl']:.0e}.",
        hand_over_table(facts["hand_overs"]),
        f"The exported file has {facts['pte_bytes'] / 2**20:,.1f} MiB. Asked on it: *{facts['prompt']}*",
        f"> {facts['answer']}",
        *measured_parts(facts["measured"]),
        *plan_parts(facts),
        "## Training",
        "![losses](losses.png)",
        table(["stage", "steps", "first loss", "last loss"], [
            [t["stage"], str(t["steps"]), f"{t['first']:.4f}", f"{t['last']:.4f}"] for t in facts["training"]
        ]),
        *dpo_parts(dpo),
        "## Where things are",
        table(["what", "where"], [[what, f"`{where}`"] for what, where in facts["files"].items()], numbers=False),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["packages"].items()) + ".",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def selection_table(candidates: dict[str, dict[str, Any]], chosen: str) -> str:
    rows = []
    for name, m in candidates.items():
        kl = f"{m['kl']:.3e} ± {m['kl_interval']:.1e}"
        seconds = f"{m['learn_seconds']:.0f}" if m["learn_seconds"] else ""
        rows.append([f"**{name}**" if name == chosen else name, kl, seconds, f"{m['round_seconds']:.0f}"])
    return table(["candidate", "KL from BF16 (nats/token)", "learning (s)", "rounding (s)"], rows)


def render_spinquant(facts: dict[str, Any]) -> str:
    """The page of a SpinQuant run."""
    share, chosen = facts["share"], facts["chosen"]
    forced = " It was forced (spinquant.force)." if facts["forced"] else ""
    parts = [
        f"# llamaq report: {facts['name']}",
        f"{facts['finished']} · {facts['parameters'] / 1e6:,.1f} M parameters · int4 groups of {facts['group_size']}, "
        f"int8 embedding and head, int8 activations · SpinQuant, ships **{chosen}** · llamaq {facts['version']}",
        "## Quality",
        f"{facts['samples']:,} held-out samples, {facts['tokens']:,} tokens scored, float32. PTQ rounds every weight "
        "of the same model to the nearest code at full range.",
        quality_table(facts["scores"]),
        f"Of the KL that PTQ loses, SpinQuant wins back **{share['share']:.2f}** (95 % interval {share['low']:.2f} to "
        f"{share['high']:.2f}, paired bootstrap over samples).",
        "![quality](quality.png)",
        "![agreement](agreement.png)",
        "## Which rotations",
        f"Calibrated on {facts['calibration_tokens']:,} tokens, judged on {facts['selection_tokens']:,} others with "
        f"everything rounded as on the phone. What is not rotated is among the candidates; the best ships.{forced}",
        selection_table(facts["candidates"], chosen),
        "![selection](selection.png)",
        "## What rotating does",
        "Largest magnitude over root mean square: of the weights that share a scale, and of the tokens that linears "
        "read. The smaller, the finer the steps.",
        "![outliers](outliers.png)",
        "Squared error of what the linears compute, relative to its size, with inputs quantized.",
        "![error by layer](layer_errors.png)",
        "## What was measured is what runs",
        f"All {facts['constants']} tensors of the checkpoint lie in the .pte bit for bit. Logits of "
        f"{facts['gate_tokens']} held-out tokens; gates: relative error ≤ {facts['max_relative_error']:.0e} (for the "
        f".pte the median token's), top-1 ≥ {facts['min_top1']:.3f}, KL of the one long context ≤ "
        f"{facts['max_kl']:.0e}.",
        hand_over_table(facts["hand_overs"]),
        f"The exported file has {facts['pte_bytes'] / 2**20:,.1f} MiB. Asked on it: *{facts['prompt']}*",
        f"> {facts['answer']}",
        *measured_parts(facts["measured"]),
        *plan_parts(facts),
        "## Where things are",
        table(["what", "where"], [[what, f"`{where}`"] for what, where in facts["files"].items()], numbers=False),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["packages"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, page: str) -> Path:
    path = folder / "report.md"
    path.write_text(page, encoding="utf-8")
    return path
