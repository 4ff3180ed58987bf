"""Algorithms against the length of tasks: the arms of `compare_algorithms` at several lengths, and how far the first
arm is ahead of each other one at each.

  python -m benchmarks.compare_horizons --lengths=4,8,16 --arms=hint_sd,openclaw_rl,grpo,random
  python -m benchmarks.compare_horizons --lengths=4,8,16 --read --collected=benchmarks/results/compare_horizons_16.json
  python -m benchmarks.compare_horizons --config=textworld --length-key=env.options.quest_length --lengths=1,2,4

All options of `compare_algorithms` hold at every length, the search for learning rates (--search-lr) too. Steps,
contexts and buckets that a config gives a number grow with the length (`FOLLOWING`); what is given as an override
stands at every length. Runs are in WORKDIR/<length>/; each length has its own page beside OUT. Exit status as that of
`compare_algorithms`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare_algorithms, comparison_tables
from benchmarks.compare_algorithms import LABELS, Found
from benchmarks.comparison import Estimate, by_arm, contrast, level, mean_of, read_summaries
from benchmarks.comparison_runs import Runner
from benchmarks.comparison_settings import edge_of
from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.config.edge import flatten

# Settings that are in proportion to the length of a task, where the config gives a number; open ones are derived.
FOLLOWING = (
    "env.options.difficulty",  # of Desk: how many of a task's requests are decisions
    "rollout.max_steps",
    "rollout.context",
    "hindsight.max_tokens",  # the embedded policy's reviews go through all steps
    "hindsight.context",
    "hindsight.max_trajectory_chars",
    "batch.length_buckets",
    "batch.whole_episode_buckets",
)
_COUNTS = ("env.options.difficulty", "rollout.max_steps")  # not rounded up to whole 8

Lengths = Mapping[int, Mapping[str, Mapping[int, Mapping]]]  # length -> arm -> seed -> run


def word_of(key: str) -> str:
    """What a length is called in tables and figures: "length", or Desk's "difficulty"."""
    return key.rpartition(".")[2].replace("_", " ")


def own_length(config: str, key: str) -> int:
    """The length of a config's tasks. Raises SystemExit where it has no such key, or no number there."""
    own = flatten(edge_of(config, {})).get(key)
    if not isinstance(own, int) or own < 1:
        raise SystemExit(f"error: --length-key={key}: config {config} gives {own!r} there, no length")
    return own


def overrides_at(config: str, key: str, length: int) -> list[str]:
    """What makes a config one of tasks of this length; nothing where they have it already, so that runs of
    `compare_algorithms` are those of the config's own length.

    Raises:
      SystemExit: as `own_length`.
    """
    values, own = flatten(edge_of(config, {})), own_length(config, key)
    if length == own:
        return []

    def scaled(value: int, name: str) -> int:
        return math.ceil(value * length / own) if name in _COUNTS else 8 * math.ceil(value * length / own / 8)

    changes: dict[str, Any] = {key: length}
    for name in FOLLOWING:
        value = values.get(name)
        if isinstance(value, tuple | list) and value:
            changes[name] = f"({','.join(str(scaled(each, name)) for each in value)},)"
        elif isinstance(value, int) and value:
            changes[name] = scaled(value, name)
    return [f"{name}={value}" for name, value in changes.items()]


def differences(by_length: Lengths, measure: str = "avg") -> dict[str, dict[int, Estimate]]:
    """The first arm minus each other one: arm -> length -> estimate; only where both have a seed in common."""
    found: dict[str, dict[int, Estimate]] = {}
    for length, arms in by_length.items():
        first = next(iter(arms))
        for arm, seeds in arms.items():
            minus = None if arm == first else contrast(arms[first], seeds, measure)
            if minus is not None:
                found.setdefault(arm, {})[length] = minus
    return found


