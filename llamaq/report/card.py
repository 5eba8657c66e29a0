"""Write the model card: README.md of a run's folder, in the form that model hubs read (YAML front matter, markdown)."""

import json
import shlex
from pathlib import Path
from typing import Any

from llamaq.checkpoints.meta import PARAMS
from llamaq.export.exporter import executorch_arguments
from llamaq.export.patches import beyond_stock
from llamaq.report.measured import measured_parts
from llamaq.report.origin import TRAINED_HERE
from llamaq.report.page import template_parts
from llamaq.report.tables import MIB, MODELS, quality_table, table

MARK = "<!-- Written by llamaq; delete this line to keep your own version. -->"

Facts = dict[str, Any]


def render_card(facts: Facts) -> str:
    """Return the card of a run.

    Args:
        facts: what the page states, and what `llamaq.report.facts` collects for the card.
    """
    parts = [
        "---\nlibrary_name: executorch\npipeline_tag: text-generation\n"
        f"{_base_model(facts)}{_license(facts)}tags: [llamaq, executorch, xnnpack]\n---",
        MARK,
        f"# {facts['name']}",
        f"{facts['parameters'] / 1e6:,.1f} M parameters, quantized by llamaq {facts['version']} from `{facts['base']}` "
        f"for Arm CPUs ({MODELS[facts['shipped']]}). `export/model.pte` has {facts['pte_bytes'] / MIB:,.1f} MiB, "
        f"sha256 `{facts['pte_sha256']}`.",
        "## Scheme",
        _scheme(facts),
        "## Data and training",
        table(["data", "what"], [[k, v] for k, v in facts["data"].items()], numbers=False),
        table(["stage", "settings"], [[k, v] for k, v in facts["hyperparameters"].items()], numbers=False),
        "## Quality",
        f"{facts['samples']:,} held-out samples, {facts['tokens']:,} tokens scored.",
        quality_table(facts["scores"]),
        *_measured_parts(facts["measured"]),
        "## Chat template",
        *template_parts(facts),
        "## Use",
        *_use_parts(facts),
        "## Licences",
        _licences(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _base_model(facts: Facts) -> str:
    """Return the line that links the base model; hubs take ids of their own there and refuse folder names."""
    return f"base_model: {facts['base_id']}\n" if facts["base_id"] else ""


def _license(facts: Facts) -> str:
    """Return the lines that name the licence; hubs want `other` for one that they have no id for."""
    name = f"license_name: {facts['license_name']}\n" if facts["license_name"] else ""
    return f"license: {facts['license'] or 'other'}\n{name}"


def _licences(facts: Facts) -> str:
    if facts["base"] == TRAINED_HERE:
        return "The weights were trained from random ones, so their licence is yours to choose. The data has its own."
    named = facts["license_name"] or facts["license"]
    known = f"({named})" if named and named != "other" else "(its folder does not name it: look it up where it is from)"
    text = f"The weights are derived from `{facts['base']}` and stay under its licence {known}."
    if (facts["license"] or "").startswith("llama"):
        text += " Llama's licence asks for its text, “Built with Llama”, and a name that begins with “Llama”."
    return f"{text} The data has its own."


def _scheme(facts: Facts) -> str:
    scheme = (
        f"Int4 weights in groups of {facts['group_size']} with int8 dynamic activations per token in the linears of "
        "the blocks; int8 rows for embedding and head"
    )
    if facts["rotation"]:
        scheme += f"; SpinQuant rotations {facts['rotation']}, rounded by GPTQ"
    elif facts["shipped"] != "qat":
        scheme += f"; LoRA adapters of rank {facts['rank']} on all seven linears, kept beside the codes and not merged"
    return f"{scheme}. Every code and scale of the checkpoint lies in the .pte bit for bit."


def _measured_parts(measured: dict[str, Any]) -> list[str]:
    """Return the page's sections on files, speed and tasks, without its plots: the card has none."""
    kept = {k: v for k, v in measured.items() if k in ("files", "speed") or k.startswith("tasks_")}
    return [p for p in measured_parts(kept) if not p.startswith("![")]


def _use_parts(facts: Facts) -> list[str]:
    return [
        "On a phone, with ExecuTorch's runner (llamaq's docs/export.md says how to build it):",
        "```bash\nadb push export/model.pte /data/local/tmp/llamaq/\n"
        'adb shell "cd /data/local/tmp/llamaq && ./llama_main --model_path model.pte '
        f"--tokenizer_path {facts['tokenizer_file']} --prompt '…' --cpu_threads 4\"\n```",
        *export_parts(facts),
    ]


def export_parts(facts: Facts) -> list[str]:
    """Say how to make the .pte again: with ExecuTorch's own command where it computes the same model, else llamaq."""
    checkpoint, options, metadata = facts["checkpoint"], facts["export_options"], facts["pte_metadata"]
    params = json.loads((checkpoint / PARAMS).read_text())
    relative = checkpoint.relative_to(facts["folder"]).as_posix()
    again = f"(`{relative}`, in the run's folder, is a checkpoint in Meta's layout)"
    executorch = f"ExecuTorch {facts['packages'].get('executorch', '')}".strip()
    if lacks := beyond_stock(params):
        fields = ("max_seq_length", "max_context_length", "quantize_kv_cache", "dynamic_shape", "full_logits")
        told = ", ".join(f"{name}={getattr(options, name)!r}" for name in fields)
        return [
            f"{executorch}'s own `export_llama` does not make this file: {lacks}. llamaq exports it again {again}:",
            "```python\nfrom llamaq import ExportConfig, export_pte\n\n"
            f'export_pte("{relative}", "export/model.pte", ExportConfig({told}), {metadata!r})\n```',
        ]
    arguments = executorch_arguments(checkpoint, Path("export/model.pte"), options, metadata)
    command = shlex.join(a.replace(str(checkpoint), relative) for a in arguments)
    parts = [
        f"To export again with {executorch} {again}:",
        f"```bash\npython -m executorch.examples.models.llama.export_llama {command}\n```",
    ]
    meta = "With llama-models: its `quantization_args` loader reads `consolidated.00.pth` and `params.json` of that "
    return parts if "hidden_dim" in params else [*parts, f"{meta}checkpoint."]


def write_card(folder: Path, card: str) -> bool:
    """Write the card as `folder`/README.md, whole or not at all; one that somebody else wrote stays."""
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return False
    partial = folder / "README.md.partial"
    partial.write_text(card, encoding="utf-8")
    partial.replace(path)
    return True
