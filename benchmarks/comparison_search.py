"""The search for each arm's learning rate: finished runs of the search in, one factor an arm out, with all that was
tried.

Every arm gets the same grid, factors of the config's `optim.lr`, and the same seeds, none of which is reported. It is
chosen by Avg@k on the eval split at the end of training; the tasks that are reported are not played.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.comparison import Curve
from benchmarks.comparison_runs import Run
from benchmarks.pages import markdown_table


@dataclasses.dataclass(frozen=True)
class Choice:
    """Of one arm. by_factor: factor -> Avg@k of the eval tasks after training, one value a seed, in [0, 1]."""

    factor: float
    by_factor: Mapping[float, Sequence[float]]

    @property
    def at_edge(self) -> bool:
        """Whether the best is the grid's first or last: one beyond might be better."""
        return self.factor in (min(self.by_factor), max(self.by_factor)) and len(self.by_factor) > 1


def choose(searched: Sequence[Mapping], factors: Sequence[float], seeds: Sequence[int]) -> dict[str, Choice]:
    """For each arm whose search is finished, the factor with the best mean over seeds; where several are level, the one
    with the best mean over all evaluations, then the one nearest to 1.
    """
    finished = {Run.of(run): Curve.of(run).value for run in searched if run["status"] == "finished"}
    choices = {}
    for arm in dict.fromkeys(run.arm for run in finished):
        runs = {factor: [finished.get(Run(arm, seed, factor)) for seed in seeds] for factor in factors}
        curves = {factor: [curve for curve in of_factor if curve is not None] for factor, of_factor in runs.items()}
        if any(len(of_factor) < len(seeds) for of_factor in curves.values()):
            continue

        def worth(factor: float, curves=curves) -> tuple[float, float, float]:
            last, all_through = (np.mean([pick(c) for c in curves[factor]]) for pick in (lambda c: c[-1], np.mean))
            return round(float(last), 9), round(float(all_through), 9), -abs(np.log(factor))

        best = max(factors, key=worth)
        choices[arm] = Choice(best, {factor: [float(curve[-1]) for curve in curves[factor]] for factor in factors})
    return choices


def table(choices: Mapping[str, Choice], labels: Mapping[str, str], lr: float, seeds: Sequence[int]) -> str:
    """All that was tried, %: an arm a row, a factor a column, the chosen one in bold."""
    factors = sorted({factor for choice in choices.values() for factor in choice.by_factor})
    rows = []
    for arm, choice in choices.items():
        cells = [
            f"{'**' if factor == choice.factor else ''}{100 * float(np.mean(values)):.1f}"
            f"{'**' if factor == choice.factor else ''}"
            for factor, values in sorted(choice.by_factor.items())
        ]
        rows.append([labels.get(arm, arm), *cells, f"{choice.factor * lr:g}", "at its edge" if choice.at_edge else ""])
    header = ["arm", *(f"x {factor:g}" for factor in factors), "`optim.lr`", "best of the grid"]
    caption = (
        f"Avg@k on the eval split after training, %, with `optim.lr` = {lr:g} x a factor, seed"
        f" {', '.join(map(str, seeds))} (not reported): the best factor is the arm's. No reported task was played."
    )
    return f"{caption}\n\n{markdown_table(header, rows)}"
