"""Is an arm's teacher better than its student? The log-probability of the *right* action under the teacher's context
minus that under the student's, with the same weights, for every arm that has a teacher, on its own targets.

  python -m benchmarks.teacher_gain                                  Desk, the embedded policy
  python -m benchmarks.teacher_gain --config=bfcl_qwen3_4b --arms=hint_sd,openclaw_rl policy.path=DIR
  python -m benchmarks.compare_algorithms --read --teacher-gain=benchmarks/results/teacher_gain_desk.json ...

Scripts play each task right once and with single faults (`benchmarks.injected_faults`), so that the right action is
known up to the fault: as a group they are what the arm learns from in a training step. The arm looks back on them as in
training, with its analyser's own words; each of its branches that a teacher reads, up to the fault, is measured: at the
fault, where the action has to change, and before it, where it was right and should stay. Two contexts under one set of
weights: what the EMA adds later is not in it. Nats an action; intervals over tasks. Writes
benchmarks/results/teacher_gain_<environment>.md and .json.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.compare_algorithms import ARMS, LABELS
from benchmarks.comparison_settings import config_of
from benchmarks.comparison_teachers import ABOUT, PLACES, table
from benchmarks.hindsight_setup import Setup, guarded, header, write
from benchmarks.injected_faults import Scripts, play_scripts, scripts_of
from benchmarks.pages import RESULTS
from benchmarks.rates import Rate, cell, ratio
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.config import build
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.sampling.scoring import span_logprobs
from hintsd_jax.session import Session
from hintsd_jax.statistics import SHARE, Span
from hintsd_jax.training.examples import Branch


class Played(NamedTuple):
    """Episodes of several tasks, a group each. right: task -> its right actions. fault: id of an episode -> the step of
    its fault; of one without, one beyond its last.
    """

    episodes: list[Episode]
    right: Mapping[str, Sequence[str]]
    fault: Mapping[int, int]


class Row(NamedTuple):
    """The right action of a step after what the student, and the teacher, read before it. Token ids."""

    task: str
    at_fault: bool
    student: Sequence[int]
    teacher: Sequence[int]
    action: Sequence[int]


def play(setup: Setup, scripts: Scripts, tasks: Sequence[Mapping], faults: int, seed: int) -> Played:
    """Each task right, and with `faults` single faults of kinds that take turns. What does not turn out so is left out:
    a task that its reference does not solve, a fault that does no harm.
    """
    kinds, right, chosen = list(scripts.faults), {}, {}
    for n, task in enumerate(tasks):
        right[task["id"]] = tuple(scripts.right(task))
        turns = [kinds[(n * faults + k) % len(kinds)] for k in range(len(kinds))]
        found = [script for kind in turns if (script := scripts.faulty(task, kind, seed)) is not None][:faults]
        if len(found) == faults:
            chosen[task["id"]] = found
    usable = [task for task in tasks if task["id"] in chosen]
    if not usable:
        raise UserError(f"no task has a place for {faults} faults: lower --faults")
    actions = {name: [right[name], *(script.actions for script in of_task)] for name, of_task in chosen.items()}
    episodes, fault = [], {}
    played = play_scripts(setup.chat, setup.make_env, usable, actions, seed)
    for group, (task, (reference, *others)) in enumerate(played):
        if not reference.success:
            continue
        steps = [len(reference.steps) + 1, *(script.step for script in chosen[task["id"]])]
        for episode, step in zip((reference, *others), steps, strict=True):
            if episode is reference or not episode.success:
                episode.group = group
                episodes.append(episode)
                fault[id(episode)] = step
    return Played(episodes, right, fault)


def teachers_contexts(episode: Episode, branches: Sequence[Branch]) -> Iterator[tuple[Branch, list[int]]]:
    """Each branch that a teacher reads, with all that the teacher has read before the action."""
    read: list[int] = []
    for branch in branches:
        stream = episode.streams[episode.steps[branch.step - 1].stream].tokens
        if branch.context:
            before = read if branch.continues else stream[: branch.prefix_length]
            context = [*before, *branch.context]
            yield branch, context
            read = [*context, *stream[branch.start : branch.stop]]


def rows_of(session: Session, played: Played) -> list[Row]:
    """What an arm's teacher would score of what was played."""
    algorithm = session.algorithm
    hindsight = algorithm.analyse(played.episodes, session.analyser(session.trained, 0))
    experience = Experience(played.episodes, hindsight, session.chat, seed=session.config.seed, step=0)
    rows = []
    for episode in played.episodes:
        for branch, context in teachers_contexts(episode, algorithm.branches(episode, experience)):
            step, fault = episode.steps[branch.step - 1], played.fault[id(episode)]
            if branch.step <= fault and branch.step <= len(played.right[episode.task_id]):
                action = session.chat.encode(played.right[episode.task_id][branch.step - 1])
                student = episode.streams[step.stream].tokens[: step.start]
                rows.append(Row(episode.task_id, branch.step == fault, student, context, action))
    return rows


