"""How fast, how big: size, load time, prefill, decode, memory of exported models, side by side, on this device.

    python -m llamaq.export.benchmark runs/1B/export/model.pte other.pte --threads 4 --json speed.json
    python benchmark.py model.pte baseline.pte          on a board: this file alone, after `pip install executorch`
    python -m llamaq.export.benchmark model.pte --adb --runner llama_main --tokenizer tokenizer.model     on a phone
    python -m llamaq.export.benchmark model.pte model.Q4_0.gguf       llama.cpp beside it (llama-cpp-python)

Each model runs in processes of its own, models taking turns, so that a busy moment of the machine does not fall on
one of them alone. A process loads the model, warms up once, and then measures `--runs` times: *time to first token*,
from the prompt's arrival to its next token being known (tokenization not included); *prefill*, prompt tokens over that
time; *decode*, tokens a second of greedy generation after the first. *Memory* is the process's peak resident set less
what it held before the model was loaded (Python and libraries, which an app has not); the whole is in the JSON as
`peak_bytes`. Which tokens the prompt has does not matter to speed. Numbers are medians, quartiles in brackets.

Only the standard library is imported above the workers; nothing of llamaq at all.
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
from pathlib import Path
from typing import Any

PHONE = "/data/local/tmp/llamaq"  # where adb may write and execute
MEASURES = {  # key → heading, unit, format, whether more is better
    "decode": ("decode", "tokens/s", ".1f", True),
    "first_token": ("time to first token", "s", ".3f", False),
    "prefill": ("prefill", "tokens/s", ".1f", True),
    "load": ("load", "s", ".2f", False),
    "file_bytes": ("file", "MiB", ",.1f", False),
    "memory_bytes": ("memory", "MiB", ",.1f", False),
}


# --- one process, one model ------------------------------------------------------------------------------------------


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes: VmHWM is the peak resident set, VmRSS the present one."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, field
    return int(match[1]) * 1024


def measure(path: str, prompt_tokens: int, new_tokens: int, runs: int, threads: int) -> dict[str, Any]:
    """Everything about one model in this process."""
    step, load, before, vocab = (open_gguf if path.endswith(".gguf") else open_pte)(
        path, prompt_tokens + new_tokens, threads
    )
    prompt = [(7919 * i) % min(vocab, 32000) for i in range(1, prompt_tokens + 1)]
    first, decode = [], []
    for run in range(runs + 1):
        start = time.perf_counter()
        token = step(prompt, 0)
        known = time.perf_counter()
        for i in range(new_tokens):
            token = step([token], prompt_tokens + i)
        if run:  # the first warms up: pages, threads
            first.append(known - start)
            decode.append(new_tokens / (time.perf_counter() - known))
    peak = memory("VmHWM")
    return {
        "load": [load], "first_token": first, "prefill": [prompt_tokens / t for t in first], "decode": decode,
        "memory_bytes": [peak - before], "peak_bytes": [peak],
    }  # fmt: skip


def open_pte(path: str, tokens: int, threads: int) -> tuple[Any, float, int, int]:
    """A .pte → (step: (tokens, position) → most likely next token, seconds to load, bytes held before, vocabulary)."""
    os.environ.setdefault("ET_LOG_LEVEL", "Error")
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    torch.set_num_threads(1)  # ExecuTorch has threads of its own; torch's would only compete with them
    portable_lib._unsafe_reset_threadpool(threads)
    before, start = memory("VmRSS"), time.perf_counter()
    program = Runtime.get().load_program(path)
    forward: Any = program.load_method("forward")
    load = time.perf_counter() - start

    def constant(name: str) -> int:
        value: Any = program.load_method(name)
        return int(value.execute([])[0])

    if (room := constant("get_max_context_len")) < tokens:
        sys.exit(f"{path}: its KV cache has {room} tokens, prompt and answer have {tokens}: lower --prompt-tokens or "
                 "--new-tokens, or export with a larger export.max_context_length")  # fmt: skip
    chunk = constant("get_max_seq_len") - 1 if bool(constant("enable_dynamic_shape")) else 1

    def step(tokens: list[int], position: int) -> int:
        for at in range(0, len(tokens), chunk):
            part = torch.tensor([tokens[at : at + chunk]])
            (logits,) = forward.execute((part, torch.tensor([position + at])))
        return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())

    return step, load, before, constant("get_vocab_size")


def open_gguf(path: str, tokens: int, threads: int) -> tuple[Any, float, int, int]:
    """A .gguf run by llama.cpp, likewise."""
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

    def step(tokens: list[int], position: int, _log: Any = silent) -> int:
        if position == 0:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
        ids = (llama.llama_token * len(tokens))(*tokens)  # named: the batch only points to it
        batch = llama.llama_batch_get_one(ids, len(tokens))
        if llama.llama_decode(context, batch) != 0:
            sys.exit(f"{path}: llama.cpp failed at position {position}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(vocab,))
        return int(logits.argmax())

    return step, load, before, vocab


# --- a phone ---------------------------------------------------------------------------------------------------------


def measure_on_phone(adb: list[str], path: Path, a: argparse.Namespace) -> dict[str, Any]:
    """One model on a phone, by ExecuTorch's own runner over adb: it reports its times and its memory itself.

    Raises:
        SystemExit: adb or the runner failed; with what they said.
    """
    prompt = " ".join(["one"] * a.prompt_tokens)  # a token each in Llama 3's vocabulary; the runner reports its count
    command = (
        f"cd {PHONE} && ./llama_main --model_path {shlex.quote(on_phone(path))} --tokenizer_path tokenizer "
        f"--prompt {shlex.quote(prompt)} --temperature 0 --warmup --ignore_eos "
        f"--seq_len {a.prompt_tokens + a.new_tokens + 1} --cpu_threads {a.threads}"
    )
    samples = [runner_report(call([*adb, "shell", f"{command} 2>&1"])) for _ in range(a.runs)]
    return {key: [s[key] for s in samples] for key in samples[0]}


def runner_report(output: str) -> dict[str, float]:
    """The last `PyTorchObserver {…}` line and the RSS lines of ExecuTorch's runner, as this module's measures.

    Raises:
        SystemExit: there is no such line.
    """
    reports = re.findall(r"PyTorchObserver (\{.*?\})", output)
    if not reports:
        sys.exit(f"the runner printed no PyTorchObserver line; it said:\n{output[-2000:]}")
    s = json.loads(reports[-1])
    prefill, answer = (
        (s["prompt_eval_end_ms"] - s["inference_start_ms"]),
        s["inference_end_ms"] - s["prompt_eval_end_ms"],
    )
    result = {
        "load": (s["model_load_end_ms"] - s["model_load_start_ms"]) / 1e3,
        "first_token": (s["first_token_ms"] - s["inference_start_ms"]) / 1e3,
        "prefill": s["prompt_tokens"] / max(prefill, 1) * 1e3,
        "decode": s["generated_tokens"] / max(answer, 1) * 1e3,
    }
    peak = [float(m) for m in re.findall(r"RSS after [^:]*: ([\d.]+) MiB", output)]
    return result | ({"memory_bytes": max(peak) * 2**20} if peak else {})


def to_phone(a: argparse.Namespace) -> list[str]:
    """Push models, runner and tokenizer, each unless the phone has it (by SHA-256); returns the adb command."""
    if not a.runner or not a.tokenizer:
        sys.exit("--adb needs --runner (llama_main built for Android) and --tokenizer (Meta's tokenizer.model)")
    adb = ["adb", *(["-s", a.adb] if a.adb != "auto" else [])]
    call([*adb, "shell", f"mkdir -p {PHONE}"])
    for source, name in [(a.runner, "llama_main"), (a.tokenizer, "tokenizer"), *((m, on_phone(m)) for m in a.models)]:
        there = call([*adb, "shell", f"sha256sum {PHONE}/{shlex.quote(name)} 2>/dev/null || true"])
        if sha256(source) not in there:
            print(f"pushing {source} …", file=sys.stderr, flush=True)
            call([*adb, "push", str(source), f"{PHONE}/{name}"])
    call([*adb, "shell", f"chmod +x {PHONE}/llama_main"])
    return adb


def on_phone(model: Path) -> str:
    """A model's name there; most are called model.pte, so their folders' names are in it."""
    return "-".join(part for part in model.parts if part not in ("/", "..", "."))


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed (Android platform-tools)")
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} … failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return done.stdout


# --- all models ------------------------------------------------------------------------------------------------------


def benchmark(
    models: list[Path], prompt_tokens: int = 64, new_tokens: int = 64, runs: int = 5, rounds: int = 2,
    threads: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure models on this machine, each in its own processes, in turns.

    Returns:
        {"device": …, "settings": …, "models": {path: {measure: [values], …, "sha256": …, "file_bytes": [n]}}, "failed":
        {path: the last of what its process said}}; one that failed is in no further round, the others are measured.
    """
    threads = threads or len(os.sched_getaffinity(0))
    results: dict[str, dict[str, Any]] = {str(m): {} for m in models}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for i, model in enumerate(models):
            if str(model) in failed:
                continue
            print(
                f"round {turn + 1} of {rounds}, model {i + 1} of {len(models)}: {model} …", file=sys.stderr, flush=True
            )
            try:
                measured = _in_own_process(model, prompt_tokens, new_tokens, runs, threads)
            except RuntimeError as e:
                failed[str(model)] = str(e)
                del results[str(model)]
                continue
            for key, values in measured.items():
                results[str(model)].setdefault(key, []).extend(values)
    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "rounds": rounds,
        "threads": threads,
    }
    return finish(results, settings, cpu_name()) | {"failed": failed}


