"""Candidates: sets of rotations that are learned, merged, rounded and polished, then judged by KL; the best one ships.

    none          not rotated
    r4            R4 alone: nothing to learn
    r2_r4         R2 learned, with R4
    r1_r2_r4      R1 and R2 learned, with R4

R1 and R2 start from random matrices, so each seed makes a candidate of its own, e.g. `r2_r4_seed0`. The model that is
not rotated is a candidate too, so a rotation ships only if it helps. Nothing here needs a run:

    setup = Setup.of(config, load_statistics(calibrated))
    for candidate in candidates_of(config.section("spinquant"), config.seed):
        print(candidate.name, make_candidate(candidate, setup, Path(candidate.name))["kl"])
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llamaq.checkpoints.load import start_weights
from llamaq.checkpoints.quantized import load_quantized, save_quantized
from llamaq.checkpoints.tensors import save_tensors
from llamaq.config import Component, Config, SpinQuantConfig
from llamaq.errors import UserError
from llamaq.model.build import StateDict, build_decoder, build_model, pick_device, scheme_of
from llamaq.model.causal_lm import CausalLM
from llamaq.model.names import EMBEDDING, HEAD
from llamaq.model.online import attach_online
from llamaq.model.shape import Shape, shape_of
from llamaq.quant.prepare import freeze, prepare
from llamaq.quant.scheme import Scheme
from llamaq.runs.files import write_json
from llamaq.runs.ranks import say
from llamaq.runs.tracking import Tracker
from llamaq.spinquant.calibrate import Statistics, from_tensors, to_tensors
from llamaq.spinquant.cayley import Learned
from llamaq.spinquant.end_to_end import EndToEnd, learn_as_published, refine
from llamaq.spinquant.expected_noise import ExpectedNoise, learn_by_noise
from llamaq.spinquant.gptq import LinearReport, Rounding, round_layers
from llamaq.spinquant.loops import Progress, bar, no_bar
from llamaq.spinquant.outliers import outliers
from llamaq.spinquant.polish import polish
from llamaq.spinquant.rotations import Rotations, fuse_norms, rotate
from llamaq.spinquant.windows import TEXT, windows


@dataclass(frozen=True)
class Candidate:
    """A set of rotations to try."""

    name: str
    which: frozenset[str]  # of r1, r2 and r4
    seed: int  # of the random matrices that learning starts from

    @property
    def learned(self) -> bool:
        """Tell whether there is anything to learn: R4 is given."""
        return bool(self.which - {"r4"})

    @property
    def stage(self) -> str:
        """Return the name of the stage that makes it."""
        return f"candidate_{self.name}"


def candidates_of(s: SpinQuantConfig, seed: int) -> list[Candidate]:
    """List the candidates of a config, `num_seeds` of each kind that is learned.

    Raises:
        UserError: `spinquant.force` is none of them.
    """
    found = []
    for kind in s.candidates:
        which = frozenset() if kind == "none" else frozenset(kind.split("_"))
        if which - {"r4"}:
            seeds = range(seed, seed + s.num_seeds)
            found += [Candidate(f"{kind}_seed{start}", which, start) for start in seeds]
        else:
            found.append(Candidate(kind, which, seed))
    _check_force(s.force, [candidate.name for candidate in found])
    return found


def choose(force: str | None, kl: Mapping[str, float]) -> str:
    """Return the name of the candidate that ships: the one with the lowest KL, or the one that is forced.

    Raises:
        UserError: the one that is forced is not among the candidates.
    """
    _check_force(force, list(kl))
    return force or min(kl, key=kl.__getitem__)


def _check_force(force: str | None, names: list[str]) -> None:
    if force is not None and force not in names:
        raise UserError(f"spinquant.force={force} is none of the candidates: {', '.join(names)}")


def settings_read(candidate: Candidate, s: SpinQuantConfig) -> list[str]:
    """List the settings that decide what becomes of a candidate, as dotted paths: what its `Setup` may read."""
    read = ["batch_size", "rounding", "damping", "correct_mismatch", "polish_steps"]
    read += ["polish_lr"] if s.polish_steps else []
    if candidate.learned:
        read += ["objective", "steps", "lr", "refine_steps"]
        read += ["rows"] if s.objective == "noise" else []
        read += ["refine_lr"] if s.refine_steps else []
    return [*TEXT, "scheme", *(f"spinquant.{name}" for name in read)]


@dataclass
class Setup:
    """Everything that the candidates of a run share: the model, the text, the settings, and where to compute."""

    settings: SpinQuantConfig
    model: Component
    weights: StateDict  # of the BF16 model: float32, torchtune names
    scheme: Scheme
    calibration: Tensor  # [n, s] tokens
    selection: Tensor  # [m, s] tokens that no candidate is calibrated on
    statistics: Statistics  # of the calibration text, on the CPU
    seed: int
    device: torch.device

    @classmethod
    def of(cls, c: Config, statistics: Statistics) -> "Setup":
        """Read the checkpoint and the text that a config names."""
        calibration, selection = windows(c)
        return cls(
            settings=c.section("spinquant"),
            model=c.model,
            weights=start_weights(c),
            scheme=scheme_of(c),
            calibration=calibration,
            selection=selection,
            statistics=statistics,
            seed=c.seed,
            device=pick_device(c.device),
        )

    @cached_property
    def shape(self) -> Shape:
        """Return the model's sizes."""
        return shape_of(self.model)

    @property
    def batches(self) -> list[Tensor]:
        """Return the calibration text in batches [b, s]."""
        return list(self.calibration.split(self.settings.batch_size))

    @property
    def untied(self) -> StateDict:
        """Return the weights with a head of its own, as rotating needs it."""
        return self.weights | {HEAD: self.weights.get(HEAD, self.weights[EMBEDDING])}


