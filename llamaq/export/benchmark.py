"""Measure exported models on this device, side by side: load time, prefill, decode, memory and file size.

    python -m llamaq.export.benchmark runs/1B/export/model.pte other.pte --threads 4 --json speed.json
    python benchmark.py model.pte baseline.pte          on a board: this file alone, after `pip install executorch`
    python -m llamaq.export.benchmark model.pte --adb --runner llama_main --tokenizer tokenizer.model     on a phone
    python -m llamaq.export.benchmark model.pte model.Q4_0.gguf       beside llama.cpp (pip install llama-cpp-python)

Each process measures one model: it loads the model, warms up once, and measures `--runs` times. The models take turns
for `--rounds` rounds, so that a busy moment of the machine does not slow down one of them only.

    time to first token    from the prompt to its next token, without tokenization
    prefill                prompt tokens divided by that time
    decode                 tokens per second of greedy generation after the first token
    memory                 peak resident set, less what the process held before it loaded the model (Python and
                           libraries, which an app does not have); the JSON has the whole as `peak_bytes`

The prompt's tokens are arbitrary; speed does not depend on them. Numbers are medians, with quartiles in brackets.

This file runs without llamaq. It imports only the standard library, except in the processes that measure.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PHONE = "/data/local/tmp/llamaq"  # adb may write and execute here
MEASURES = {  # key → heading, unit, format, whether more is better
    "decode": ("decode", "tokens/s", ".1f", True),
    "first_token": ("time to first token", "s", ".3f", False),
    "prefill": ("prefill", "tokens/s", ".1f", True),
    "load": ("load", "s", ".2f", False),
    "file_bytes": ("file", "MiB", ",.1f", False),
    "memory_bytes": ("memory", "MiB", ",.1f", False),
}


# --- one model in this process ----------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A model that is loaded and ready to run."""

    step: Callable[[list[int], int], int]  # (tokens, position of the first) → the most likely next token
    load_seconds: float
    bytes_before: int  # resident set before the model was loaded
    vocab: int


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmHWM is the peak resident set, VmRSS the current one."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, field
    return int(match[1]) * 1024


def measure_model(path: str, prompt_tokens: int, new_tokens: int, runs: int, threads: int) -> dict[str, list[float]]:
    """Measure one model in this process; return all single measurements by key."""
    open_model = open_gguf if path.endswith(".gguf") else open_pte
    model = open_model(path, prompt_tokens + new_tokens, threads)
    prompt = [(7919 * i) % min(model.vocab, 32000) for i in range(1, prompt_tokens + 1)]
    first, decode = [], []
    for run in range(runs + 1):
        start = time.perf_counter()
        token = model.step(prompt, 0)
        known = time.perf_counter()
        for i in range(new_tokens):
            token = model.step([token], prompt_tokens + i)
        if run:  # run 0 warms up: pages are read, threads are started
            first.append(known - start)
            decode.append(new_tokens / (time.perf_counter() - known))
    peak = memory("VmHWM")
    return {
        "load": [model.load_seconds],
        "first_token": first,
        "prefill": [prompt_tokens / t for t in first],
        "decode": decode,
        "memory_bytes": [peak - model.bytes_before],
        "peak_bytes": [peak],
    }


def open_pte(path: str, tokens: int, threads: int) -> Opened:
    """Load a .pte into ExecuTorch; its KV cache has to hold `tokens` tokens, those of prompt and answer."""
    os.environ.setdefault("ET_LOG_LEVEL", "Error")
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    torch.set_num_threads(1)  # ExecuTorch has its own threads, and torch's would compete with them
    portable_lib._unsafe_reset_threadpool(threads)
    before, start = memory("VmRSS"), time.perf_counter()
    program = Runtime.get().load_program(path)
    forward: Any = program.load_method("forward")
    load = time.perf_counter() - start

    def constant(name: str) -> int:
        value: Any = program.load_method(name)
        return int(value.execute([])[0])

    if (room := constant("get_max_context_len")) < tokens:
        sys.exit(
            f"{path}: its KV cache has {room} tokens, prompt and answer have {tokens}: lower --prompt-tokens or "
            "--new-tokens, or export with a larger export.max_context_length"
        )
    chunk = constant("get_max_seq_len") - 1 if bool(constant("enable_dynamic_shape")) else 1

    def step(tokens: list[int], position: int) -> int:
        for at in range(0, len(tokens), chunk):
            part = torch.tensor([tokens[at : at + chunk]])
            (logits,) = forward.execute((part, torch.tensor([position + at])))
        return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())

    return Opened(step, load, before, constant("get_vocab_size"))


