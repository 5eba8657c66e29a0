"""Write the report's page in markdown: what each step of a run cost or won, to be read from top to bottom."""

import re
from typing import Any

from llamaq.report.measured import measured_parts
from llamaq.report.tables import (
    MIB,
    MODELS,
    dpo_table,
    hand_over_table,
    plan_table,
    quality_table,
    selection_table,
    table,
)

Facts = dict[str, Any]


def render_chain_page(facts: Facts) -> str:
    """Return the page of a training chain (`llamaq.report.facts.collect_chain_facts`)."""
    parts = [
        *_title_parts(facts, f"adapters rank {facts['rank']}"),
        "## Quality by step of the chain",
        f"{facts['samples']:,} held-out samples, {facts['tokens']:,} tokens scored, float32.",
        quality_table(facts["scores"]),
        *_quality_plots(),
        *_share_parts(facts["shares"]),
        "## What is trained is what runs",
        *_hand_over_parts(facts),
        *_answer_parts(facts),
        *measured_parts(facts["measured"]),
        *_memory_parts(facts),
        *_training_parts(facts["training"], facts["dpo"]),
        *_place_parts(facts),
    ]
    return "\n\n".join(parts) + "\n"


def render_spinquant_page(facts: Facts) -> str:
    """Return the page of a SpinQuant run (`llamaq.report.facts.collect_spinquant_facts`)."""
    parts = [
        *_title_parts(facts, f"SpinQuant, ships **{facts['chosen']}**"),
        "## Quality",
        f"{facts['samples']:,} held-out samples, {facts['tokens']:,} tokens scored, float32. PTQ rounds every weight "
        "of the same model to the nearest code; the largest magnitude of a group sets its scale.",
        quality_table(facts["scores"]),
        *_share_of_kl_parts(facts["share"]),
        *_quality_plots(),
        *_rotation_parts(facts),
        "## What was measured is what runs",
        *_hand_over_parts(facts),
        *_answer_parts(facts),
        *measured_parts(facts["measured"]),
        *_memory_parts(facts),
        *_place_parts(facts),
    ]
    return "\n\n".join(parts) + "\n"


# --- sections of both ------------------------------------------------------------------------------------------------


def _title_parts(facts: Facts, kind: str) -> list[str]:
    line = [
        facts["finished"],
        f"{facts['parameters'] / 1e6:,.1f} M parameters",
        f"int4 groups of {facts['group_size']}, int8 embedding and head, int8 activations",
        kind,
        f"llamaq {facts['version']}",
    ]
    return [f"# llamaq report: {facts['name']}", " · ".join(line)]


def _quality_plots() -> list[str]:
    return ["![quality](quality.png)", "![agreement](agreement.png)"]


def _hand_over_parts(facts: Facts) -> list[str]:
    return [
        f"All {facts['constants']} tensors of the checkpoint (codes, scales, norms, adapters if it has any) lie in the "
        f".pte bit for bit. The table compares logits of {facts['gate_tokens']} held-out tokens; the .pte reads them "
        "one by one through its KV cache.",
        f"Gates: relative error ≤ {facts['max_relative_error']:.0e}, top-1 ≥ {facts['min_top1']:.3f}, and KL of the "
        f"one long context ≤ {facts['max_kl']:.0e}. For the .pte the relative error is the median token's, because one "
        "activation that is rounded to the neighbouring int8 level moves its token by about 5e-3. A .pte "
        f"passes too if it differs by at most {facts['noise_factor']:g} times what one float32 ulp in every linear's "
        "output does to the model.",
        hand_over_table(facts["hand_overs"]),
    ]


def _answer_parts(facts: Facts) -> list[str]:
    size = f"The exported file has {facts['pte_bytes'] / MIB:,.1f} MiB."
    return [f"{size} Its answer to *{facts['prompt']}*:", f"> {facts['answer']}", *template_parts(facts)]


