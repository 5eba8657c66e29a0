"""Write the tables of the report in markdown, and say what the report calls each model and hand-over."""

from typing import Any

MIB = 2**20

# model's name in the stages → what the report calls it, in the order of the chain
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
    "float32": "linears perturbed by one float32 ulp",
    "bf16": "bf16 autocast, as in training",
}


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """Return a markdown table; in a table of numbers, all columns but the first are right-aligned."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def model_title(name: str) -> str:
    """Return what the report calls `ptq` or `final.pte`."""
    return MODELS[name.removesuffix(".pte")] + (", .pte" if name.endswith(".pte") else "")


def quality_table(scores: dict[str, dict[str, float]]) -> str:
    """Tabulate NLL and perplexity of each model, and its agreement with each reference."""
    references = [k.removeprefix("kl/") for k in next(iter(scores.values())) if k.startswith("kl/")]
    header = ["model", "NLL (nats/token)", "perplexity"]
    for r in references:
        header += [f"KL from {MODELS[r]}", "top-1", "top-5"]
    rows = []
    for name, s in scores.items():
        cells = [MODELS[name], f"{s['nll']:.4f}", f"{s['perplexity']:.3f}"]
        for r in references:
            cells += [f"{s[f'kl/{r}']:.2e}", f"{s[f'top1/{r}']:.4f}", f"{s[f'top5/{r}']:.4f}"]
        rows.append(cells)
    return table(header, rows)


def hand_over_table(results: dict[str, dict[str, float]]) -> str:
    """Tabulate how far logits are from each other (`llamaq.model.compare.agreement`), a row per hand-over."""
    rows = []
    for key, r in results.items():
        title = HAND_OVERS.get(key, f"adapters → method `{key.removeprefix('pte/')}`")
        errors = [f"{r['relative_error']:.1e}", f"{r['token_error']:.1e}", _sqnr(r, ".1f")]
        rows.append([title, *errors, f"{r['kl']:.1e}", f"{r['top1']:.4f}"])
    header = ["hand-over", "relative error", "median token's", "SQNR (dB)", "KL (nats/token)", "top-1"]
    return table(header, rows)


def pairs_table(pairs: dict[str, dict[str, dict[str, float]]]) -> str:
    """Tabulate every form against every other: KL(row ‖ column), top-1, top-5, SQNR."""

    def cell(r: dict[str, float]) -> str:
        sqnr = _sqnr(r, ".0f")
        return f"{r['kl']:.1e}, {r['top1']:.3f}, {r['top5']:.3f}, {sqnr}{'' if sqnr == '∞' else ' dB'}"

    names = list(pairs)
    rows = [[a, *("" if a == b else cell(pairs[a][b]) for b in names)] for a in names]
    return table(["from \\ to", *names], rows)


def _sqnr(r: dict[str, float], form: str) -> str:
    return "∞" if r["relative_error"] == 0 else f"{r['sqnr_db']:{form}}"


def files_table(scores: dict[str, dict[str, Any]]) -> str:
    """Tabulate what each .pte scores, beside the model that it was made from."""
    rows = []
    for name, s in scores.items():
        nll = [f"{s['nll']:.4f}", f"{s['eager_nll']:.4f}"]
        own = [f"{s['kl/own']:.1e}", f"{s['top1/own']:.4f}", f"{s['top5/own']:.4f}"]
        rows.append([f"{MODELS[name]}, `{s['sha256'][:12]}`", *nll, f"{s['kl/bf16']:.2e}", *own])
    header = [".pte, sha256", "NLL (nats/token)", "model's NLL", "KL from BF16", "KL from the model", "top-1", "top-5"]
    return table(header, rows)


def parts_table(parts: dict[str, int]) -> str:
    """Tabulate the bytes of a file by what they hold."""
    total = sum(parts.values())
    rows = [[k, f"{v / MIB:,.2f}", f"{100 * v / total:.1f} %"] for k, v in parts.items()]
    return table(["part", "MiB", "share"], [*rows, ["**file**", f"**{total / MIB:,.2f}**", ""]])


def tasks_table(results: dict[str, dict[str, Any]]) -> str:
    """Tabulate tasks as Meta does: a row per task and metric, a column per model, standard errors behind ±."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for model, result in results.items():
        for task, r in result["results"].items():
            shots = f"{r['num_fewshot']}-shot, " if r.get("num_fewshot") is not None else ""
            for metric, m in r["metrics"].items():
                error = f" ± {m['stderr']:.3f}" if m.get("stderr") else ""
                value = f"{m['value']:.4f}" if m["value"] < 1e4 else f"{m['value']:.4g}"
                rows.setdefault((f"{task} ({shots}{r['samples']})", metric), {})[model] = value + error
    body = [[task, metric, *(cells.get(m, "") for m in results)] for (task, metric), cells in rows.items()]
    return table(["task (samples)", "metric", *(model_title(m) for m in results)], body)


def dpo_table(first: dict[str, Any], last: dict[str, Any]) -> str:
    """Tabulate DPO's metrics at the first and the last step."""
    keys = [k for k in first if k == "loss" or k.startswith(("rewards/", "logprobs/"))]
    rows = [[k, f"{first[k]:.4f}", f"{last[k]:.4f}"] for k in keys]
    return table(["DPO metric", f"step {first['step']}", f"step {last['step']}"], rows)


def selection_table(candidates: dict[str, dict[str, Any]], chosen: str) -> str:
    """Tabulate SpinQuant's candidates; the one that ships is bold."""
    rows = []
    for name, m in candidates.items():
        kl = f"{m['kl']:.3e} ± {m['kl_interval']:.1e}"
        seconds = f"{m['learn_seconds']:.0f}" if m["learn_seconds"] else ""
        rows.append([f"**{name}**" if name == chosen else name, kl, seconds, f"{m['round_seconds']:.0f}"])
    return table(["candidate", "KL from BF16 (nats/token)", "learning (s)", "rounding (s)"], rows)


def plan_table(plan: list[dict[str, Any]]) -> str:
    """Tabulate the memory that was planned before the run."""
    rows = []
    for line in plan:
        parts = ", ".join(f"{k} {v / 2**30:.3f}" for k, v in line["parts"].items() if v)
        rows.append([f"{line['what']}, on {line['where']}", f"{line['bytes'] / 2**30:.3f}", parts])
    return table(["what", "GiB", "of which (GiB)"], rows, numbers=False)
