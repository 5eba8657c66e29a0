"""What one rank of the tests runs: the three training stages on fixed samples. Started by torchrun or as it is.

zero_worker.py FOLDER STOP_AFTER [key=value …]      STOP_AFTER: stop after the resume of this step, 0: never
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from conftest import ADAPTERS, small
from safetensors.torch import save_file
from test_training import dpo_objective, pairs, samples, with_reference

from llamaq.errors import UserError
from llamaq.model.build import build_model
from llamaq.quant.scheme import Scheme
from llamaq.runs.main import join_process_group, leave_process_group
from llamaq.runs.ranks import rank
from llamaq.runs.run import Run
from llamaq.runs.tracking import read_metrics
from llamaq.train import resume
from llamaq.train.loop import train
from llamaq.train.objectives import SFT

STEPS = 20


def stages(run: Run):
    """Name, model, objective and samples of each stage; models start from the same weights every time."""
    c = run.config
    yield "qat", build_model(c.model, None, Scheme(), seed=1), SFT(0), samples(64)
    yield "qat_lora", build_model(c.model, None, Scheme(), ADAPTERS, frozen=True, seed=1), SFT(0), samples(64)
    reference = build_model(c.model, None, Scheme(), ADAPTERS, frozen=True, seed=1)
    policy = build_model(c.model, None, Scheme(), ADAPTERS, seed=1)
    yield "qat_dpo", policy, dpo_objective(), with_reference(reference, pairs(32))


def main(folder: Path, stop_after: int, overrides: list[str]) -> None:
    names = ("qat", "qat_lora", "qat_dpo")
    sizes = [f"{s}.{k}" for s in names for k in (f"max_steps={STEPS}", "epochs=9", "checkpoint_every_n_steps=8")]
    lr = ["qat.optimizer.lr=1e-4", "qat_lora.optimizer.lr=2e-3", "qat_dpo.optimizer.lr=1e-5"]
    lr += [f"{s}.lr_scheduler.num_warmup_steps=10" for s in ("qat", "qat_lora")]
    config = small(folder / "run", "model.num_layers=2", *sizes, *lr, *overrides)
    join_process_group(config)
    run = Run(config)
    original = resume.save

    def save(path, step, *args, **kwargs):
        original(path, step, *args, **kwargs)
        if step == stop_after:
            raise KeyboardInterrupt

    for name, model, objective, rows in stages(run):
        stage = folder / f"{name}.partial"
        try:
            with mock.patch.object(resume, "save", save):
                _, weights = train(run.session(name, stage), config, config.section(name), model, objective, rows)
        except KeyboardInterrupt:
            continue
        if rank() == 0:
            save_file(weights, folder / f"{name}.safetensors")
            losses = [r["loss"] for r in read_metrics(stage / "metrics.jsonl")]
            norms = [r["grad_norm"] for r in read_metrics(stage / "metrics.jsonl")]
            (folder / f"{name}.json").write_text(json.dumps({"losses": losses, "norms": norms}))
    leave_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    except UserError as e:
        sys.exit(f"error: {e}")