def open_gguf(path: str, tokens: int, threads: int) -> Opened:
    """Load a .gguf into llama.cpp, on the CPU, with a KV cache for `tokens` tokens."""
    import ctypes

    import numpy as np

    llama: Any = importlib.import_module("llama_cpp")  # llamaq[bench]
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    before, start = memory("VmRSS"), time.perf_counter()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), settings)
    if not model:
        sys.exit(f"{path}: llama.cpp cannot load it")
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = max(256, tokens), tokens, 512
    options.n_threads = options.n_threads_batch = threads
    context = llama.llama_init_from_model(model, options)
    load = time.perf_counter() - start
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def step(tokens: list[int], position: int, _log: Any = silent) -> int:  # _log keeps the callback alive
        if position == 0:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
        ids = (llama.llama_token * len(tokens))(*tokens)  # has a name because the batch only points to it
        batch = llama.llama_batch_get_one(ids, len(tokens))
        if llama.llama_decode(context, batch) != 0:
            sys.exit(f"{path}: llama.cpp failed at position {position}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(vocab,))
        return int(logits.argmax())

    return Opened(step, load, before, vocab)


# --- a phone ----------------------------------------------------------------------------------------------------------


def benchmark_on_phone(a: argparse.Namespace) -> dict[str, Any]:
    """Measure models on a phone with ExecuTorch's own runner over adb; the result is as `benchmark` returns it."""
    a.threads = a.threads or 4
    adb = push_to_phone(a)
    results = {str(m): measure_on_phone(adb, m, a) for m in a.models}
    settings = {k: getattr(a, k) for k in ("prompt_tokens", "new_tokens", "runs", "threads")}
    return with_files(results, settings, run_command([*adb, "shell", "getprop ro.product.model"]).strip())


def push_to_phone(a: argparse.Namespace) -> list[str]:
    """Push models, runner and tokenizer to the phone; return the adb command.

    A file is not pushed if the phone has one of this name with the same SHA-256.
    """
    if not a.runner or not a.tokenizer:
        sys.exit("--adb needs --runner (llama_main for Android) and --tokenizer (tokenizer.model or tokenizer.json)")
    adb = ["adb", *(["-s", a.adb] if a.adb != "auto" else [])]
    run_command([*adb, "shell", f"mkdir -p {PHONE}"])
    files = [(a.runner, "llama_main"), (a.tokenizer, "tokenizer"), *((m, name_on_phone(m)) for m in a.models)]
    for source, name in files:
        there = run_command([*adb, "shell", f"sha256sum {PHONE}/{shlex.quote(name)} 2>/dev/null || true"])
        if sha256(source) not in there:
            print(f"pushing {source} …", file=sys.stderr, flush=True)
            run_command([*adb, "push", str(source), f"{PHONE}/{name}"])
    run_command([*adb, "shell", f"chmod +x {PHONE}/llama_main"])
    return adb


def name_on_phone(model: Path) -> str:
    """Return a model's file name on the phone. It has its folders' names, because most models are called model.pte."""
    return "-".join(part for part in model.parts if part not in ("/", "..", "."))


def measure_on_phone(adb: list[str], path: Path, a: argparse.Namespace) -> dict[str, Any]:
    """Measure one model on the phone. The runner reports its own times and memory."""
    prompt = " ".join(["one"] * a.prompt_tokens)  # a token each in Llama 3's vocabulary; the runner reports its count
    command = (
        f"cd {PHONE} && ./llama_main --model_path {shlex.quote(name_on_phone(path))} --tokenizer_path tokenizer "
        f"--prompt {shlex.quote(prompt)} --temperature 0 --warmup --ignore_eos "
        f"--seq_len {a.prompt_tokens + a.new_tokens + 1} --cpu_threads {a.threads}"
    )
    samples = [runner_report(run_command([*adb, "shell", f"{command} 2>&1"])) for _ in range(a.runs)]
    return {key: [s[key] for s in samples] for key in samples[0]}


def runner_report(output: str) -> dict[str, float]:
    """Read this module's measures from the output of ExecuTorch's runner; exit if they are not in it.

    Its last `PyTorchObserver {…}` line has the times in milliseconds. Its RSS lines have the memory.
    """
    reports = re.findall(r"PyTorchObserver (\{.*?\})", output)
    if not reports:
        sys.exit(f"the runner printed no PyTorchObserver line; it said:\n{output[-2000:]}")
    s = json.loads(reports[-1])
    prefill = s["prompt_eval_end_ms"] - s["inference_start_ms"]
    answer = s["inference_end_ms"] - s["prompt_eval_end_ms"]
    result = {
        "load": (s["model_load_end_ms"] - s["model_load_start_ms"]) / 1e3,
        "first_token": (s["first_token_ms"] - s["inference_start_ms"]) / 1e3,
        "prefill": s["prompt_tokens"] / max(prefill, 1) * 1e3,
        "decode": s["generated_tokens"] / max(answer, 1) * 1e3,
    }
    peak = [float(m) for m in re.findall(r"RSS after [^:]*: ([\d.]+) MiB", output)]
    return result | ({"memory_bytes": max(peak) * 2**20} if peak else {})


def run_command(command: list[str]) -> str:
    """Run a command and return what it prints; if it fails, exit with its output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed (Android platform-tools)")
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} … failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return done.stdout


# --- all models -------------------------------------------------------------------------------------------------------


def benchmark(
    models: list[Path],
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    runs: int = 5,
    rounds: int = 2,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure models on this machine, each in its own processes, in turns.

    A model that fails is left out of the following rounds, and the others are measured all the same.

    Returns:
        {"device": …, "settings": …, "models": {path: {measure: [values], …, "sha256": …, "file_bytes": [n]}}, "failed":
        {path: the end of what its process printed}}.
    """
    threads = threads or len(os.sched_getaffinity(0))
    results: dict[str, dict[str, Any]] = {str(m): {} for m in models}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for i, model in enumerate(models):
            if str(model) in failed:
                continue
            where = f"round {turn + 1} of {rounds}, model {i + 1} of {len(models)}"
            print(f"{where}: {model} …", file=sys.stderr, flush=True)
            try:
                measured = measure_in_own_process(model, prompt_tokens, new_tokens, runs, threads)
            except RuntimeError as e:
                failed[str(model)] = str(e)
                del results[str(model)]
                continue
            for key, values in measured.items():
                results[str(model)].setdefault(key, []).extend(values)
    settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs, "rounds": rounds}
    return with_files(results, settings | {"threads": threads}, cpu_name()) | {"failed": failed}


