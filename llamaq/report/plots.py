"""Draw the report's plots. Colours are Okabe and Ito's, which colour-blind readers can tell apart; axes have units."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"

Curve = tuple[list[int], list[float]]  # steps, values


def plot_losses(path: Path, curves: Mapping[str, Mapping[str, Curve]]) -> None:
    """Draw a panel per stage: title → {label: curve}; the first curve of a panel is the stage's own."""
    figure, axes = _axes(4.2 * len(curves), 3.2, len(curves))
    for ax, (title, lines) in zip(axes[0], curves.items(), strict=True):
        for color, (label, (steps, values)) in zip((BLUE, ORANGE, GREEN), lines.items(), strict=False):
            ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            ax.plot(steps, _smooth(values), color=color, linewidth=1.6, label=label)
        ax.set(title=title, xlabel="optimizer step")
        ax.legend(frameon=False)
    axes[0][0].set_ylabel("loss (nats per token; DPO: nats per pair)")
    _save(figure, path)


def _smooth(values: list[float], window: float = 0.05) -> list[float]:
    """Return the centred running mean over a share of the curve."""
    half = max(1, int(len(values) * window)) // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def plot_quality(path: Path, nll: Mapping[str, float], baseline: str) -> None:
    """Draw the held-out NLL of each step of the chain, as a distance from the baseline's line."""
    figure, axes = _axes(7, 0.4 * len(nll) + 1.2)
    ax, names, values = axes[0][0], list(nll), list(nll.values())
    colors = [GREY if "BF16" in n else RED if "PTQ" in n else BLUE for n in names]
    ax.hlines(range(len(names)), nll[baseline], values, color=colors, linewidth=1.2)
    ax.scatter(values, range(len(names)), color=colors, s=40, zorder=3)  # points: an axis without 0 allows no bars
    ax.axvline(nll[baseline], color="black", linewidth=0.8, linestyle="--")
    for i, value in enumerate(values):
        ax.annotate(f"{value:.4f}", (value, i), (7, 4), textcoords="offset points", fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.margins(x=0.15, y=0.1)
    ax.set_xlabel(f"held-out NLL, nats per token (lower is better)\ndashed: {baseline}")
    _save(figure, path)


def plot_agreement(path: Path, kl: Mapping[str, float], top1: Mapping[str, float], reference: str) -> None:
    """Draw each model's KL from the reference beside the share of tokens whose most likely next token differs."""
    differing = {name: 100 * (1 - share) for name, share in top1.items()}
    figure, axes = _axes(9, 0.45 * len(kl) + 1.2, 2)
    for ax, values, form, title in (
        (axes[0][0], kl, " {:.4f}", f"KL({reference} ‖ model), nats per token"),
        (axes[0][1], differing, " {:.2f} %", f"most likely token differs from {reference}, %"),
    ):
        ax.barh(list(values), list(values.values()), color=BLUE)
        for i, value in enumerate(values.values()):
            ax.text(value, i, form.format(value), va="center", fontsize=8)
        ax.invert_yaxis()
        ax.set_title(title, fontsize=10)
        ax.margins(x=0.18)
        ax.locator_params(axis="x", nbins=5)
    axes[0][1].set_yticklabels([])
    _save(figure, path)


# --- SpinQuant -------------------------------------------------------------------------------------------------------


def plot_selection(path: Path, kl: Mapping[str, tuple[float, float]], chosen: str) -> None:
    """Draw each candidate's KL on the selection text with its 95 % interval; the one that ships is coloured."""
    figure, axes = _axes(7, 0.4 * len(kl) + 1.2)
    ax, names = axes[0][0], list(kl)
    values, errors = [kl[n][0] for n in names], [kl[n][1] for n in names]
    ax.barh(names, values, xerr=errors, color=[BLUE if n == chosen else GREY for n in names], error_kw={"linewidth": 1})
    for i, (value, error) in enumerate(zip(values, errors, strict=True)):
        ax.text(value + error, i, f" {value:.2e}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.set_xlabel(f"KL from BF16, nats per token (lower is better; lines: 95 %)\nblue: ships ({chosen})")
    _save(figure, path)


def plot_outliers(path: Path, before: Mapping[str, list[float]], after: Mapping[str, list[float]]) -> None:
    """Draw largest magnitude over root mean square by layer, a panel per kind of value, before and after rotating."""
    figure, axes = _axes(3.6 * len(before), 3.0, len(before))
    for ax, title in zip(axes[0], before, strict=True):
        ax.plot(before[title], color=GREY, marker="o", markersize=3, label="not rotated")
        ax.plot(after[title], color=BLUE, marker="o", markersize=3, label="rotated")
        ax.set(xlabel="layer", ylim=(0, None))
        ax.set_title(title, fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("largest / root mean square")
    axes[0][0].legend(frameon=False)
    _save(figure, path)


def plot_layer_errors(path: Path, curves: Mapping[str, list[float]]) -> None:
    """Draw the relative squared error of the linears' outputs, a mean per layer; a curve per way of rounding."""
    figure, axes = _axes(7, 3.2)
    ax = axes[0][0]
    for color, (label, values) in zip((GREY, ORANGE, BLUE, GREEN), curves.items(), strict=False):
        ax.plot([100 * v for v in values], color=color, marker="o", markersize=3, label=label)
    ax.set(xlabel="layer", ylabel="squared error of linears' outputs, %", ylim=(0, None))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False)
    _save(figure, path)


# --- what was measured beyond the scores -----------------------------------------------------------------------------


def plot_blocks(path: Path, errors: Mapping[str, list[float]]) -> None:
    """Draw the relative error of the residual stream after each block, a curve per hand-over."""
    figure, axes = _axes(7, 3.2)
    ax = axes[0][0]
    for color, (label, values) in zip((BLUE, ORANGE, GREEN), errors.items(), strict=False):
        if any(values):
            ax.plot(range(len(values)), values, color=color, marker="o", markersize=4, label=label)
        else:
            ax.plot([], [], color=color, label=f"{label}: 0 in every block")
    ax.margins(y=0.1)
    ax.set_ylim(bottom=0)
    ax.set(xlabel="block", ylabel="‖difference‖ / ‖residual stream‖")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False)
    _save(figure, path)


def plot_speed(path: Path, panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """Draw title with unit → model → median and quartiles: a panel each, three in a row, bars from 0."""
    models, rows = list(next(iter(panels.values()))), -(-len(panels) // 3)
    figure, axes = _axes(10, rows * (0.4 * len(models) + 1.1), 3, rows)
    for i, (title, values) in enumerate(panels.items()):
        ax = axes[i // 3][i % 3]
        middle = [values[m][0] for m in models]
        spread = [[values[m][0] - values[m][1] for m in models], [values[m][2] - values[m][0] for m in models]]
        ax.barh(models, middle, xerr=spread, color=BLUE, error_kw={"linewidth": 1})
        for at, (value, above) in enumerate(zip(middle, spread[1], strict=True)):
            text = f" {value:,.3g}" if value < 1000 else f" {value:,.0f}"
            ax.text(value + above, at, text, va="center", fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.3)
        ax.set_title(title, fontsize=10)
        ax.tick_params(axis="x", labelsize=8)
        ax.locator_params(axis="x", nbins=4)
        if i % 3:
            ax.set_yticklabels([])
    _save(figure, path)


def plot_sensitivity(
    path: Path, alone: Mapping[str, float], saved: Mapping[str, float], linears: Sequence[str]
) -> None:
    """Draw two heat maps, linears by blocks: KL if only this one is quantized, KL saved if only this one is not."""
    depth = 1 + max(int(unit.split(".")[1]) for unit in alone if unit.startswith("layers."))
    figure, axes = _axes(max(9, 0.55 * depth + 5), 3.4, 2)
    for ax, values, title in ((axes[0][0], alone, "quantized alone"), (axes[0][1], saved, "left out: saved")):
        grid = [[values[f"layers.{i}.{kind}"] for i in range(depth)] for kind in linears]
        image = ax.imshow(grid, aspect="auto", **_colors([v for row in grid for v in row]))
        ax.set_yticks(range(len(linears)), linears if ax is axes[0][0] else [])
        ax.set_xticks(range(0, depth, max(1, depth // 8)))
        ax.set_xlabel("block")
        rest = [v for unit, v in values.items() if not unit.startswith("layers.")]
        ax.set_title(f"{title}\nembedding and head: {rest[0]:.1e}", fontsize=10)
        figure.colorbar(image, ax=ax, label="KL, nats per token")
    _save(figure, path)


def _colors(values: list[float]) -> dict[str, Any]:
    """Choose colours and their scale: logarithmic for positive values, else symmetric, with white at zero."""
    from matplotlib.colors import LogNorm, TwoSlopeNorm

    top, least = max(map(abs, values)) or 1.0, min(values)
    if least > 0:
        return {"cmap": "viridis", "norm": LogNorm(least, max(top, 2 * least))}
    return {"cmap": "RdBu_r", "norm": TwoSlopeNorm(0, -top, top)}


def plot_tasks(path: Path, values: Mapping[tuple[str, str], Mapping[str, tuple[float, float]]]) -> None:
    """Draw (task, metric) → model → value and standard error: a panel per metric, a colour per model.

    Metrics have panels of their own because each has its own unit. A panel is as high as it has tasks.
    """
    import matplotlib

    models = list(dict.fromkeys(m for row in values.values() for m in row))
    metrics = Counter(metric for _, metric in values)
    height, colormap = 0.8 / len(models), matplotlib.colormaps["viridis"]
    high = 0.2 * len(models) * len(values) + 0.6 * len(metrics)
    figure, axes = _axes(7, high, rows=len(metrics), heights=list(metrics.values()))
    for (ax,), metric in zip(axes, metrics, strict=True):
        panel = {task: row for (task, m), row in values.items() if m == metric}
        for i, model in enumerate(models):
            bars = [
                (at + (i + 0.5) * height - 0.4, *row[model]) for at, row in enumerate(panel.values()) if model in row
            ]
            where, lengths, errors = [list(column) for column in zip(*bars, strict=True)] or [[], [], []]
            look = {"color": colormap(i / max(1, len(models) - 1)), "label": model, "error_kw": {"linewidth": 1}}
            ax.barh(where, lengths, height, xerr=errors, **look)
        ax.set_yticks(range(len(panel)), list(panel))
        ax.invert_yaxis()
        ax.set(xlabel=metric, xlim=(0, None))
    axes[-1][0].set_xlabel(f"{list(metrics)[-1]} (lines: one standard error)")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


# --- figures ---------------------------------------------------------------------------------------------------------


def _axes(
    width: float, height: float, columns: int = 1, rows: int = 1, heights: list[int] | None = None
) -> tuple[Any, Any]:
    """Return a figure of so many inches and its panels [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "figure.dpi": 150})
    return plt.subplots(
        rows, columns, figsize=(width, height), height_ratios=heights, squeeze=False, layout="constrained"
    )


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path)
    plt.close(figure)