def page(by_length: Lengths, key: str) -> str:
    """The whole Markdown page.

    Raises:
      SystemExit: the first arm is missing at a length, or runs of a length cannot be compared.
    """
    first = next(iter(next(iter(by_length.values()))))
    if lacking := [str(length) for length, arms in by_length.items() if next(iter(arms)) != first]:
        raise SystemExit(f"error: {first} has no finished run at length {', '.join(lacking)}: everything is minus it")
    settings = {
        length: comparison_tables.check_same([run for seeds in arms.values() for run in seeds.values()])
        for length, arms in by_length.items()
    }
    some = next(iter(by_length[max(by_length)][first].values()))
    word = word_of(key)
    header = ["arm", *(f"{word} {length}" for length in by_length)]
    names = list(dict.fromkeys(arm for arms in by_length.values() for arm in arms))
    ahead = differences(by_length)
    seeds_at = lambda length, arm: len(by_length[length].get(arm, {}))
    cell = lambda length, arm, text: text(by_length[length][arm]) if arm in by_length[length] else ""

    def rows(text) -> list[list[str]]:
        return [[LABELS.get(arm, arm), *(cell(length, arm, text) for length in by_length)] for arm in names]

    before = [level(arms[first], "before", "avg").text() for arms in by_length.values()]
    minus = [
        [LABELS.get(arm, arm), *(of_arm[length].text("+") if length in of_arm else "" for length in by_length)]
        for arm, of_arm in ahead.items()
    ]
    step = lambda seeds: f"{mean_of(seeds, 'time/step'):.2f}"
    lines = [f"- {word} {length}: `{' '.join(f'{k}={v}' for k, v in of.items())}`" for length, of in settings.items()]
    counts = [[LABELS.get(arm, arm), *(str(seeds_at(length, arm) or "") for length in by_length)] for arm in names]
    counted = {len(next(iter(arms[first].values()))["after"]["success"]) for arms in by_length.values()}
    tasks = " or ".join(map(str, sorted(counted)))
    return (
        "\n\n".join(
            [
                f"# Algorithms against the horizon: {some['config']}",
                f"Tasks by their `{key}`. Held-out Avg@k, %, on {tasks} tasks at each {word}."
                f" {comparison_tables.INTERVALS}",
                f"## `{first}` minus each, points\n\n{markdown_table(header, minus)}",
                "## Success after training, %\n\n"
                + markdown_table(
                    header, [["before training", *before], *rows(lambda s: level(s, "after", "avg").text())]
                ),
                f"## Seeds\n\n{markdown_table(header, counts)}",
                f"## Seconds of a training step\n\n{comparison_tables.where(_all(by_length))}\n\n"
                + markdown_table(header, rows(step)),
                "Settings at each length; the arms' own are on its page:\n\n" + "\n".join(lines),
            ]
        )
        + "\n"
    )


def _all(by_length: Lengths) -> list[Mapping]:
    return [run for arms in by_length.values() for seeds in arms.values() for run in seeds.values()]


def at_length(arguments: argparse.Namespace, length: int) -> argparse.Namespace:
    """The options of `compare_algorithms` for one length; the user's overrides win."""
    changed = argparse.Namespace(**vars(arguments))
    changed.overrides = [*overrides_at(arguments.config, arguments.length_key, length), *arguments.overrides]
    changed.workdir = arguments.workdir / str(length)
    changed.out = arguments.out.with_name(f"{arguments.out.name}_{length}")
    return changed


def main() -> None:
    options = compare_algorithms.parser(__doc__)
    options.add_argument("--lengths", default="4,8,16", help="of tasks")
    options.add_argument("--length-key", default="env.options.length", help="the key of the config that sets it")
    options.add_argument("--workdir", type=Path, default=Path("runs/compare_horizons"))
    options.add_argument("--out", type=Path, default=RESULTS / "compare_horizons", help="without a suffix")
    arguments = options.parse_intermixed_args()
    lengths = sorted(set(compare_algorithms.numbers(arguments.lengths, int, "--lengths")))
    if not lengths or lengths[0] < 1:
        raise SystemExit(f"error: --lengths={arguments.lengths}: give lengths above 0")
    collected, runner = read_summaries(arguments.collected), Runner(arguments)
    found: dict[int, Found] = {}
    own = str(own_length(arguments.config, arguments.length_key))
    for length in lengths:
        of_length = [run for run in collected if run["settings"].get(arguments.length_key, own) == str(length)]
        found[length] = compare_algorithms.carry_out(at_length(arguments, length), of_length, runner)
        print(f"length {length}: {found[length].left} runs are left, {found[length].failed} of them failed", flush=True)
    runs = [run for each in found.values() for run in (*each.runs, *each.searched)]
    if arguments.collect:
        arguments.collect.parent.mkdir(parents=True, exist_ok=True)
        arguments.collect.write_text(comparison_tables.to_json(runs))
    by_length = {length: arms for length, each in found.items() if (arms := by_arm(each.runs))}
    if by_length:
        for length in by_length:
            compare_algorithms.write(at_length(arguments, length), found[length])
        write(arguments, by_length, runs)
    sys.exit(max((each.status for each in found.values()), key=(0, 75, 1).index))


def write(arguments: argparse.Namespace, by_length: Lengths, runs: Sequence[Mapping]) -> None:
    """The page, the results of all lengths as one file, and the figure."""
    text = page(by_length, arguments.length_key)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text)
    arguments.out.with_suffix(".json").write_text(comparison_tables.to_json(runs))
    print(text)
    ahead = differences(by_length)
    figures = compare_algorithms.figures()
    if figures and ahead:
        figures.against_horizon(
            ahead,
            next(iter(next(iter(by_length.values())))),
            arguments.out.with_suffix(".svg"),
            word_of(arguments.length_key),
        )


if __name__ == "__main__":
    main()
