"""Does it matter where feedback is placed? Failed episodes are replayed up to the step that broke them, the feedback is
put in there, or at the start, or not at all, and the policy goes on from there.

  python -m benchmarks.placement                                             Desk, the embedded policy
  python -m benchmarks.placement --config=configs/bfcl_qwen3_4b_clean.py --policy=DIR      any environment that a config
  names

Every target of every failed rollout of the test tasks is continued in each of these ways, with the same sampling keys:

none     from the target, without a word
start    from the target, the feedback after the first user message
target   from the target, the feedback just before it
redo     from the beginning, without a word: what another try gives
advised  from the beginning, the feedback after the first user message

The HINT-SD paper (arXiv 2605.17873), on BFCL: +2.68 points with feedback at the start, +8.67 at the target.
Writes benchmarks/results/placement_<environment>.md and .json, and its table between the markers of
docs/attribution.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.looking_back import (
    ANALYSERS,
    fill,
    guarded,
    header,
    load_config,
    look_back,
    open_session,
    parser,
    percent,
    ratio,
    write,
)
from hintsd_jax.evaluate import EVAL_STEP
from hintsd_jax.hindsight.analyser import attribution
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.replay import Continuation, continue_episodes
from hintsd_jax.session import Session

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs/attribution.md"
ARMS = {  # (from the beginning, feedback, where)
    "none": (False, False, "target"),
    "start": (False, True, "start"),
    "target": (False, True, "target"),
    "redo": (True, False, "start"),
    "advised": (True, True, "start"),
}
BATCH = 512  # continuations at once; each has an environment in a thread of its own

Pair = tuple[Episode, Target]


def continuations(arm: str, task: Mapping, pair: Pair, count: int, seed: int) -> list[Continuation]:
    """One target in one of the ways of `ARMS`."""
    (recorded, target), (afresh, told, place) = pair, ARMS[arm]
    step, name = 1 if afresh else target.step, f"placement {recorded.task_id} {recorded.rollout} {target.step}"
    message = target.feedback if told else ""
    return [
        Continuation(task, recorded, step, job_key(seed, 0, name, index), message, place, index)
        for index in range(count)
    ]


def play(session: Session, plans: Sequence[Continuation], dropped: Counter) -> list[bool | None]:
    """Whether each continuation succeeds; None where it could not be played, counted in `dropped` by reason."""
    config, found, rollout = session.config, [], session.rollout_config()
    room = min(
        session.engine.config.context, rollout.context + config.hindsight.max_tokens
    )  # for the feedback, in every arm
    rollout = dataclasses.replace(rollout, context=room)
    make_env = partial(session.env_class, **config.env.options.to_dict())
    for first in range(0, len(plans), BATCH):
        part, reasons, _ = continue_episodes(
            session.engine, session.weights(session.trained), session.chat, make_env, plans[first : first + BATCH], rollout,
            call_timeout_s=config.env.call_timeout_s,
        )  # fmt: skip
        dropped.update(reasons)
        found += [None if episode is None else episode.success for episode in part]
    return found


def measure(
    session: Session, name: str, tasks: Mapping[str, Mapping], failed: Sequence[Episode], count: int, seed: int
) -> dict:
    """All arms for the targets of one analyser. A target counts where every arm could be played; each failed episode
    weighs the same.
    """
    keyed = [(episode, job_key(seed, 0, f"placement {name} {episode.task_id}", episode.rollout)) for episode in failed]
    looked = look_back(session, "policy", keyed, "random", 1) if name == "random" else look_back(session, name, keyed)
    pairs = [(analysis.episode, target) for analysis in looked.analyses for target in analysis.targets]
    dropped, success = Counter(looked.dropped), {}
    for arm in ARMS:
        plans = [plan for pair in pairs for plan in continuations(arm, tasks[pair[0].task_id], pair, count, seed)]
        played = play(session, plans, dropped)
        success[arm] = [played[n : n + count] for n in range(0, len(played), count)]
        print(f"{name} {arm}: {len(plans)} continuations", flush=True)
    whole = [n for n in range(len(pairs)) if all(None not in success[arm][n] for arm in ARMS)]
    first: dict[int, int] = {}
    for episode, target in pairs:
        first[id(episode)] = min(target.step, first.get(id(episode), target.step))
    subsets = {
        "all targets": whole,
        "first targets": [n for n in whole if pairs[n][1].step == first[id(pairs[n][0])]],
        "targets that are the only true fault": [n for n in whole if _only_fault(*pairs[n])],
    }
    return {
        "episodes": len(failed),
        "targets": len(pairs),
        "dropped": dict(dropped),
        "attribution": attribution(looked.analyses),
        "subsets": {subset: _rates(pairs, success, members) for subset, members in subsets.items() if members},
    }


def _only_fault(episode: Episode, target: Target) -> bool:
    """Privileged: for reading the results, not for making them."""
    faults = None if episode.report is None else episode.report.faults
    return bool(faults) and {fault.step for fault in faults} == {target.step}


def _rates(pairs: Sequence[Pair], success: Mapping[str, Sequence[Sequence[bool]]], members: Sequence[int]) -> dict:
    """Success of each arm and gains over "none" (from the target) or "redo" (from the beginning), paired, with
    intervals over episodes.
    """
    of: dict[int, list[int]] = {}
    for n in members:
        of.setdefault(id(pairs[n][0]), []).append(n)
    mean = lambda arm, found: sum(sum(success[arm][n]) / len(success[arm][n]) for n in found) / len(found)
    rates = {arm: [mean(arm, found) for found in of.values()] for arm in ARMS}
    gain = lambda arm, base: ratio([a - b for a, b in zip(rates[arm], rates[base], strict=True)])
    gains = {"start": gain("start", "none"), "target": gain("target", "none"), "advised": gain("advised", "redo")}
    gains["target over start"] = gain("target", "start")
    return {
        "episodes": len(of),
        "targets": len(members),
        "success": {arm: ratio(values) for arm, values in rates.items()},
        "gain": gains,
    }


def table(results: Mapping[str, Mapping]) -> str:
    head = [
        "none",
        "start",
        "target",
        "start - none",
        "**target - none**",
        "target - start",
        "redo",
        "advised",
        "advised - redo",
    ]
    lines = [f"| analyser | targets | episodes | {' | '.join(head)} |", f"|---|---|--:|{'--:|' * len(head)}"]
    for name, found in results.items():
        for subset, row in found["subsets"].items():
            rates = {arm: f"{100 * rate['value']:.1f}" for arm, rate in row["success"].items()}
            gains = {arm: percent(gain, sign=True) for arm, gain in row["gain"].items()}
            cells = [
                name,
                f"{subset} ({row['targets']})",
                str(row["episodes"]),
                rates["none"],
                rates["start"],
                rates["target"],
            ]
            cells += [
                gains["start"],
                f"**{gains['target']}**",
                gains["target over start"],
                rates["redo"],
                rates["advised"],
                gains["advised"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, found in results.items():
        rates = ", ".join(f"{key.rpartition('/')[2]} {value:.2f}" for key, value in found["attribution"].items())
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(found["dropped"].items())) or "nothing"
        counted = f"{found['targets']} targets in {found['episodes']} failed episodes"
        lines.append(f"- {name}: {counted}; {rates or 'faults unknown'}; dropped: {dropped}")
    return "\n".join(lines)


def main() -> None:
    arguments_of = parser(__doc__, f"some of {', '.join(ANALYSERS)}; random: the policy's words about a random step")
    arguments_of.add_argument("--split", default="", help="by default the config's test split")
    arguments_of.add_argument("--count", type=int, default=4, help="continuations of a target in each way")
    arguments = arguments_of.parse_args()
    config = load_config(arguments.config, arguments.policy, arguments.overrides)
    names = arguments.analysers.split(",")
    session = open_session(config, ["policy", *names])  # it plays, whoever looks back
    config = session.config
    split = arguments.split or config.tasks.test_split
    tasks = list(session.tasks(split))[: arguments.limit or None]
    episodes, lost, _ = session.play(session.weights(session.trained), tasks, config.tasks.rollouts, step=EVAL_STEP)
    failed = [episode for episode in episodes if not episode.success and episode.steps]
    print(f"{len(failed)} of {len(episodes)} rollouts failed; never began: {dict(lost)}", flush=True)
    by_id = {task["id"]: task for task in tasks}
    found = {name: measure(session, name, by_id, failed, arguments.count, arguments.seed) for name in names}
    privileged = ", ".join(f"{name} ({ANALYSERS[name]})" for name in names if name == "environment")
    head = header(f"Placement: {config.env.name}", config, session)
    said = f" {len(tasks)} tasks of {split} x {config.tasks.rollouts} rollouts, {len(failed)} failed; {arguments.count} continuations of each target."
    said += " Success in %, 95 % intervals by bootstrap over failed episodes." + (
        f" {privileged} is a ceiling." if privileged else ""
    )
    text = table(found)
    results = {
        "tasks": len(tasks),
        "rollouts": len(episodes),
        "failed": len(failed),
        "count": arguments.count,
        "analysers": found,
    }
    write(arguments.out or REPO / f"benchmarks/results/placement_{config.env.name}", f"{head}{said}\n\n{text}", results)
    if not arguments.out:
        fill(PAGE, f"placement_{config.env.name}", text)


if __name__ == "__main__":
    guarded(main)
