"""Measure the CPU seconds of an export of the tiny model, by llamaq and by ExecuTorch's own command in turns.

    python tests/benchmarks/export_time.py [--rounds 2] [--layers 30]

Both write the same graph; llamaq's file differs in one constant (`get_max_seq_len`, see `patches.true_lengths`). llamaq
is faster because it spares the tracing of what is known (`llamaq/export/tracing.py`). The times include starting Python
and importing. They depend on the number of layers, hardly on their width.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from llamaq import torchao_compat  # noqa: F401
from llamaq.checkpoints.quantized import save_quantized
from llamaq.config import ExportConfig, load
from llamaq.export.exporter import executorch_arguments, export_pte
from llamaq.model.build import build_model
from llamaq.quant.scheme import Scheme

OPTIONS = ExportConfig(max_seq_length=128, max_context_length=256)
METADATA = {"get_bos_id": 1, "get_eos_ids": [2]}


def cpu_seconds(command: list[str]) -> float:
    """Run a command and return the CPU time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the times of both and their ratio; with `--ours`, export by llamaq for the process that measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, help="layers of the model instead of tiny's")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.ours:
        export_pte(a.ours / "model", a.ours / "ours.pte", OPTIONS, METADATA)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [f"output_dir={folder}/run", *([f"model.num_layers={a.layers}"] if a.layers else [])]
        model = build_model(load("tiny", settings).model, None, Scheme(), (16, 32.0), frozen=True)
        save_quantized(folder / "model", model.decoder, Scheme())
        theirs = executorch_arguments(folder / "model", folder / "theirs", OPTIONS, METADATA)
        commands = {
            "ExecuTorch": [sys.executable, "-m", "executorch.examples.models.llama.export_llama", *theirs],
            "llamaq": [sys.executable, __file__, "--ours", str(folder)],
        }
        seconds: dict[str, list[float]] = {who: [] for who in commands}
        for turn in range(a.rounds):
            for who, command in commands.items():
                seconds[who].append(cpu_seconds(command))
                print(f"round {turn + 1}: {who} {seconds[who][-1]:.1f} CPU s", flush=True)
        middle = {who: statistics.median(s) for who, s in seconds.items()}
        print(f"llamaq / ExecuTorch: {middle['llamaq'] / middle['ExecuTorch']:.2f}×")


if __name__ == "__main__":
    main()
