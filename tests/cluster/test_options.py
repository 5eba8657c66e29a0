"""Test what `tune submit` refuses before it talks to a cluster, and what it sends."""

import argparse
from dataclasses import replace

import pytest
import torch
from conftest import small
from omegaconf import OmegaConf

from llamaq.cluster import job, submit
from llamaq.cluster.options import Options, add_options, parse_options, split_settings
from llamaq.config import deepspeed_settings, load
from llamaq.errors import UserError

ABSOLUTE = ["output_dir=/shared/run", "device=cpu"]


def parsed(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_options(parser)
    words, settings = split_settings(["qat", "--config", "tiny", *words])  # pyright: ignore[reportAssignmentType]
    arguments = parser.parse_args(words)
    c = load(arguments.config, [*ABSOLUTE, *settings])
    found = parse_options(arguments, c)
    found.check(c)
    return found


def test_settings_may_stand_anywhere():
    words = ["qat", "seed=1", "--env", "A=B", "--config", "tiny", "~base", "--detach", "qat.max_steps=2"]
    options, settings = split_settings(words)
    assert options == ["qat", "--env", "A=B", "--config", "tiny", "--detach"]
    assert settings == ["seed=1", "~base", "qat.max_steps=2"]


def test_defaults_and_what_ray_is_told():
    o = parsed()
    assert (o.workers, o.bundle, o.placement, o.wait_minutes) == (1, {"CPU": 1.0}, "pack", 15.0)
    o = parsed("--num-workers", "2:4", "--cpus-per-worker", "3", "--placement", "spread")
    assert o.workers == (2, 4) and o.bundle == {"CPU": 3.0}
    gpu = parsed("device=auto")
    assert gpu.bundle == {"CPU": 1.0, "GPU": 1.0}
    assert parsed(*o.arguments()) == o  # what is sent along is what was asked for


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num-workers", "0"], "--num-workers 0: give a number, or MIN:MAX"),
        (["--num-workers", "4:2"], "--num-workers 4:2: give a number"),
        (["--num-workers", "two"], "--num-workers two: give a number"),
        (["--num-workers", "33"], "--num-workers 33: with base.global_batch_size=32 some would have nothing to do"),
        (["--cpus-per-worker", "0"], "--cpus-per-worker 0: at least 1"),
        (["--wait-minutes", "0"], "--wait-minutes and --resize-seconds must be above 0"),
        (["output_dir=runs/a"], "output_dir=runs/a is relative"),
        (["checkpoint_dir=models/a"], "checkpoint_dir=models/a is relative"),
        (["--gpus-per-worker", "1"], "device=cpu trains on CPUs; add --gpus-per-worker 0"),
        (["--gpus-per-worker", "0", "device=cuda"], "device=cuda needs GPUs; leave --gpus-per-worker 0 out"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    with pytest.raises(UserError) as e:
        parsed(*words)
    assert message in str(e.value)


def test_no_secret_travels(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "HF_TOKEN"):
        monkeypatch.setenv(name, "value")
    sent = submit.environment_of(["STEP=1"])
    assert sent["WANDB_MODE"] == sent["WANDB_PROJECT"] == "value" and sent["STEP"] == "1"
    assert "WANDB_API_KEY" not in sent and "HF_TOKEN" not in sent
    for item in ("WANDB_API_KEY=abc", "HF_TOKEN=abc", "MY_PASSWORD=abc"):
        with pytest.raises(UserError, match="looks like a secret") as e:
            submit.environment_of([item])
        assert "abc" not in str(e.value)


def test_a_token_file_others_can_read_is_refused(tmp_path):
    token = tmp_path / "token"
    token.write_text("x")
    token.chmod(0o644)
    with pytest.raises(UserError, match="can be read by others; chmod 600"):
        submit.use_token(token)
    with pytest.raises(UserError, match="no such file"):
        submit.use_token(tmp_path / "none")


def test_what_is_sent_is_the_package_as_installed_and_the_whole_configuration(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.py").write_text("x = 1\n")
    c = small(tmp_path / "run")
    submit.pack(tmp_path / "sent", c, own)
    sent = {p.relative_to(tmp_path / "sent").as_posix() for p in (tmp_path / "sent").rglob("*") if p.is_file()}
    expected = {
        "config.yaml",
        "mine.py",
        "llamaq/config/schema.py",
        "llamaq/recipes/qat.py",
        "llamaq/recipes/configs/tiny.yaml",
        "llamaq/cluster/job.py",
        "llamaq/cluster/deepspeed/zero1.json",
    }
    assert expected <= sent and not any("__pycache__" in name for name in sent)
    sent_config = load(str(tmp_path / "sent/config.yaml"))
    assert deepspeed_settings(sent_config) == deepspeed_settings(c)  # inlined: the file it may name stays here
    assert replace(sent_config, deepspeed=c.deepspeed) == c
    monkeypatch.setenv("SOME_API_KEY", c.output_dir)
    with pytest.raises(UserError, match="the configuration holds the value of SOME_API_KEY") as e:
        submit.pack(tmp_path / "secret", c, None)
    assert c.output_dir not in str(e.value)
    assert "qat" in OmegaConf.load(tmp_path / "sent/config.yaml")
    monkeypatch.delenv("SOME_API_KEY")
    (own / "llamaq").mkdir()
    with pytest.raises(UserError, match="would hide ours"):
        submit.pack(tmp_path / "again", c, own)


def test_the_job_checks_its_command_line_before_it_joins_the_cluster():
    arguments = ["--config", "tiny", *ABSOLUTE]
    recipe, c, o = job.parse(["qat", *arguments, "--num-workers", "1"])
    assert (recipe, c.output_dir, o.min_workers) == ("qat", "/shared/run", 1)
    with pytest.raises(UserError, match="'qta' is neither a recipe of llamaq nor a module"):
        job.parse(["qta", *arguments])


@pytest.mark.parametrize(
    "error",
    [
        UserError("x"),
        KeyError("x"),
        ImportError("x"),
        AssertionError(),
        NotImplementedError(),
        torch.OutOfMemoryError("x"),
    ],
    ids=repr,
)
def test_errors_that_another_try_would_meet_again_are_permanent(error):
    assert job.is_permanent(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("gloo: connection closed by peer"), OSError("stale file handle"), ConnectionResetError()],
    ids=repr,
)
def test_errors_of_lost_peers_and_disks_are_retried(error):
    assert not job.is_permanent(error)


def test_a_conversation_is_no_job():
    with pytest.raises(UserError, match="chat needs a terminal, which a job has not"):
        submit.parse(["chat", "--config", "tiny"])