def make_candidate(
    candidate: Candidate, setup: Setup, folder: Path, tracker: Callable[[], Tracker] | None = None
) -> dict[str, Any]:
    """Learn, merge, round, polish and judge a candidate; return its metrics.

    Args:
        candidate: which rotations.
        setup: what it is made from.
        folder: gets `model/` in Meta's layout and, if rotations are learned, `rotations.safetensors` and
            `learning.json`. If these two are there already, nothing is learned again.
        tracker: opens what the losses of learning are logged to.
    """
    learned, learn_seconds = learn_or_load(candidate, setup, folder, tracker)
    r = learned.rotations
    rotated = rotate(setup.weights, setup.shape, r)
    began = time.monotonic()
    student, linears = round_model(setup, rotated, r.r4, bar(f"{candidate.name}: round", "layer"))
    round_seconds = time.monotonic() - began
    student = student.to(setup.device)
    bf16 = build_model(setup.model, setup.weights, None).eval().requires_grad_(False).to(setup.device)
    polished = polish_model(setup, student, bf16, bar(f"{candidate.name}: polish", "step"))
    batch_size, progress = setup.settings.batch_size, bar(f"{candidate.name}: judge", "batch")
    kl = judge(student, bf16, setup.selection, batch_size, setup.device, progress)  # [windows]
    contract = r.contract() if candidate.which else None
    save_quantized(folder / "model", student.cpu().decoder, setup.scheme, contract)
    say(f"{candidate.name}: KL from BF16 {kl.mean():.3e} nats a token on {setup.selection.numel()} tokens")
    return {
        "kl": float(kl.mean()),
        "kl_interval": 1.96 * float(kl.std() / len(kl) ** 0.5),  # 95 %, over windows
        "learn_seconds": learn_seconds,
        "round_seconds": round_seconds,
        "learn_losses": _first_and_last(learned.losses),
        "polish_losses": _first_and_last(polished),
        "orthogonality_error": r.orthogonality_error(),
        "layers": [vars(linear) for linear in linears],
        "outliers": outliers(setup.weights, rotated, r.r1, setup.statistics, setup.scheme.group_size),
    }


def load_model(c: Config, folder: Path) -> CausalLM:
    """Build the model whose codes `make_candidate` wrote to `folder`, float32 on the CPU."""
    decoder = prepare(build_decoder(c.model, start_weights(c)), scheme_of(c))
    return CausalLM(load_quantized(folder / "model", decoder)).eval()


def _first_and_last(losses: list[float]) -> list[float]:
    return [losses[0], losses[-1]] if losses else []


def learn_or_load(
    candidate: Candidate, setup: Setup, folder: Path, tracker: Callable[[], Tracker] | None = None
) -> tuple[Learned, float]:
    """Return the candidate's rotations, and the seconds their learning took.

    Learning is the longest part, so what it gives is kept in `folder` for a run that is killed after it.
    """
    start = Rotations.random(setup.shape, set(candidate.which), candidate.seed)
    if not candidate.learned:
        return Learned(start, []), 0.0
    kept, facts = folder / "rotations.safetensors", folder / "learning.json"
    if not facts.is_file():
        began = time.monotonic()
        learned = learn(setup, start, candidate.name)
        if tracker is not None:
            _log(learned.losses, tracker())
        save_tensors(kept, learned.rotations.matrices)
        write_json(facts, {"losses": learned.losses, "seconds": time.monotonic() - began})  # last: now both are whole
    told = json.loads(facts.read_text())
    return Learned(Rotations(**load_file(kept), r4=start.r4), told["losses"]), told["seconds"]


