"""Summaries of runs in, SVG figures out. The same summaries give the same bytes; letters stay letters, for a small file
that can be searched.

OUT_steps.svg, OUT_time.svg, OUT_tokens.svg: success on the evaluation tasks against training steps, seconds of
training, tokens generated. OUT.svg, for the README: held-out Avg@k by arm with intervals and seeds, beside success
against seconds of training. Of `compare_horizons`: OUT.svg, differences against the length of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from benchmarks.comparison import Curve, Estimate, by_arm, level
from benchmarks.comparison_tables import plain

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hintsd_jax",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
# Colours that people with any kind of colour vision tell apart (Okabe and Ito), for what matters most; the rest is grey
# or repeats with dashes.
COLOURS = {
    "hint_sd": ("#d55e00", "-"),
    "openclaw_rl": ("#0072b2", "-"),
    "sdpo": ("#009e73", "-"),
    "grpo": ("#cc79a7", "-"),
    "rejection_sampling": ("#56b4e9", "-"),
    "sft": ("#56b4e9", "--"),
    "random": ("#e69f00", "-"),
    "hint_sd+grpo": ("#7a3b00", "-"),
    "hint_sd_single": ("#d55e00", "--"),
    "start": ("#d55e00", ":"),
    "random3": ("#e69f00", "--"),
    "environment": ("#222222", "--"),
    "oracle": ("#222222", ":"),
}
OTHERS = ("#8c8c8c", "-")
NOT_DRAWN = ("lr0",)  # a line without news
# The lines of the README's figure.
MAIN = ("hint_sd", "openclaw_rl", "sdpo", "grpo", "rejection_sampling", "hint_sd+grpo", "random", "environment")
AXES = {
    "steps": "training steps",
    "time": "seconds of training (without evaluation)",
    "tokens": "tokens generated (rollouts and feedback)",
}


def draw(runs: Sequence[Mapping], labels: Mapping[str, str], out: Path) -> list[Path]:
    """Writes the figures of the finished runs beside `out` (a path without suffix); returns their paths."""
    arms = {arm: seeds for arm, seeds in by_arm(runs).items() if arm not in NOT_DRAWN}
    paths = [progress(arms, axis, out.with_name(f"{out.name}_{axis}.svg")) for axis in AXES]
    return [*paths, overview(arms, labels, out.with_suffix(".svg"))]


def progress(arms: Mapping, axis: str, path: Path) -> Path:
    """Success during training against one of `AXES`, all arms."""
    with plt.rc_context(STYLE):
        height = 5
        figure, axes = plt.subplots(figsize=(8.2, height), layout="constrained")
        curves(axes, height, arms, axis)
        axes.set_xlabel(AXES[axis])
        return save(figure, path)


def overview(arms: Mapping, labels: Mapping[str, str], path: Path) -> Path:
    """The README's figure: where all arms end, and the main ones' success against seconds of training."""
    with plt.rc_context(STYLE):
        height = max(3.6, 0.27 * len(arms) + 0.9)
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained", width_ratios=(1.05, 1))
        dots(left, arms, labels)
        curves(right, height, {arm: arms[arm] for arm in MAIN if arm in arms} or arms, "time")
        right.set_xlabel(AXES["time"])
        return save(figure, path)


def against_horizon(
    differences: Mapping[str, Mapping[float, Estimate]], first: str, path: Path, called: str = "length"
) -> Path:
    """The first arm minus each other one (arm -> length -> estimate), points, against the length of tasks, or what it
    is called.
    """
    with plt.rc_context(STYLE):
        height = 4.2
        figure, axes = plt.subplots(figsize=(7.6, height), layout="constrained")
        last_points = []
        for n, (arm, by_length) in enumerate(differences.items()):
            colour, dash = COLOURS.get(arm, OTHERS)
            estimates = sorted(by_length.items())
            shift = 1 + 0.012 * (n - (len(differences) - 1) / 2)  # intervals stand beside each other
            x = np.array([length * shift for length, _ in estimates])
            mean, low, high = (
                100 * np.array([getattr(each, end) for _, each in estimates]) for end in ("mean", "low", "high")
            )
            axes.plot(x, mean, dash, color=colour, linewidth=1.6, marker="o", markersize=4)
            axes.vlines(x, low, high, color=colour, linewidth=1, alpha=0.6)
            last_points.append((arm, colour, x[-1], mean[-1]))
        lengths = sorted({length for by_length in differences.values() for length in by_length})
        axes.axhline(0, color="#8c8c8c", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlim(0.85 * lengths[0], 1.15 * lengths[-1])
        axes.set_xlabel(f"{called} of tasks")
        axes.set_ylabel(f"Avg@k of {first} minus it, points\nbars: 95 % intervals")
        name_lines(axes, height, last_points)
        return save(figure, path)


def save(figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path


def curves(axes: Axes, height: float, arms: Mapping, axis: str) -> None:
    """One line an arm, the mean over its seeds, with the seeds' range behind those that matter most; names at the
    last points. height: of the figure, inches.
    """
    last_points = []
    for arm, seeds in arms.items():
        each = [Curve.of(run) for run in seeds.values()]
        mean = Curve.mean(each)
        colour, dash = COLOURS.get(arm, OTHERS)
        x, y = getattr(mean, axis), 100 * mean.value
        axes.plot(
            x, y, dash, color=colour, linewidth=2.4 if arm == "hint_sd" else 1.4, zorder=3 if arm in COLOURS else 2
        )
        if arm == "hint_sd" and len(each) > 1:
            values_SE = 100 * np.array([curve.value[: len(x)] for curve in each])
            axes.fill_between(x, values_SE.min(axis=0), values_SE.max(axis=0), color=colour, alpha=0.12, linewidth=0)
        axes.plot(x[-1], y[-1], "o", color=colour, markersize=3.5, zorder=3)
        last_points.append((arm, colour, x[-1], y[-1]))
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.set_ylabel("success on the evaluation tasks, %")
    if axis != "steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    name_lines(axes, height, last_points)


def name_lines(axes: Axes, height: float, last_points: Sequence[tuple[str, str, float, float]]) -> None:
    """The arms' names in a column to the right, apart from each other, each tied to the end of its line.

    height: of the figure, inches.
    """
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    beside = right * (right / left) ** 0.06 if axes.get_xscale() == "log" else 1.06 * right
    gap = (top - bottom) * 1.25 * plt.rcParams["font.size"] / 72 / (0.78 * height)
    order = sorted(last_points, key=lambda point: point[3])
    places = spread([y for *_, y in order], gap, bottom, top)
    for (arm, colour, x, y), place in zip(order, places, strict=True):
        axes.annotate(
            arm,
            (x, y),
            xytext=(beside, place),
            color=colour,
            fontweight="bold" if arm == "hint_sd" else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 1,
                "alpha": 0.6,
                "relpos": (0, 0.5),
            },
        )
    axes.set_xlim(left, right)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending values moved as little as it takes to be `gap` apart, within [low, high] where they fit."""
    blocks: list[list[float]] = []  # each: sum of (value - place in the block x gap), members
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1:
            (above, members), (below, under) = blocks[-1], blocks[-2]
            if below / under + under * gap <= above / members:
                break
            blocks[-2:] = [[below + above - members * under * gap, under + members]]
    placed = []
    for total, members in blocks:
        start = min(max(total / members, low), high - (members - 1) * gap)
        placed += [start + n * gap for n in range(int(members))]
    for n in range(1, len(placed)):  # blocks that were pushed back inside may have met
        placed[n] = max(placed[n], placed[n - 1] + gap)
    return placed


