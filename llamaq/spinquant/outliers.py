"""Measure how far outliers stand out before and after rotating, layer by layer; the report draws it.

An outlier sets the step of its whole group or token. The measure is the largest magnitude over the root mean square:
1 if all are equal, √n if all but one of n are 0. For the group (4, 1, 1, 1, 1) it is 4 / √(20 / 5) = 2.
"""

import torch
from torch import Tensor

from llamaq.model.build import StateDict
from llamaq.model.names import LINEARS
from llamaq.spinquant.calibrate import Statistics

ROWS = 1024  # of a matrix that are looked at
_LINEAR_WEIGHTS = tuple(f"{name}.weight" for name in LINEARS)


@torch.no_grad()
def outliers(
    weights: StateDict, rotated: StateDict, r1: Tensor | None, statistics: Statistics, group_size: int
) -> dict[str, dict[str, list[float]]]:
    """Return peaks `before` and `after` rotating, by layer, of groups of weights and of what attention and MLP read.

    Args:
        weights: as they were.
        rotated: the same after `rotate`.
        r1: R1 [dim, dim], or None if the residual stream is not rotated.
        statistics: of the calibration text.
        group_size: of the weights.
    """
    return {
        "before": _peaks(weights, None, statistics, group_size),
        "after": _peaks(rotated, r1, statistics, group_size),
    }


def _peaks(weights: StateDict, r1: Tensor | None, statistics: Statistics, group_size: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"weights of a group": [], "tokens attention reads": [], "tokens MLP reads": []}
    for i, layer in enumerate(statistics.layers):
        names = [n for n in weights if n.startswith(f"layers.{i}.") and n.endswith(_LINEAR_WEIGHTS)]
        found["weights of a group"].append(sum(_peak(weights[n], group_size) for n in names) / len(names))
        for key, x, norm in (("attention", layer.attn_x, "sa_norm"), ("MLP", layer.mlp_x, "mlp_norm")):
            # the samples are x / rms(x); without R1 the norm's gain is still in front of the linears
            x = x * weights[f"layers.{i}.{norm}.scale"] if r1 is None else x @ r1.float()
            found[f"tokens {key} reads"].append(_peak(x, x.shape[1]))
    return found


def _peak(x: Tensor, group: int) -> float:
    """Return max |x| / rms(x) of runs of `group` values, averaged over the first rows of x [rows, n]."""
    x = x[:ROWS].float().unflatten(-1, (-1, group))
    return float((x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp_min(1e-12)).mean())
