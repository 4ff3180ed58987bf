"""Does it matter where feedback is placed? Failed episodes are replayed up to the step that broke them, the feedback is
put in there, or at the start, or not at all, and the policy goes on from there.

  python -m benchmarks.placement                                               Desk, the embedded policy
  python -m benchmarks.placement --config=bfcl_qwen3_4b_clean --policy=DIR     any environment that a config names

Every target of every failed rollout of the test tasks is continued in each of these ways, with the same sampling keys:

none         from the target, without feedback
start        from the target, the feedback after the first user message
target       from the target, the feedback just before it
retry        from the beginning, without feedback
retry_start  from the beginning, the feedback after the first user message

The HINT-SD paper (arXiv 2605.17873), on BFCL: +2.68 points with feedback at the start, +8.67 at the target.
Writes benchmarks/results/placement_<environment>.md and .json, and its table between the markers of
docs/attribution.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import hindsight_setup
from benchmarks.hindsight_setup import ANALYSERS, Setup, analyse
from benchmarks.pages import REPO, RESULTS, fill, markdown_table
from benchmarks.rates import percent, ratio
from hintsd_jax.config import build
from hintsd_jax.evaluate import EVAL_STEP
from hintsd_jax.hindsight.analysis import attribution
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.replay import Continuation, continue_episodes
from hintsd_jax.statistics import DIFFERENCE

PAGE = REPO / "docs/attribution.md"
BATCH = 512  # continuations at once; each has an environment in a thread of its own


class Arm(NamedTuple):
    """from_start: the policy begins again; else it goes on from the target. feedback: whether it reads any; position:
    where.
    """

    from_start: bool
    feedback: bool
    position: str


ARMS = {
    "none": Arm(False, False, "target"),
    "start": Arm(False, True, "start"),
    "target": Arm(False, True, "target"),
    "retry": Arm(True, False, "start"),
    "retry_start": Arm(True, True, "start"),
}
# Name of a gain -> the two arms whose success is compared.
GAINS = {
    "start - none": ("start", "none"),
    "target - none": ("target", "none"),
    "target - start": ("target", "start"),
    "retry_start - retry": ("retry_start", "retry"),
}

Pair = tuple[Episode, Target]


def continuations(arm: str, task: Mapping, pair: Pair, count: int, seed: int) -> list[Continuation]:
    """One target in one of the ways of `ARMS`."""
    (recorded, target), (from_start, with_feedback, position) = pair, ARMS[arm]
    step, name = 1 if from_start else target.step, f"placement {recorded.task_id} {recorded.rollout} {target.step}"
    message = target.feedback if with_feedback else ""
    return [
        Continuation(task, recorded, step, job_key(seed, 0, name, index), message, position, index)
        for index in range(count)
    ]


def play(setup: Setup, plans: Sequence[Continuation], dropped: Counter[str]) -> list[bool | None]:
    """Whether each continuation succeeds; None where it could not be played, counted in `dropped` by reason."""
    session, config = setup.policy, setup.config
    # Room for the feedback, in every arm.
    context = min(session.engine.config.context, config.rollout.context + config.hindsight.max_tokens)
    rollout = dataclasses.replace(build.rollout_config(config), context=context)
    params, timeout = session.weights(session.trained), config.env.call_timeout_s
    success: list[bool | None] = []
    for first in range(0, len(plans), BATCH):
        batch = plans[first : first + BATCH]
        episodes, reasons, _ = continue_episodes(
            session.engine, params, setup.chat, session.host, batch, rollout, call_timeout_s=timeout
        )
        dropped.update(reasons)
        success += [None if episode is None else episode.success for episode in episodes]
    return success


def measure(
    setup: Setup, name: str, tasks: Mapping[str, Mapping], failed: Sequence[Episode], count: int, seed: int
) -> dict:
    """All arms for the targets of one analyser. A target counts where every arm could be played; each failed episode
    weighs the same.
    """
    keyed = [(episode, job_key(seed, 0, f"placement {name} {episode.task_id}", episode.rollout)) for episode in failed]
    if name == "random":
        hindsight = analyse(setup, "policy", keyed, select="random", limit=1)
    else:
        hindsight = analyse(setup, name, keyed)
    pairs = [(analysis.episode, target) for analysis in hindsight.analyses for target in analysis.targets]
    dropped, success = Counter(hindsight.dropped), {}
    for arm in ARMS:
        plans = [plan for pair in pairs for plan in continuations(arm, tasks[pair[0].task_id], pair, count, seed)]
        played = play(setup, plans, dropped)
        success[arm] = [played[n : n + count] for n in range(0, len(played), count)]
        print(f"{name} {arm}: {len(plans)} continuations", flush=True)
    whole = [n for n in range(len(pairs)) if all(None not in success[arm][n] for arm in ARMS)]
    first: dict[int, int] = {}
    for episode, target in pairs:
        first[id(episode)] = min(target.step, first.get(id(episode), target.step))
    subsets = {
        "all targets": whole,
        "first targets": [n for n in whole if pairs[n][1].step == first[id(pairs[n][0])]],
        "targets that are the only true fault": [n for n in whole if _is_only_fault(*pairs[n])],
    }
    return {
        "episodes": len(failed),
        "targets": len(pairs),
        "dropped": dict(dropped),
        "attribution": attribution(hindsight.analyses),
        "subsets": {subset: _rates(pairs, success, members) for subset, members in subsets.items() if members},
    }


def _is_only_fault(episode: Episode, target: Target) -> bool:
    """Privileged: for reading the results, not for making them."""
    return {fault.step for fault in hindsight_setup.report_of(episode).faults or ()} == {target.step}


def _rates(pairs: Sequence[Pair], success: Mapping[str, Sequence[Sequence[bool]]], members: Sequence[int]) -> dict:
    """Success of each arm and the paired `GAINS`, with intervals over episodes."""
    by_episode: dict[int, list[int]] = {}
    for n in members:
        by_episode.setdefault(id(pairs[n][0]), []).append(n)
    mean = lambda arm, numbers: sum(sum(success[arm][n]) / len(success[arm][n]) for n in numbers) / len(numbers)
    rates = {arm: [mean(arm, numbers) for numbers in by_episode.values()] for arm in ARMS}
    gain = lambda arm, base: ratio([a - b for a, b in zip(rates[arm], rates[base], strict=True)], span=DIFFERENCE)
    return {
        "episodes": len(by_episode),
        "targets": len(members),
        "success": {arm: ratio(values) for arm, values in rates.items()},
        "gain": {name: gain(*arms) for name, arms in GAINS.items()},
    }


def table(results: Mapping[str, Mapping]) -> str:
    head = ["analyser", "targets", "episodes", "none", "start", "target", "start - none", "**target - none**"]
    head += ["target - start", "retry", "retry, start", "retry, start - retry"]
    lines = []
    for name, result in results.items():
        for subset, row in result["subsets"].items():
            rates = [f"{100 * rate['value']:.1f}" for rate in row["success"].values()]
            gains = [percent(gain, sign=True) for gain in row["gain"].values()]
            gains[1] = f"**{gains[1]}**"
            targets = f"{subset} ({row['targets']})"
            lines.append([name, targets, row["episodes"], *rates[:3], *gains[:3], *rates[3:], gains[3]])
    notes = []
    for name, result in results.items():
        rates = ", ".join(
            f"{measure} {value:.2f}" for measure, value in result["attribution"].items() if measure != "checked_targets"
        )
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(result["dropped"].items())) or "nothing"
        counted = f"{result['targets']} targets in {result['episodes']} failed episodes"
        notes.append(f"- {name}: {counted}; {rates or 'faults unknown'}; dropped: {dropped}")
    return "\n".join([markdown_table(head, lines, left=(0, 1)), "", *notes])


def main() -> None:
    about = f"some of {', '.join(ANALYSERS)}; random: the policy's feedback on a random step"
    parser = hindsight_setup.parser(__doc__ or "", about)
    parser.add_argument("--split", default="", help="by default the config's test split")
    parser.add_argument("--count", type=int, default=4, help="continuations of a target in each way")
    arguments = parser.parse_args()
    names, count = arguments.analysers.split(","), arguments.count
    config = hindsight_setup.load_config(arguments.config, arguments.policy, arguments.overrides, names)
    setup = hindsight_setup.open_setup(config, ["policy", *names])  # it plays, whoever analyses
    session, rollouts = setup.policy, config.tasks.rollouts
    split = arguments.split or config.tasks.test_split
    tasks = list(setup.tasks(split))[: arguments.limit or None]
    episodes, lost, *_ = session.play(session.weights(session.trained), tasks, rollouts, step=EVAL_STEP)
    failed = [episode for episode in episodes if not episode.success and episode.steps]
    print(f"{len(failed)} of {len(episodes)} rollouts failed; never began: {dict(lost)}", flush=True)
    by_id = {task["id"]: task for task in tasks}
    by_analyser = {name: measure(setup, name, by_id, failed, count, arguments.seed) for name in names}
    head = hindsight_setup.header(f"Placement: {config.env.name}", setup)
    head += f" {len(tasks)} tasks of {split} x {rollouts} rollouts, {len(failed)} failed; {count} continuations of each"
    head += " target. Success in %, 95 % intervals by bootstrap over failed episodes."
    if "environment" in names:
        head += f" environment ({ANALYSERS['environment']}) is a ceiling."
    text = table(by_analyser)
    results = {"tasks": len(tasks), "rollouts": len(episodes), "failed": len(failed), "count": count}
    out = arguments.out or RESULTS / f"placement_{config.env.name}"
    hindsight_setup.write(out, f"{head}\n\n{text}", results | {"analysers": by_analyser})
    if not arguments.out:
        fill(PAGE, f"placement_{config.env.name}", text)


if __name__ == "__main__":
    hindsight_setup.guarded(main)
