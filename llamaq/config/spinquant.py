"""The `spinquant` section: calibration text, rotations, rounding to integer codes, and the choice among candidates."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from llamaq.config.checks import at_least, at_most, has_data, one_of, positive, require
from llamaq.config.components import Component

CANDIDATES = ("none", "r4", "r2_r4", "r1_r2_r4")


@dataclass
class CalibrationPart:
    """One dataset of the calibration text, and how much of it to take."""

    dataset: Component = MISSING
    """A dataset to calibrate on, e.g. `llamaq.data.text.text_windows_dataset` with `source: calibration.txt`.
    `_component_` is a torchtune dataset builder, called with the tokenizer. Its samples are shuffled and joined."""

    num_samples: int = 128
    """Windows of `tokenizer.max_seq_len` tokens to take, at least 1. More windows estimate the input statistics better
    and take longer."""

    def check(self, name: str) -> None:
        """Check the dataset and the number of windows."""
        has_data(f"{name}.dataset", self.dataset)
        at_least(1, self, name, "num_samples")


@dataclass
class SpinQuantConfig:
    """SpinQuant: rotations are learned and merged into the weights, then the weights are rounded by GPTQ."""

    calibration: list[CalibrationPart] = MISSING
    """The calibration text: a list of datasets. Mix what the model is used for (chat, code, tool calls, other
    languages): plain text alone costs quality on the others."""

    num_selection: int = 32
    """Windows on which the candidates are compared, at least 1. They are taken from the calibration datasets in equal
    parts, beyond the windows of `num_samples`, so no candidate has seen them."""

    batch_size: int = 8
    """Windows in one forward pass. Lower it if memory runs out. Results depend on it a little: it decides how
    calibration draws its labels, and it is the batch of each step of `objective: published`, of refining and of
    polishing."""

    candidates: list[str] = field(default_factory=lambda: list(CANDIDATES))
    """Rotations to try: `none`, `r4`, `r2_r4`, `r1_r2_r4`. R1 rotates the residual stream, R2 the values of each head;
    both are learned and merged into the weights. R4 is a fixed Hadamard transform before `down_proj`, computed while
    the model runs. The candidate with the lowest KL from the BF16 model ships. `none` has to be among them unless
    `force` is set."""

    num_seeds: int = 1
    """Random starts of each learned candidate, 1 to 1000. Learned are those with R1 or R2. Each start is a candidate
    of its own, e.g. `r1_r2_r4_seed1`; more starts can find better rotations and take proportionally longer."""

    force: str | None = None
    """Ship this candidate, e.g. `r4`, whatever the comparison says. Learned candidates have a seed in their name, e.g.
    `r1_r2_r4_seed0`. Unset: the best one ships."""

    objective: str = "noise"
    """What rotations are learned by: `noise` or `published`. `noise` is the expected quantization noise, from
    statistics of one pass over the calibration text; it is faster. `published` is the paper's: the model's
    cross-entropy with int8 activations, by Cayley SGD (set `steps: 100` and `lr: 1.5` with it)."""

    steps: int = 300
    """Steps of learning the rotations, at least 1. The paper uses 100 with `objective: published`."""

    lr: float = 2.0e-2
    """Learning rate of the rotations, above 0. It falls to 0 by a cosine. The paper uses 1.5 with `objective:
    published`."""

    rows: int | None = None
    """Rows of each weight matrix in a step of `objective: noise`. They are drawn anew for each step. Unset: all rows.
    Set 2048 for faster steps with 1B and larger models."""

    refine_steps: int = 0
    """Learning steps after `steps` that minimize the KL, 0 or more. It is the KL from the BF16 model, with weights and
    activations quantized. These steps are much slower, since each runs the whole model."""

    refine_lr: float = 1.0e-3
    """Learning rate of the `refine_steps` (Adam), above 0. It falls to 0 by a cosine."""

    rounding: str = "gptq"
    """How weights become int4 codes: `gptq` or `rtn`. GPTQ corrects each rounding error in the columns that are not
    rounded yet. `rtn` (round to nearest) is quicker and less accurate."""

    damping: float = 0.01
    """Damping of GPTQ's Hessians, above 0. It is added to the diagonal, as a share of the diagonal's mean. Raise it if
    the calibration text is short."""

    correct_mismatch: bool = True
    """Let GPTQ correct the errors of the layers before. It then reproduces the float model's outputs from the quantized
    model's inputs. `false` is plain GPTQ, which only corrects the layer's own rounding."""

    polish_steps: int = 0
    """Steps that train group scales and norm weights, 0 or more. They follow rounding and minimize the KL from the BF16
    model; the integer codes stay as they are. Start with 100 to 200."""

    polish_lr: float = 3.0e-4
    """Learning rate of the `polish_steps`, above 0. It is about the relative change of a scale in one step, and falls
    to 0 by a cosine."""

    def check(self, name: str) -> None:
        """Check names, ranges and every part of the calibration text."""
        require(len(self.calibration) > 0, f"{name}.calibration names no dataset")
        for i, part in enumerate(self.calibration):
            part.check(f"{name}.calibration[{i}]")
        self._check_candidates(name)
        at_least(1, self, name, "num_selection", "batch_size", "num_seeds", "steps", "rows")
        at_least(0, self, name, "refine_steps", "polish_steps")
        one_of(f"{name}.objective", self.objective, "noise", "published")
        one_of(f"{name}.rounding", self.rounding, "gptq", "rtn")
        at_most(1000, self, name, "num_seeds")
        for key in ("lr", "refine_lr", "polish_lr", "damping"):
            positive(f"{name}.{key}", getattr(self, key))

    def _check_candidates(self, name: str) -> None:
        require(len(self.candidates) > 0, f"{name}.candidates=[]: names no rotation; [none] rotates nothing")
        for candidate in self.candidates:
            known = ", ".join(CANDIDATES)
            require(candidate in CANDIDATES, f"{name}.candidates: '{candidate}' is none of {known}")
        require(
            "none" in self.candidates or self.force is not None,
            f"{name}.candidates has no 'none': a rotation is held against not rotating; add it, or set {name}.force",
        )
