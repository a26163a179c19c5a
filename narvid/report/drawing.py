"""The figures of figures.py drawn with matplotlib: colours, sizes, axes. The numbers are handed over.

Legend: B queries, V videos.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from narvid import InputError
from narvid.fusion import matrix_statistics
from narvid.metrics import text_to_video_ranks

WIDTH = 3.3  # inches: a column of the conference's two
HEIGHT = 1.75
# Okabe and Ito's colours, which the colour-blind can tell apart; the two views first.
BLUE, ORANGE, *MORE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"
COLOURS = (BLUE, ORANGE, *MORE)
MARKERS = "osD^vP*"
HEAT_ROWS = 100  # queries of the heat map at most: more than the print can show


def pyplot():
    """matplotlib, set for print; one sentence where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f"figures need matplotlib ({error}): pip install matplotlib") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7, "xtick.labelsize": 6, "ytick.labelsize": 6,
        "legend.fontsize": 6, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.6, "lines.linewidth": 1.0, "lines.markersize": 3, "xtick.major.width": 0.6,
        "ytick.major.width": 0.6, "pdf.fonttype": 42, "savefig.dpi": 300, "figure.constrained_layout.use": True,
        "text.parse_math": False})  # a captioner's or run's name is text, whatever it holds
    import matplotlib.pyplot as plt
    return plt


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Over seeds; the standard deviation of one is 0."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def draw_captioners(plt, found: dict[str, list[float]], bare: list[float]):
    """Figure 3: a row a captioner, its seeds as rings, mean and spread beside them."""
    order = sorted(found, key=lambda name: np.mean(found[name]))
    figure, axes = plt.subplots(figsize=(WIDTH, 0.55 + 0.22 * len(order)))
    for row, name in enumerate(order):
        mean, spread = mean_and_spread(found[name])
        axes.plot(found[name], [row] * len(found[name]), "o", mfc="none", mec=BLUE, mew=0.6, zorder=3)
        axes.errorbar(mean, row, xerr=spread or None, fmt="o", color=BLUE, capsize=2, elinewidth=0.8)
        text = f"{mean:.1f}" + (f" ± {spread:.1f}" if spread else "")
        axes.annotate(text, (mean, row), (0, 4), textcoords="offset points", ha="center", fontsize=6)
    if bare:
        axes.axvline(np.mean(bare), color=ORANGE, ls="--", label=f"without narration, {np.mean(bare):.1f}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28))
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.5, len(order) - 0.3)
    axes.margins(x=0.15)
    axes.set_xlabel("text-to-video R@1 (%)")
    return figure


def draw_distributions(plt, arrays: dict[str, np.ndarray]):
    """Figure 6: both views, own pairs as lines and others filled, as scored and standardised."""
    own = np.zeros(arrays["S_qv"].shape, dtype=bool)  # (B, V) True = the query's own video
    own[np.arange(len(own)), arrays["video_of_query"]] = True
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, HEIGHT + 0.25))
    for ax, title in zip(axes, ("as scored", "standardised (Eq. 11)")):
        shown = {}
        for name in ("S_qv", "S_qn"):
            mean, std = matrix_statistics(torch.from_numpy(arrays[name])) if ax is axes[1] else (0.0, 1.0)
            shown[name] = (arrays[name].astype(np.float64) - mean) / (std or 1.0)  # a constant matrix has none
        low, high = min(x.min() for x in shown.values()), max(x.max() for x in shown.values())
        bins = np.linspace(low, high if high > low else low + 1, 41)
        for colour, (name, s) in zip((BLUE, ORANGE), shown.items()):
            ax.hist(s[~own], bins, density=True, color=colour, alpha=0.35, lw=0, label=f"{name}, other videos")
            ax.hist(s[own], bins, density=True, histtype="step", color=colour, label=f"{name}, own video")
        ax.set_title(title)
        ax.set_xlabel("similarity" if ax is axes[0] else "standard deviations")
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    axes[0].set_ylabel("density")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_sweeps(plt, sweeps: dict[str, list], same: set[str]):
    """Figure 7: a panel a flag, a line a set of runs that differ in it alone; `same`: flags that no label names."""
    figure, axes = plt.subplots(1, len(sweeps), figsize=(WIDTH, HEIGHT), sharey=True, squeeze=False)
    for ax, (flag, lines) in zip(axes[0], sweeps.items()):
        configs = [config for config, _ in lines]
        differing = [k for k in sorted(configs[0]) if k not in (flag, *same)
                     and len({json.dumps(config.get(k)) for config in configs}) > 1]
        for i, (config, found) in enumerate(lines):
            mean, spread = np.array([mean_and_spread(values) for values in found.values()]).T
            label = ", ".join(f"{GREEK.get(k, k)} = {config.get(k)}" for k in differing)
            ax.errorbar([*found], mean, yerr=spread if spread.any() else None, color=COLOURS[i % len(COLOURS)],
                        marker=MARKERS[i % len(MARKERS)], capsize=2, elinewidth=0.8, label=label)
        ax.set_xlabel(GREEK[flag])
        ax.margins(0.12)
        if differing:
            ax.legend()
    axes[0][0].set_ylabel("text-to-video R@1 (%)")
    return figure


GREEK = {"lam": "λ", "eta": "η", "alpha": "α"}


def draw_curves(plt, losses: dict[str, list], chosen: list[tuple[int, float]], split: str):
    """Losses over steps and, where a split chose the epoch, its R@1."""
    figure, axes = plt.subplots(1, 2 if chosen else 1, figsize=(WIDTH, HEIGHT), squeeze=False)
    for i, (name, line) in enumerate(losses.items()):
        axes[0][0].plot(*zip(*line), color="black" if name == "loss" else COLOURS[(i - 1) % len(COLOURS)],
                        ls="-" if name == "loss" else "--", label=name)
    axes[0][0].set_ylabel("loss")
    axes[0][0].legend()
    if chosen:
        axes[0][1].plot(*zip(*chosen), color=BLUE, marker="o")
        axes[0][1].set_ylabel(f"R@1 on {split} (%)")
    for ax in axes[0]:
        ax.set_xlabel("step")
        ax.set_ylim(bottom=0)
    return figure


def draw_heatmap(plt, arrays: dict[str, np.ndarray]):
    """Both matrices, one query of each of at most HEAT_ROWS videos, own pairs on the diagonal."""
    videos, queries = np.unique(arrays["video_of_query"], return_index=True)
    some = np.unique(np.linspace(0, len(videos) - 1, min(HEAT_ROWS, len(videos))).astype(int))
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, HEIGHT + 0.15))
    for ax, name in zip(axes, ("S_qv", "S_qn")):
        image = ax.imshow(arrays[name][np.ix_(queries[some], videos[some])], cmap="cividis", interpolation="nearest")
        ax.set_title(f"{name}, R@1 {own_recall(arrays, name):.1f}")
        ax.set_xlabel("video")
        ax.set_xticks([])
        ax.set_yticks([])
        bar = figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
    axes[0].set_ylabel("query")
    return figure


def own_recall(arrays: dict[str, np.ndarray], name: str) -> float:
    """Text-to-video R@1 of one whole matrix, in percent."""
    return float(100 * np.mean(text_to_video_ranks(arrays[name], arrays["video_of_query"]) == 1))