def _in_own_process(model: Path, *settings: int) -> dict[str, list[float]]:
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, os.path.abspath(__file__), "--worker", out.name, str(model), *map(str, settings)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{model}: its process ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(Path(out.name).read_text())


def finish(results: dict[str, dict[str, Any]], settings: dict[str, int], device: str) -> dict[str, Any]:
    for name, result in results.items():
        result["sha256"] = sha256(Path(name))
        result["file_bytes"] = [os.path.getsize(name)]
    return {"device": device, "settings": settings, "models": results}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"(?:model name|Hardware)\s*:\s*(.+)", info)
    return f"{name[1] if name else platform.processor() or 'unknown CPU'} ({platform.machine()})"


def summary(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def markdown(result: dict[str, Any], names: dict[str, str] | None = None) -> str:
    """A table in the form of Meta's: a row a model, medians, ratios to the first, quartiles in brackets."""
    rows = [["model", *(f"{title} ({unit})" for title, unit, _, _ in MEASURES.values())]]
    rows.append(["---", *["---:"] * len(MEASURES)])
    first = next(iter(result["models"].values()))
    for path, model in result["models"].items():
        cells = [(names or {}).get(path, Path(path).name)]
        for key, (_, unit, form, _) in MEASURES.items():
            if not model.get(key):
                cells.append("")
                continue
            scale = 2**20 if unit == "MiB" else 1
            middle, low, high = (v / scale for v in summary(model[key]))
            spread = f" [{low:{form}}, {high:{form}}]" if high > low else ""
            ratio = (
                "" if model is first or not first.get(key) else f" **{middle * scale / summary(first[key])[0]:.2f}×**"
            )
            cells.append(f"{middle:{form}}{spread}{ratio}")
        rows.append(cells)
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        out, model, *settings = sys.argv[2:]
        Path(out).write_text(json.dumps(measure(model, *map(int, settings))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help=".pte or .gguf files; ratios are to the first")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5, help="measured runs in a process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each model (on a phone: 1)")
    parser.add_argument("--threads", type=int, help="default: all CPUs; on a phone its big cores, often 4")
    parser.add_argument("--json", type=Path, help="where all single measurements go")
    parser.add_argument("--adb", nargs="?", const="auto", help="measure on a phone: its serial, or the only one there")
    parser.add_argument("--runner", type=Path, help="llama_main built for Android (README)")
    parser.add_argument("--tokenizer", type=Path)
    a = parser.parse_args()
    for model in a.models:
        if not model.is_file():
            sys.exit(f"{model}: no such file")
    if a.adb:
        a.threads = a.threads or 4
        adb = to_phone(a)
        results = {str(m): measure_on_phone(adb, m, a) for m in a.models}
        settings = {k: getattr(a, k) for k in ("prompt_tokens", "new_tokens", "runs", "threads")}
        result = finish(results, settings, call([*adb, "shell", "getprop ro.product.model"]).strip())
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


if __name__ == "__main__":
    main()
