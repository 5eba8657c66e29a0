"""Test the device benchmark: real files in their own processes, the output of ExecuTorch's runner, and a phone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MODEL, saved_variant

from llamaq.config import ExportConfig
from llamaq.data.corpus import tiny_chat
from llamaq.export import benchmark as bench
from llamaq.export.exporter import export_pte

RUNNER = Path(__file__).with_name("run_with_runner.py")


def test_quartiles_and_table():
    assert bench.median_and_quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert bench.median_and_quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    models = {
        "a.pte": {"decode": [10.0, 12.0, 14.0], "file_bytes": [2**20 * 100], "memory_bytes": [2**20 * 300]},
        "b.pte": {"decode": [30.0, 36.0, 42.0], "file_bytes": [2**20 * 44], "memory_bytes": []},
    }
    lines = bench.markdown({"models": models}).splitlines()
    assert lines[2].startswith("| a.pte | 12.0 [11.0, 13.0] |")
    assert "36.0 [33.0, 39.0] **3.00×**" in lines[3] and "44.0 **0.44×**" in lines[3]


def test_the_runners_report_by_hand():
    """Check literal times: a prompt of 64 tokens is read in 250 ms, an answer of 32 tokens takes 640 ms."""
    times = {
        "prompt_tokens": 64,
        "generated_tokens": 32,
        "model_load_start_ms": 1000,
        "model_load_end_ms": 1500,
        "inference_start_ms": 2000,
        "prompt_eval_end_ms": 2250,
        "first_token_ms": 2260,
        "inference_end_ms": 2890,
    }
    output = (
        f"I 00:00 RSS after loading model: 900.5 MiB (0 if unsupported)\nPyTorchObserver {json.dumps(times)}\n"
        "I 00:01 RSS after finishing text generation: 1000.0 MiB (0 if unsupported)\n"
    )
    assert bench.runner_report(output) == {
        "load": 0.5,
        "first_token": 0.26,
        "prefill": 256.0,
        "decode": 50.0,
        "memory_bytes": 1000 * 2**20,
    }
    with pytest.raises(SystemExit, match="no PyTorchObserver line"):
        bench.runner_report("Segmentation fault")


def test_what_is_missing_is_said(tmp_path):
    script = Path(bench.__file__)
    (tmp_path / "model.pte").write_bytes(b"no program")
    done = subprocess.run([sys.executable, script, tmp_path / "model.pte"], capture_output=True, text=True)
    assert done.returncode == 1 and "model.pte: its process ended with" in done.stderr
    done = subprocess.run([sys.executable, script, tmp_path / "model.pte", "--adb"], capture_output=True, text=True)
    assert done.returncode == 1 and "--adb needs --runner" in done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    saved_variant(folder / "model", "qat")
    lengths = ExportConfig(max_seq_length=16, max_context_length=128)
    for name, options in (("model", lengths), ("static", replace(lengths, dynamic_shape=False))):
        export_pte(folder / "model", folder / f"{name}.pte", options, {"get_bos_id": 1, "get_eos_ids": [2]})
    tiny_chat(folder, num_train=80, num_pairs=10, num_heldout=10, num_people=40, vocab_size=MODEL["vocab_size"])
    return folder


@pytest.mark.slow
def test_models_side_by_side_in_one_file_of_python(files):
    """Run the script alone, outside the package, as on a board."""
    script = files / "benchmark.py"
    script.write_text(Path(bench.__file__).read_text())
    settings = "--prompt-tokens 40 --new-tokens 8 --runs 2 --rounds 2 --threads 1 --json speed.json"
    command = [sys.executable, script, "model.pte", "static.pte", *settings.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((files / "speed.json").read_text())
    assert result["settings"] == {"prompt_tokens": 40, "new_tokens": 8, "runs": 2, "rounds": 2, "threads": 1}
    for name, model in result["models"].items():
        assert len(model["decode"]) == len(model["first_token"]) == 4 and len(model["load"]) == 2
        assert all(p * t == pytest.approx(40) for p, t in zip(model["prefill"], model["first_token"], strict=True))
        assert model["file_bytes"] == [(files / name).stat().st_size]
        assert 0 < model["memory_bytes"][0] < model["peak_bytes"][0]
    assert done.stdout.count("sha256") == 2 and "**" in done.stdout
    (files / "broken.pte").write_bytes(b"no program")
    one_fails = subprocess.run([*command[:3], "broken.pte", *command[4:]], capture_output=True, text=True, cwd=files)
    assert one_fails.returncode == 1 and "broken.pte: its process ended with" in one_fails.stderr
    assert "| model.pte |" in one_fails.stdout and "| broken.pte |" not in one_fails.stdout  # nothing is lost
    too_long = subprocess.run([*command[:4], "--prompt-tokens", "120"], capture_output=True, text=True, cwd=files)
    assert too_long.returncode == 1 and "its KV cache has 128 tokens" in too_long.stderr


# Stand-ins for a phone: adb's two commands, on a folder of this machine, and ExecuTorch's runner from its wheel.
ADB = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
if arguments[0] == "push":
    os.makedirs(os.path.dirname("{root}" + arguments[2]), exist_ok=True)
    open("{root}" + arguments[2], "wb").write(open(arguments[1], "rb").read())
    open("{root}/pushed", "a").write(os.path.basename(arguments[2]) + "\\n")
else:
    command = arguments[1].replace("/data/local/tmp", "{root}/data/local/tmp").replace("getprop ro.product.model",
                                                                                          "echo stand-in")
    sys.exit(subprocess.run(["bash", "-c", command]).returncode)
"""
LLAMA_MAIN = """#!{python}
import os, sys
a = dict(zip(sys.argv[1::1], sys.argv[2::1]))
os.execv("{python}", ["{python}", "{runner}", a["--model_path"], a["--tokenizer_path"], a["--prompt"],
                      str(int(a["--seq_len"]) - len(a["--prompt"].split()) - 1), "--warmup"])
"""


@pytest.mark.slow
def test_the_way_to_a_phone_and_what_the_real_runner_reports(files, tmp_path):
    (tmp_path / "bin").mkdir()
    phone = tmp_path / "phone"
    places = {"python": sys.executable, "root": str(phone), "runner": str(RUNNER)}
    for name, text in (("bin/adb", ADB), ("llama_main", LLAMA_MAIN)):
        for key, value in places.items():
            text = text.replace("{" + key + "}", value)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "export").mkdir()
    model = tmp_path / "export" / "model.pte"
    model.write_bytes((files / "static.pte").read_bytes())
    phone_files = ["--runner", tmp_path / "llama_main", "--tokenizer", files / "tokenizer.model"]
    settings = ["--prompt-tokens", 20, "--new-tokens", 16, "--runs", 2, "--threads", 2]
    command = [sys.executable, bench.__file__, files / "model.pte", model, "--adb", *phone_files, *settings]
    command += ["--json", tmp_path / "phone.json"]
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    for _ in range(2):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "phone.json").read_text())
    assert result["device"] == "stand-in" and len(result["models"]) == 2
    for measured in result["models"].values():
        assert len(measured["decode"]) == 2
        assert all(measured[key][0] > 0 for key in ("prefill", "decode", "memory_bytes"))
    pushed = (phone / "pushed").read_text().split()
    assert len(pushed) == 4 and pushed[3].endswith("-export-model.pte")  # the second run pushed nothing
    model.write_bytes((files / "model.pte").read_bytes())
    bench.run_command(list(map(str, ["env", f"PATH={environment['PATH']}", *command])))
    assert (phone / "pushed").read_text().split() == [*pushed, pushed[3]]  # another file under the same name
