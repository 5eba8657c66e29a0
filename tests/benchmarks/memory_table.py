"""Memory as planned for the released sizes, and plans beside what real processes took.

    python tests/benchmarks/memory_table.py            the plans, from shapes alone: seconds
    python tests/benchmarks/memory_table.py --probe    … and the probes of the tests: 5 minutes

A probe is a small model that really trains, is exported, and is run, each in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from llamaq import torchao_compat  # noqa: F401
from llamaq.config import load
from llamaq.plan.memory import GIB, Need, memory_plan, plan_length
from llamaq.report.page import table

TESTS = Path(__file__).parent.parent
SHAPE = ["vocab_size=8192", "num_layers=6", "embed_dim=512", "intermediate_dim=2048", "num_heads=8", "num_kv_heads=2",
         "max_seq_len=1024"]  # fmt: skip
WIDE = ["vocab_size=32768", "num_layers=2", "embed_dim=1024", "intermediate_dim=4096", "num_heads=16", "num_kv_heads=8"]


def plans() -> str:
    columns: dict[str, dict[str, Need]] = {}
    for recipe, title in (("qat_lora_dpo", ""), ("spinquant", ", SpinQuant")):
        for size in ("1B", "3B"):
            c = load(f"llama3_2/{size}_{recipe}", ["output_dir=/tmp/none", "device=cpu"])
            for need in memory_plan(c, plan_length(c)):
                if need.what != "spinquant":  # on a CPU device and host are one; the table is of a GPU's
                    columns.setdefault(f"{need.what}{title}", {})[size] = need
    rows = []
    for what, sizes in columns.items():
        largest = sorted(sizes["3B"].parts.items(), key=lambda part: -part[1])[:3]
        detail = ", ".join(f"{name} {value / GIB:.1f}" for name, value in largest)
        rows.append([what, *(f"{sizes[s].bytes / GIB:.1f}" for s in ("1B", "3B")), detail])
    return table(["GiB", "1B", "3B", "most of 3B's"], rows)


def probe(script: Path, *arguments: str) -> dict:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def probes() -> str:
    rows = []

    def row(what: str, result: dict[str, float]) -> None:
        planned, measured = result["planned"] / 2**20, result["measured"] / 2**20
        rows.append([what, f"{planned:,.0f}", f"{measured:,.0f}", f"{planned / measured:.2f}"])
        print(f"{what}: {rows[-1][1:]}", file=sys.stderr, flush=True)

    model = [f"model.{s}" for s in SHAPE]
    for kind in ("qat", "qat_lora", "qat_dpo"):
        for dtype in ("fp32", "bf16"):
            for recompute in ("false", "true"):
                settings = [*model, f"dtype={dtype}", f"activation_checkpointing={recompute}"]
                what = f"{kind}, {dtype}{', blocks recomputed' * (recompute == 'true')}"
                row(what, probe(TESTS / "plan/memory_probe.py", kind, "4", "512", *settings))
    for kind, more in (("qat_lora", []), ("qat", []), ("qat", ["export.quantize_kv_cache=true"])):
        with tempfile.TemporaryDirectory() as folder:
            settings = [*(f"model.{s}" for s in WIDE), "export.max_seq_length=512", "export.max_context_length=2048"]
            result = probe(TESTS / "export/memory_probe.py", folder, kind, *settings, *more)
        for what, r in result.items():
            row(f"{kind}, {what}{', int8 cache' * bool(more)}", r)
    return table(["probe", "planned (MiB)", "measured (MiB)", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", action="store_true")
    a = parser.parse_args()
    print(plans())
    if a.probe:
        print(f"\n{probes()}")


if __name__ == "__main__":
    main()