def measure(session: Session, played: Played) -> dict[str, Rate | None]:
    """Of one arm, by `comparison_teachers.PLACES`, in the mean over actions; None where there is none."""
    rows = rows_of(session, played)
    pairs = [(context, row.action) for row in rows for context in (row.teacher, row.student)]
    scores = [float(np.sum(each)) for each in span_logprobs(session.weights(session.trained), session.policy, pairs)]
    gains = [teacher - student for teacher, student in zip(scores[::2], scores[1::2], strict=True)]

    def mean(values: Sequence[float], members: Sequence[int], span: Span | None = None) -> Rate | None:
        names = list(dict.fromkeys(rows[n].task for n in members))
        by_task = [[values[n] for n in members if rows[n].task == name] for name in names]
        return ratio([sum(each) for each in by_task], [len(each) for each in by_task], span)

    everything = range(len(rows))
    of = {
        place: [n for n in everything if place == "all" or rows[n].at_fault == (place == "fault")] for place in PLACES
    }
    likelier = mean([float(gain > 0) for gain in gains], everything, SHARE)
    return {place: mean(gains, members) for place, members in of.items()} | {"likelier": likelier}


def opened(config_named: str, overrides: Mapping[str, str], arm: str, earlier: Session | None) -> Session:
    """The session of an arm, with the engine and weights of an earlier one where they would be the same."""
    own = dict(override.split("=", 1) for override in ARMS[arm][1])
    config = config_of(config_named, {**overrides, **own})
    if earlier is None or build.engine_config(config) != build.engine_config(earlier.config):
        return Session.open(config)
    return dataclasses.replace(earlier, config=config, algorithm=build.algorithm(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="desk", help="the name of a shipped config, or a file")
    parser.add_argument("--arms", default="", help="of compare_algorithms; all that have a teacher")
    parser.add_argument("--tasks", type=int, default=24, help="the first so many of the eval split")
    parser.add_argument("--faults", type=int, default=3, help="episodes with a fault, of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="without its ending")
    parser.add_argument("overrides", nargs="*", help="further values, key=value")
    arguments = parser.parse_intermixed_args()
    overrides = dict(override.removeprefix("--config.").split("=", 1) for override in arguments.overrides)
    arms = arguments.arms.split(",") if arguments.arms else [arm for arm in ARMS if arm not in ("sft", "lr0")]
    if unknown := set(arms) - set(ARMS):
        raise UserError(f"--arms: {', '.join(sorted(unknown))} is unknown: choose some of {', '.join(ARMS)}")
    session, gains, played = None, {}, None
    for arm in arms:
        config = config_of(arguments.config, {**overrides, **dict(each.split("=", 1) for each in ARMS[arm][1])})
        if not build.algorithm(config).loss.needs_teacher:
            continue
        session = opened(arguments.config, overrides, arm, session)
        if played is None:
            setup = Setup(config, session.chat, session.env_class, session)
            scripts = scripts_of(config.env.name, session.chat.style, config.env.options)
            tasks = setup.tasks(config.tasks.eval_split)
            tasks = [tasks[n] for n in range(min(arguments.tasks, len(tasks)))]
            played = play(setup, scripts, tasks, arguments.faults, arguments.seed)
        gains[arm] = measure(session, played)
        print(f"{arm}: {cell(gains[arm]['all'])}", flush=True)
    if not gains:
        raise UserError(f"none of {', '.join(arms)} has a teacher")
    out = arguments.out or RESULTS / f"teacher_gain_{setup.config.env.name}"
    text = f"{header('Teachers against their students', setup)}\n\n{ABOUT}\n\n{table(gains, LABELS)}"
    write(out, text, {"config": arguments.config, "gains": gains})
    print(text)


if __name__ == "__main__":
    guarded(main)
