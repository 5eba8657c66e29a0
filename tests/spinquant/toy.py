"""A model of two layers with an outlier, its text and its settings, shared by the tests of SpinQuant."""

from pathlib import Path

import torch
from conftest import MODEL, SMALL, random_weights
from torch import Tensor

from llamaq.config import Config, load
from llamaq.model.build import build_decoder
from llamaq.model.shape import shape_of
from llamaq.spinquant.calibrate import Statistics, collect
from llamaq.spinquant.rotations import fuse_norms

ALL = {"r1", "r2", "r4"}
SHAPE = shape_of(MODEL)
SETTINGS = [
    *(s for s in SMALL if not s.startswith("qat")),
    "spinquant.calibration.0.num_samples=8",
    "spinquant.num_selection=4",
    "spinquant.batch_size=4",
    "spinquant.steps=6",
    "spinquant.refine_steps=1",
    "spinquant.polish_steps=2",
    "spinquant.num_seeds=2",
    "base.epochs=4",
]


def toy_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = random_weights()
    weights["layers.0.attn.q_proj.weight"][:, 5] *= 30  # an outlier that a rotation can spread
    return weights


def toy_tokens(n: int = 4) -> list[Tensor]:
    return list(torch.randint(768, (n, 2, 24), generator=torch.Generator().manual_seed(1)))


def toy_statistics(weights: dict[str, Tensor]) -> Statistics:
    decoder = build_decoder(MODEL, fuse_norms(weights, SHAPE)).eval().requires_grad_(False)
    return collect(decoder, SHAPE, toy_tokens(), seed=0)


def configured(folder: Path, *more: str) -> Config:
    return load("tiny_spinquant", [*SETTINGS, f"output_dir={folder}", *more])