def template_parts(facts: Facts) -> list[str]:
    """Name the chat template and show this question and answer as it writes them."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts["conversation"])), default=0))
    return [
        f"Trained and asked with {facts['template']}. The conversation as the model reads it:",
        f"{fence}text\n{facts['conversation'].rstrip()}\n{fence}",
    ]


def _memory_parts(facts: Facts) -> list[str]:
    """Write the plan made before the run, and what the file that ships took where its speed was measured."""
    measured = facts["measured"].get("speed", {}).get("models", {}).get(facts["shipped"], {}).get("memory_bytes")
    seen = f" `model.pte` took {max(measured) / 2**30:.3f} GiB here." if measured else ""
    return [
        "## Memory",
        "Planned before the run, from shapes alone. llamaq's tests check such plans against real processes, to within "
        f"15 %.{seen}",
        plan_table(facts["plan"]),
    ]


def _place_parts(facts: Facts) -> list[str]:
    return [
        "## Where things are",
        table(["what", "where"], [[what, f"`{where}`"] for what, where in facts["files"].items()], numbers=False),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["packages"].items()) + ".",
    ]


# --- of a training chain ---------------------------------------------------------------------------------------------


def _share_parts(shares: dict[str, dict[str, float]]) -> list[str]:
    """Write what training wins back of the loss that quantizing the control costs, with its interval."""
    lines = [
        f"- {MODELS[name]}: **{s['share']:.2f}** (95 % interval {s['low']:.2f} to {s['high']:.2f}): "
        f"{s['won_nats_per_token']:.4f} of {s['lost_nats_per_token']:.4f} nats per token"
        for name, s in shares.items()
    ]
    if not lines:
        return []
    return [
        "### Share of the quantization loss won back",
        "(NLL[PTQ of the control] − NLL[model]) / (NLL[PTQ of the control] − NLL[control]), paired bootstrap over "
        "samples. The control is the same start, trained without quantization on the same data for the same steps.",
        "\n".join(lines),
    ]


def _training_parts(training: list[dict[str, Any]], dpo: dict[str, Any] | None) -> list[str]:
    rows = [[t["stage"], str(t["steps"]), f"{t['first']:.4f}", f"{t['last']:.4f}"] for t in training]
    parts = ["## Training", "![losses](losses.png)", table(["stage", "steps", "first loss", "last loss"], rows)]
    if dpo is not None:
        skipped = "".join(f" {count} rows were skipped: they {why}." for why, count in dpo["skipped"].items())
        parts += [dpo_table(dpo["first"], dpo["last"]), f"{dpo['samples']} pairs.{skipped}"]
    return parts


# --- of SpinQuant ----------------------------------------------------------------------------------------------------


def _share_of_kl_parts(share: dict[str, float] | None) -> list[str]:
    """Write the share of PTQ's KL that SpinQuant wins back; nothing if one of the two was not scored."""
    if share is None:
        return []
    return [
        f"SpinQuant wins back **{share['share']:.2f}** of the KL that PTQ costs (95 % interval {share['low']:.2f} to "
        f"{share['high']:.2f}, paired bootstrap over samples)."
    ]


def _rotation_parts(facts: Facts) -> list[str]:
    chosen = facts["chosen"]
    why = (
        f"It was forced (`spinquant.force`): **{chosen}** ships whatever its KL."
        if facts["forced"]
        else "The candidate with the lowest KL ships. The unrotated model is a candidate, so a rotation ships only if "
        "it helps."
    )
    return [
        "## Which rotations",
        f"Calibrated on {facts['calibration_tokens']:,} tokens, and compared on {facts['selection_tokens']:,} others "
        f"with everything rounded as on the phone. {why}",
        selection_table(facts["candidates"], chosen),
        "![selection](selection.png)",
        "## What rotating does",
        "Largest magnitude divided by the root mean square, of the weights that share a scale and of the tokens that "
        "linears read. A smaller ratio means finer quantization steps.",
        "![outliers](outliers.png)",
        "Squared error of the linears' outputs relative to their size, with quantized inputs.",
        "![error by layer](layer_errors.png)",
    ]
