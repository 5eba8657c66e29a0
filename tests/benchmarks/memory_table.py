"""Print the memory that is planned for the released sizes, and compare plans with what real processes took.

    python tests/benchmarks/memory_table.py            the plans, from shapes alone: seconds
    python tests/benchmarks/memory_table.py --probe    also the probes of the tests: 5 minutes

A probe trains, exports or runs a small model in its own process, and measures the process's memory.
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
from llamaq.plan.memory import GIB, Requirement, memory_plan, plan_length
from llamaq.report.tables import table

TESTS = Path(__file__).parent.parent
# shapes of the models that the probes train, and of those that they export and run
DEEP = {
    "vocab_size": 8192,
    "num_layers": 6,
    "embed_dim": 512,
    "intermediate_dim": 2048,
    "num_heads": 8,
    "num_kv_heads": 2,
    "max_seq_len": 1024,
}
WIDE = {
    "vocab_size": 32768,
    "num_layers": 2,
    "embed_dim": 1024,
    "intermediate_dim": 4096,
    "num_heads": 16,
    "num_kv_heads": 8,
}


def plan_table() -> str:
    """Return the table of the plans for 1B and 3B."""
    columns: dict[str, dict[str, Requirement]] = {}
    for recipe, title in (("qat_lora_dpo", ""), ("spinquant", ", SpinQuant")):
        for size in ("1B", "3B"):
            c = load(f"llama3_2/{size}_{recipe}", ["output_dir=/tmp/none", "device=cpu"])
            for need in memory_plan(c, plan_length(c)):
                if need.what != "spinquant":  # on a CPU its plan is that of device and host together
                    columns.setdefault(f"{need.what}{title}", {})[size] = need
    rows = []
    for what, sizes in columns.items():
        largest = sorted(sizes["3B"].parts.items(), key=lambda part: -part[1])[:3]
        detail = ", ".join(f"{name} {value / GIB:.1f}" for name, value in largest)
        rows.append([what, *(f"{sizes[s].bytes / GIB:.1f}" for s in ("1B", "3B")), detail])
    return table(["GiB", "1B", "3B", "most of 3B's"], rows)


def probe(script: Path, *arguments: str) -> dict:
    """Run a probe in its own process and return what it measured."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def probe_table() -> str:
    """Run all probes and return the table of planned and measured memory."""
    rows = []

    def add_row(what: str, result: dict[str, float]) -> None:
        planned, measured = result["planned"] / 2**20, result["measured"] / 2**20
        rows.append([what, f"{planned:,.0f}", f"{measured:,.0f}", f"{planned / measured:.2f}"])
        print(f"{what}: {rows[-1][1:]}", file=sys.stderr, flush=True)

    for kind in ("qat", "qat_lora", "qat_dpo"):
        for dtype in ("fp32", "bf16"):
            for recompute in ("false", "true"):
                settings = [*model_settings(DEEP), f"dtype={dtype}", f"activation_checkpointing={recompute}"]
                what = f"{kind}, {dtype}{', blocks recomputed' * (recompute == 'true')}"
                add_row(what, probe(TESTS / "plan/memory_probe.py", kind, "4", "512", *settings))
    for kind, more in (("qat_lora", []), ("qat", []), ("qat", ["export.quantize_kv_cache=true"])):
        with tempfile.TemporaryDirectory() as folder:
            settings = [*model_settings(WIDE), "export.max_seq_length=512", "export.max_context_length=2048"]
            result = probe(TESTS / "export/memory_probe.py", folder, kind, *settings, *more)
        for what, r in result.items():
            add_row(f"{kind}, {what}{', int8 cache' * bool(more)}", r)
    return table(["probe", "planned (MiB)", "measured (MiB)", "ratio"], rows)


def model_settings(shape: dict[str, int]) -> list[str]:
    """Return a shape as settings on the command line."""
    return [f"model.{key}={value}" for key, value in shape.items()]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", action="store_true")
    a = parser.parse_args()
    print(plan_table())
    if a.probe:
        print(f"\n{probe_table()}")


if __name__ == "__main__":
    main()
