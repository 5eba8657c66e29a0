"""Measure the data path: time from a file to the first batch, and peak memory, against torchtune's own.

    python tests/benchmarks/data_path.py                       50 k, 200 k and 1 M conversations, 50 k and 200 k pairs
    python tests/benchmarks/data_path.py --rows 50000 --no-pairs

Prints a table. Each measurement is a process of its own. "first" starts with nothing prepared, "again" is the next one.
CPU seconds are those of all its processes. Memory is the resident memory of the process less what its imports take, and
that of its largest worker.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llamaq.data.batches import collate_pairs, collate_sft
from llamaq.data.corpus import tiny_chat, write_jsonl
from llamaq.data.datasets import build_dataset
from llamaq.data.tokenizer import build_tokenizer

MIB = 2**20
CORPUS = {"num_train": 6000, "num_pairs": 800, "num_heldout": 4}


def main() -> None:
    """Write the data and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 200_000, 1_000_000])
    parser.add_argument("--pairs", type=int, nargs="*", default=[50_000, 200_000])
    parser.add_argument("--no-pairs", action="store_true")
    parser.add_argument("--torchtune-rows", type=int, default=50_000, help="rows up to which torchtune is measured too")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    columns = ["data", "rows", "size", "path", "first batch after", "CPU", "MiB of memory", "of a worker"]
    print("|", " | ".join(columns), "|\n|", " | ".join("-" for _ in columns), "|")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        tiny_chat(corpus, **CORPUS)
        cases = [("train", n) for n in args.rows] + [("pairs", n) for n in ([] if args.no_pairs else args.pairs)]
        for kind, count in cases:
            file = grown(corpus, kind, count)
            ways = ["first", "again"] + ["torchtune"] * (count <= args.torchtune_rows)
            for way in ways:
                row = in_a_process(corpus, file, way)
                size = f"{file.stat().st_size / MIB:.0f} MiB"
                cells = [
                    f"{row['seconds']:.1f} s",
                    f"{row['cpu']:.1f} s",
                    f"{row['memory']:.0f}",
                    f"{row['worker']:.0f}",
                ]
                print("|", " | ".join([kind, f"{count:,}", size, way, *cells]), "|", flush=True)
            file.unlink()


def grown(corpus: Path, kind: str, count: int) -> Path:
    """Write a file of so many rows: those of the corpus, each question with a number of its own."""
    rows = [json.loads(line) for line in (corpus / f"{kind}.jsonl").read_text().splitlines()]
    rng, file = random.Random(0), corpus / f"{kind}-{count}.jsonl"

    def row() -> Any:
        made = json.loads(json.dumps(rng.choice(rows)))
        number = rng.randrange(10**6)
        for side in made.values():
            side[0]["content"] += f" ({number})"
        return made

    write_jsonl(file, [])
    with file.open("a") as f:
        f.writelines(json.dumps(row()) + "\n" for _ in range(count))
    return file


def in_a_process(corpus: Path, file: Path, way: str) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(corpus), str(file), way]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def measure(corpus: str, file: str, way: str) -> dict[str, float]:
    """Build a dataset and its first batch."""
    section, pairs = component(file)
    tokenizer_section = {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": f"{corpus}/tokenizer.model",
        "special_tokens_path": f"{corpus}/special_tokens.json",
        "max_seq_len": 512,
    }
    tokenizer = build_tokenizer(tokenizer_section, 768)
    before, start, used = peak(resource.RUSAGE_SELF), time.perf_counter(), cpu()
    if way == "torchtune":
        from llamaq.config.components import instantiate

        plain = instantiate(tokenizer_section, setting="tokenizer")
        samples = instantiate(section, plain, setting="x")
        if pairs:  # they are tokenized before training, to find those that teach nothing
            samples = [samples[i] for i in range(len(samples))]
    else:
        samples = build_dataset(section, tokenizer, "x", Path(corpus) / f"cache-{Path(file).name}")
    (collate_pairs if pairs else collate_sft)([samples[i] for i in range(8)], tokenizer.pad_id)
    seconds, memory = time.perf_counter() - start, peak(resource.RUSAGE_SELF) - before
    return {"seconds": seconds, "cpu": cpu() - used, "memory": memory, "worker": peak(resource.RUSAGE_CHILDREN)}


def component(file: str) -> tuple[dict[str, Any], bool]:
    """Return the dataset's section, as the configs have it, and whether it is pairs."""
    if Path(file).name.startswith("pairs"):
        return {"_component_": "torchtune.datasets.preference_dataset", "source": "json", "data_files": file}, True
    columns = {"conversation_column": "messages", "conversation_style": "openai", "packed": True}
    return {"_component_": "torchtune.datasets.chat_dataset", "source": "json", "data_files": file, **columns}, False


def cpu() -> float:
    """Return the CPU seconds of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peak(who: int) -> float:
    """Return the most resident memory so far, in MiB."""
    return resource.getrusage(who).ru_maxrss / 1024


if __name__ == "__main__":
    main()
