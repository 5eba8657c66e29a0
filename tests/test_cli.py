"""The `tune` command as a user meets it: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_weights

from llamaq.cli import OWN_COMMANDS, TORCHTUNES_COMMANDS

BIN = Path(sys.executable).parent
QUIET = {**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def tune(*arguments: str, command: str = "tune", cwd: Path | None = None, check: bool = True):
    result = subprocess.run(
        [BIN / command, *arguments], capture_output=True, text=True, env=QUIET, cwd=cwd, timeout=300
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def test_ls_lists_our_recipes_and_torchtunes_without_noise():
    result = tune("ls")
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["qat_lora_dpo", "llama"]
    assert any(line.split() == ["tiny"] for line in lines) and any("lora_finetune_single_device" in x for x in lines)
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["llamaq", "python"])
def test_the_other_names_reach_the_same_thing(command):
    arguments = ["-m", "llamaq", "--help"] if command == "python" else ["--help"]
    said = tune(*arguments, command=command).stdout
    assert "quantized training chain" in said and "validate" in said


def test_the_overview_names_every_command_and_needs_no_torch():
    code = "import sys; from llamaq.cli import main; sys.argv = ['tune']; main(); assert 'torch' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=QUIET, check=True).stdout
    assert said == tune("--help").stdout == tune("-h").stdout
    assert all(f"\n  {command} " in said for command in (*OWN_COMMANDS, *TORCHTUNES_COMMANDS))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu", "qat"], "no command 'rnu'; did you mean run?"),
        (["frobnicate"], "tune --help lists the commands"),
        (["run", "qat_lora_dpo"], "which config? tune run qat_lora_dpo --config NAME; "),
        (["cat", "tinny"], "no config 'tinny'; did you mean tiny?"),
    ],
)
def test_a_wrong_word_is_named_at_once(words, said):
    result = tune(*words, check=False)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_copy_does_not_overwrite_an_edited_one(tmp_path):
    tune("cp", "tiny", "mine.yaml", cwd=tmp_path)
    (tmp_path / "mine.yaml").write_text("edited")
    assert "already exists" in tune("cp", "tiny", "mine.yaml", cwd=tmp_path).stdout
    assert (tmp_path / "mine.yaml").read_text() == "edited"


def test_cp_and_cat_and_validate(tmp_path):
    tune("cp", "tiny", "mine.yaml", cwd=tmp_path)
    tune("cp", "qat", "my_qat.py", cwd=tmp_path)
    assert "def qat(" in (tmp_path / "my_qat.py").read_text()
    assert "tiny_chat" in tune("cat", "tiny").stdout
    assert "well-formed" in tune("validate", "mine.yaml", cwd=tmp_path).stdout
    assert "well-formed" in tune("validate", "llama3_2/1B_qat_lora_dpo").stdout
    text = (tmp_path / "mine.yaml").read_text().replace("qat_lora:", "qat_lore:")
    (tmp_path / "mine.yaml").write_text(text)
    bad = tune("validate", "mine.yaml", cwd=tmp_path, check=False)
    assert bad.returncode == 2 and "did you mean qat_lora?" in bad.stderr


def test_rays_own_commands_go_to_ray(tmp_path):
    said = tune("list-trials", "--help").stdout
    assert "Usage:" in said and "list-trials" in said and "EXPERIMENT_PATH" in said.upper()
    ls = tune("ls", str(tmp_path), check=False)
    assert "RECIPE" not in ls.stdout  # `ls FOLDER` is Ray's


def test_an_unknown_recipe_is_named():
    result = tune("run", "qat_lora_dop", "--config", "tiny", check=False)
    assert result.returncode == 2 and "no recipe or module 'qat_lora_dop'" in result.stderr


def test_a_users_error_is_one_line_and_exit_1(tmp_path):
    result = tune("run", "qat", "--config", "tiny", "qat.epoch=3", f"output_dir={tmp_path}/x", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].endswith("did you mean qat.epochs?")


STOCK = """
output_dir: {folder}/out
tokenizer: {{_component_: torchtune.models.llama3.llama3_tokenizer, path: {folder}/tokenizer.model,
             special_tokens_path: {folder}/special_tokens.json, max_seq_len: 64}}
dataset: {{_component_: torchtune.datasets.chat_dataset, source: json, data_files: {folder}/train.jsonl,
           conversation_column: messages, conversation_style: openai, packed: False}}
model: {{_component_: torchtune.models.llama3_2.llama3_2, vocab_size: 768, num_layers: 2, num_heads: 4,
         num_kv_heads: 2, embed_dim: 64, intermediate_dim: 256, max_seq_len: 256, rope_base: 500000, scale_factor: 32}}
checkpointer: {{_component_: torchtune.training.FullModelTorchTuneCheckpointer, checkpoint_dir: {folder}/start,
                checkpoint_files: [model.pt], recipe_checkpoint: null, output_dir: {folder}/out, model_type: LLAMA3_2}}
seed: 0
shuffle: True
batch_size: 4
epochs: 1
optimizer: {{_component_: torch.optim.AdamW, lr: 1e-3}}
optimizer_in_bwd: False
loss: {{_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}}
max_steps_per_epoch: 3
gradient_accumulation_steps: 1
compile: False
resume_from_checkpoint: False
clip_grad_norm: null
device: cpu
dtype: fp32
enable_activation_checkpointing: False
enable_activation_offloading: False
metric_logger: {{_component_: torchtune.training.metric_logging.DiskLogger, log_dir: {folder}/logs}}
log_every_n_steps: 1
log_peak_memory_stats: False
"""


def test_a_stock_torchtune_recipe_runs(tmp_path):
    """Torchtune 0.6.1's own full fine-tuning on torchao 0.18, through our `tune`."""
    from llamaq.data.corpus import tiny_chat

    tiny_chat(tmp_path, num_train=40, num_pairs=2, num_heldout=2, num_people=60, vocab_size=640)
    (tmp_path / "start").mkdir()
    torch.save(random_weights(), tmp_path / "start" / "model.pt")
    (tmp_path / "stock.yaml").write_text(STOCK.format(folder=tmp_path))
    tune("run", "full_finetune_single_device", "--config", "stock.yaml", cwd=tmp_path)
    logs = next((tmp_path / "logs").glob("*.txt")).read_text()
    assert "Step 3" in logs and "loss:" in logs
    assert list((tmp_path / "out" / "epoch_0").glob("*.bin"))