def _log(losses: list[float], tracker: Tracker) -> None:
    with tracker:
        for step, loss in enumerate(losses, 1):
            tracker.log(step, {"learn/loss": loss})


def learn(setup: Setup, start: Rotations, title: str) -> Learned:
    """Learn R1 and R2 by the objective that the settings name, then refine them by KL if the settings say so.

    Args:
        setup: the model, the text and the settings.
        start: the random matrices to start from; only those that are there are learned.
        title: of the progress bars.
    """
    s, device = setup.settings, setup.device
    progress = bar(f"{title}: learn", "step")
    if s.objective == "published":
        published = _end_to_end(setup, start.r4, scheme=None)
        learned = learn_as_published(published, start, setup.batches, s.steps, s.lr, progress)
        del published  # a model and its rotated weights
    else:
        learned = learn_by_noise(_expected_noise(setup, start), start, s.steps, s.lr, progress)
    if not s.refine_steps:
        return learned
    teacher: Any = build_decoder(setup.model, setup.untied).eval().requires_grad_(False).to(device)
    quantized, progress = _end_to_end(setup, start.r4, setup.scheme), bar(f"{title}: refine", "step")
    refined = refine(quantized, teacher, learned.rotations, setup.batches, s.refine_steps, s.refine_lr, progress)
    return Learned(refined.rotations, [*learned.losses, *refined.losses])


def _expected_noise(setup: Setup, start: Rotations) -> ExpectedNoise:
    # without R1 norms keep their gains, as in the model that ships
    weights = setup.weights if start.r1 is None else fuse_norms(setup.weights, setup.shape)
    return ExpectedNoise(
        {name: w.to(setup.device) for name, w in weights.items()},
        setup.shape,
        from_tensors(to_tensors(setup.statistics), setup.device),
        setup.scheme,
        setup.settings.rows,
        setup.seed,
        setup.device,
    )


def _end_to_end(setup: Setup, r4: int, scheme: Scheme | None) -> EndToEnd:
    weights = setup.untied
    decoder: Any = build_decoder(setup.model, weights).eval().to(setup.device)
    return EndToEnd(decoder, {name: w.to(setup.device) for name, w in weights.items()}, setup.shape, r4, scheme)


@torch.no_grad()
def round_model(
    setup: Setup, rotated: StateDict, r4: int, progress: Progress = no_bar
) -> tuple[CausalLM, list[LinearReport]]:
    """Round rotated weights; return the frozen model on the CPU, and how well each linear was rounded.

    Args:
        setup: the model, the text and the settings.
        rotated: weights with the rotations merged in.
        r4: the width of the online transform, 0 for none.
        progress: wraps the loop over layers.
    """
    student = prepare(build_decoder(setup.model, rotated), setup.scheme)
    exact = build_decoder(setup.model, rotated)
    for decoder in (student, exact):
        attach_online(decoder.eval().requires_grad_(False), r4)
    how = Rounding.of(setup.settings)
    linears = round_layers(student, setup.batches, setup.scheme.linear, how, exact, setup.device, progress)
    return CausalLM(freeze(student)), linears  # pyright: ignore[reportArgumentType]  (still torchtune's decoder)


def polish_model(setup: Setup, student: CausalLM, bf16: CausalLM, progress: Progress = no_bar) -> list[float]:
    """Train scales and norms by KL from the BF16 model, if the settings say so; return the losses."""
    s = setup.settings
    if not s.polish_steps:
        return []

    def loss(tokens: Tensor) -> Tensor:
        return _kl(student, bf16, tokens).mean()

    batches = list(setup.calibration.to(setup.device).split(s.batch_size))
    return polish(student.decoder, loss, batches, s.polish_steps, s.polish_lr, progress)


@torch.no_grad()
def judge(
    student: CausalLM, bf16: CausalLM, text: Tensor, batch_size: int, device: torch.device, progress: Progress = no_bar
) -> Tensor:
    """Return the KL from the BF16 model of each window [m, s], in nats a token: float64 [m]."""
    batches = progress(text.split(batch_size))
    return torch.cat([_kl(student, bf16, tokens.to(device)).double().mean(1).cpu() for tokens in batches])


def _kl(student: CausalLM, bf16: CausalLM, tokens: Tensor) -> Tensor:
    """Return the KL of each token [b, s] from the BF16 model."""
    labels = torch.zeros_like(tokens)  # every position counts; only the distributions are compared
    scored = student(tokens, labels=labels, teacher=bf16)
    assert isinstance(scored, tuple) and scored[1] is not None
    return scored[1]