def measure_in_own_process(model: Path, *settings: int) -> dict[str, list[float]]:
    """Call `measure_model` in a new process, so that models share no memory; raise RuntimeError if it fails."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, os.path.abspath(__file__), "--worker", out.name, str(model), *map(str, settings)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{model}: its process ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(Path(out.name).read_text())


def with_files(results: dict[str, dict[str, Any]], settings: dict[str, int], device: str) -> dict[str, Any]:
    """Return the results with each file's hash and size, the settings and the device."""
    for name, result in results.items():
        result["sha256"] = sha256(Path(name))
        result["file_bytes"] = [os.path.getsize(name)]
    return {"device": device, "settings": settings, "models": results}


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cpu_name() -> str:
    """Return the CPU's name and architecture, as far as the system tells."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"(?:model name|Hardware)\s*:\s*(.+)", info)
    return f"{name[1] if name else platform.processor() or 'unknown CPU'} ({platform.machine()})"


# --- the table --------------------------------------------------------------------------------------------------------


def median_and_quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def markdown(result: dict[str, Any], names: dict[str, str] | None = None) -> str:
    """Return a Markdown table: a row per model with medians, quartiles in brackets, and ratios to the first model."""
    rows = [["model", *(f"{title} ({unit})" for title, unit, _, _ in MEASURES.values())]]
    rows.append(["---", *["---:"] * len(MEASURES)])
    first = next(iter(result["models"].values()))
    for path, model in result["models"].items():
        cells = [_cell(key, model, {} if model is first else first) for key in MEASURES]
        rows.append([(names or {}).get(path, Path(path).name), *cells])
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def _cell(key: str, model: dict[str, Any], first: dict[str, Any]) -> str:
    """Return one measure of a model, e.g. `36.0 [33.0, 39.0] **3.00×**`; empty if it was not measured."""
    if not model.get(key):
        return ""
    _, unit, form, _ = MEASURES[key]
    scale = 2**20 if unit == "MiB" else 1
    middle, low, high = (v / scale for v in median_and_quartiles(model[key]))
    spread = f" [{low:{form}}, {high:{form}}]" if high > low else ""
    ratio = f" **{middle * scale / median_and_quartiles(first[key])[0]:.2f}×**" if first.get(key) else ""
    return f"{middle:{form}}{spread}{ratio}"


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; with `--worker` as its first word, measure one model for another process."""
    if sys.argv[1:2] == ["--worker"]:
        out, model, *settings = sys.argv[2:]
        Path(out).write_text(json.dumps(measure_model(model, *map(int, settings))))
        return
    a = parse_command_line()
    if a.adb:
        result = benchmark_on_phone(a)
    else:
        result = benchmark(a.models, a.prompt_tokens, a.new_tokens, a.runs, a.rounds, a.threads)
    failed = "\n".join(result.get("failed", {}).values())
    if not result["models"]:
        sys.exit(failed)
    s = result["settings"]
    print(f"\n{result['device']}, {s['threads']} threads, prompt {s['prompt_tokens']}, {s['new_tokens']} new tokens\n")
    print(markdown(result))
    for path, model in result["models"].items():
        print(f"{path}: sha256 {model['sha256']}")
    if a.json:
        a.json.write_text(json.dumps(result, indent=1))
    if failed:
        sys.exit(failed)


def parse_command_line() -> argparse.Namespace:
    """Parse the command line and check that the files exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help=".pte or .gguf files; ratios are to the first")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of the prompt (default 64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--runs", type=int, default=5, help="measured runs of a process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each model (on a phone: 1)")
    parser.add_argument("--threads", type=int, help="default: all CPUs; on a phone 4, often the number of big cores")
    parser.add_argument("--json", type=Path, help="file for all single measurements")
    parser.add_argument("--adb", nargs="?", const="auto", help="measure on a phone; SERIAL if there are several")
    parser.add_argument("--runner", type=Path, help="llama_main built for Android (docs/export.md)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model or tokenizer.json, for a phone")
    a = parser.parse_args()
    if missing := [m for m in a.models if not m.is_file()]:
        sys.exit(f"{missing[0]}: no such file")
    return a


if __name__ == "__main__":
    main()