def dots(axes: Axes, arms: Mapping, labels: Mapping[str, str]) -> None:
    """Avg@k after training, best above: the mean with its interval, each seed a small dot."""
    estimates = sorted(
        ((level(seeds, "after", "avg"), arm) for arm, seeds in arms.items()), key=lambda pair: pair[0].mean
    )
    for row, (estimate, arm) in enumerate(estimates):
        colour = COLOURS.get(arm, OTHERS)[0]
        axes.plot(
            [100 * estimate.low, 100 * estimate.high], [row, row], color=colour, linewidth=2, solid_capstyle="butt"
        )
        privileged = "PRIVILEGED" in labels.get(arm, "")
        axes.plot(
            100 * estimate.mean,
            row,
            "D" if privileged else "o",
            color=colour,
            markersize=7,
            markerfacecolor="white" if privileged else colour,
        )
        axes.plot(
            [100 * seed for seed in estimate.seeds], [row + 0.27] * len(estimate.seeds), ".", color=colour, markersize=4
        )
    before = 100 * float(np.mean([level(seeds, "before", "avg").mean for seeds in arms.values()]))
    axes.axvline(before, color="#8c8c8c", linewidth=1, linestyle=":")
    axes.annotate(
        "before", (before, len(estimates) - 0.45), color="#666666", ha="center", va="bottom", annotation_clip=False
    )
    axes.set_yticks(range(len(estimates)), [plain(labels.get(arm, arm)) for _, arm in estimates])
    for tick, (_, arm) in zip(axes.get_yticklabels(), estimates, strict=True):
        tick.set_color(COLOURS.get(arm, OTHERS)[0] if arm in COLOURS else "#555555")
        tick.set_fontweight("bold" if arm == "hint_sd" else "normal")
    axes.set_ylim(-0.6, len(estimates) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    k = len(next(iter(next(iter(arms.values())).values()))["after"]["success"][0])
    axes.set_xlabel(f"held-out Avg@{k} after training, %\nbars: 95 % intervals; small dots: seeds; hollow: privileged")
