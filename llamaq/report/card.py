"""The model card: README.md of a run's folder, in the form model hubs read (YAML front matter, then markdown)."""

import shlex
from pathlib import Path
from typing import Any

from llamaq.export.exporter import executorch_arguments
from llamaq.report.page import MODELS, measured_parts, quality_table, table

MARK = "<!-- Written by llamaq; delete this line to keep your own version. -->"


def render(facts: dict[str, Any]) -> str:
    """The card of a run.

    Args:
        facts: what the report states, and `base`, `license`, `checkpoint` (folder of the codes), `data`
            (name → description), `hyperparameters` (stage → text), `rotation`.
    """
    scheme = (
        f"int4 weights in groups of {facts['group_size']} with int8 dynamic activations per token in the linears of "
        "the blocks; int8 rows for embedding and head"
    )
    if facts["rotation"]:
        scheme += f"; SpinQuant rotations {facts['rotation']}, rounded by GPTQ"
    elif facts["shipped"] != "qat":
        scheme += f"; LoRA adapters of rank {facts['rank']} on all seven linears, kept beside the codes and not merged"
    arguments = executorch_arguments(
        facts["checkpoint"],
        facts["max_seq_length"],
        facts["max_context_length"],
        Path("export/model.pte"),
        facts["pte_metadata"],
    )
    folder = str(facts["checkpoint"])
    relative = Path(folder).relative_to(facts["folder"]).as_posix()
    command = shlex.join(a.replace(folder, relative) for a in arguments)
    kept = {k: v for k, v in facts["measured"].items() if k in ("files", "speed") or k.startswith("tasks_")}
    measured = measured_parts(kept)
    parts = [
        "---\nlibrary_name: executorch\npipeline_tag: text-generation\n"
        f"base_model: {facts['base']}\nlicense: {facts['license']}\ntags: [llamaq, executorch, xnnpack]\n---",
        MARK,
        f"# {facts['name']}",
        f"{facts['parameters'] / 1e6:,.1f} M parameters, quantized by llamaq {facts['version']} from `{facts['base']}` "
        f"for Arm CPUs ({MODELS[facts['shipped']]}). `export/model.pte` has {facts['pte_bytes'] / 2**20:,.1f} MiB, "
        f"sha256 `{facts['pte_sha256']}`.",
        "## Scheme",
        scheme[0].upper() + scheme[1:] + ". Every code and scale of the checkpoint lies in the .pte bit for bit.",
        "## Data and training",
        table(["data", "what"], [[k, v] for k, v in facts["data"].items()], numbers=False),
        table(["stage", "settings"], [[k, v] for k, v in facts["hyperparameters"].items()], numbers=False),
        "## Quality",
        f"{facts['samples']:,} held-out samples, {facts['tokens']:,} tokens scored.",
        quality_table(facts["scores"]),
        *[p for p in measured if not p.startswith("![")],
        "## Use",
        "On a phone, with ExecuTorch's runner (llamaq's README says how to build it):",
        "```bash\nadb push export/model.pte /data/local/tmp/llamaq/\n"
        'adb shell "cd /data/local/tmp/llamaq && ./llama_main --model_path model.pte --tokenizer_path tokenizer.model '
        "--prompt '…' --cpu_threads 4\"\n```",
        f"To export again with ExecuTorch {facts['packages'].get('executorch', '')} (`{relative}` is a checkpoint "
        "in Meta's layout):",
        f"```bash\npython -m executorch.examples.models.llama.export_llama {command}\n```",
        "With llama-models: `consolidated.00.pth` and `params.json` there load with its `quantization_args` loader.",
        "## Licences",
        f"The weights are derived from `{facts['base']}` and stay under its licence ({facts['license']}); for Llama "
        "3.2 that asks for its text, “Built with Llama”, and a name that begins with “Llama”. The data has its own.",
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def publish(folder: Path, page: str) -> bool:
    """Write the card as `folder`/README.md, whole or not at all; one that somebody else wrote stays."""
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return False
    partial = folder / "README.md.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return True
