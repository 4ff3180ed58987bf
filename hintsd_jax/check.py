# SPDX-License-Identifier: Apache-2.0

"""`--mode=check`: what an author of an environment wants to see before a run: a config in, whole episodes as the policy
sees them out.

It plays a few episodes with the config's policy, or with actions from a file, and prints the tasks, every message in
the tokens' own text, how many tokens it is, what was read in each action, what the environment answered, and its
report. Whatever breaks the protocol is printed with its traceback. It writes nothing and trains nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.envs.base import Action
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.session import Session

_BETWEEN = re.compile(r"^---[ \t]*\n", re.MULTILINE)  # the line between two actions of a script


def check(config: Config) -> bool:
    """Plays `check.tasks` x `check.rollouts` episodes of the training split and prints them. Returns whether the
    environment kept to the protocol.

    Raises:
      UserError: as a run would: what cannot be loaded, tasks that are none, an environment that never plays; a script
        that cannot be read.
    """
    session, settings = Session.open(config), config.check
    if settings.script:
        actions = _script(settings.script)
        script = lambda job: itertools.chain(actions, itertools.repeat(""))
        scripted: Any = ScriptedEngine(session.chat, script, build.engine_config(config))
        session.engine = scripted
    split = config.tasks.train_split
    tasks = session.tasks(split)
    chosen = [tasks[n] for n in range(min(settings.tasks, len(tasks)))]
    benchmark = f" ({session.benchmark})" if session.benchmark else ""
    print(f"environment {config.env.name}{benchmark}: {len(tasks):,} tasks in {split}")
    print(*session.chat_notes, sep="\n", end="\n" * bool(session.chat_notes))
    played = session.play(session.weights(session.trained), chosen, settings.rollouts, step=0, refuse=False)
    for episode in (*played.episodes, *played.lost):
        print(*_lines(episode, session, chosen[episode.group]), sep="\n")
    problems = list(_problems(played, chosen))
    print(*problems, sep="\n", end="\n" * bool(problems))
    steps = [step for episode in (*played.episodes, *played.lost) for step in episode.steps]
    if cut := sum(bool(step.cut) for step in steps):
        limit = config.rollout.max_action_tokens
        print(f"{cut} of {len(steps)} actions were cut at rollout.max_action_tokens = {limit}")
    print(f"{len(played.episodes)} of {played.begun} episodes were played; {_verdict(problems)}", flush=True)
    session.refuse_unplayed(played)
    return not problems


def _verdict(problems: Sequence[str]) -> str:
    return "mend what stands above" if problems else "the environment kept to the protocol"


def _script(path: str) -> list[str]:
    """The actions in a text file, one after the other, with a line of --- between two."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"check.script = {path}: cannot be read ({error}): give a text file") from error
    return [action.removesuffix("\n") for action in _BETWEEN.split(text)]


def _lines(episode: Episode, session: Session, task: Mapping) -> Iterator[str]:
    """An episode for people."""
    chat, author = session.chat, "the script" if session.config.check.script else "the policy"
    yield f"\n=== task {episode.task_id}, rollout {episode.rollout} " + "=" * 20
    yield f"the task holds: {', '.join(sorted(map(str, task)))}"
    yield f"--- prompt, {episode.prompt_length:,} tokens, {len(episode.tools)} tools"
    yield chat.text(episode.streams[0].tokens[: episode.prompt_length])
    for number, step in enumerate(episode.steps, 1):
        tokens = episode.streams[step.stream].tokens
        cut = " and was cut" if step.cut else ""
        yield f"--- step {number}: {author} wrote {step.stop - step.start} tokens{cut}"
        yield chat.text(tokens[step.start : step.stop])
        cut_at = step.stop - step.start if step.cut else 0
        yield f"--- read as {_read(parse_action(step.text, chat.style, cut_at, episode.callable_at(number)))}"
        follows = episode.steps[number] if number < len(episode.steps) else None
        if follows is not None and follows.stream == step.stream:
            answer = tokens[step.stop : follows.start]
            yield f"--- the environment answered, {len(answer):,} tokens; reward so far {step.reward:g}"
            yield chat.text(answer)
        else:
            yield f"--- the environment answered; reward {step.reward:g}; what it said last is not tokenised"
            yield step.observation
    total, context = len(episode.tokens), session.config.rollout.context
    yield f"--- ended: {episode.ended}{f' ({episode.detail})' if episode.detail else ''}, reward {episode.reward:g},"
    outcome = "success" if episode.success else "no success"
    yield f"    {outcome}, {len(episode.steps)} steps, {total:,} of {context:,} tokens"
    if episode.report is not None:
        yield "--- report (PRIVILEGED: knows the ground truth, never shown to the policy)"
        yield episode.report.summary
        if episode.report.faults is None:
            yield "it does not say which steps were wrong"
        yield from (f"step {fault.step} was wrong: {fault.feedback}" for fault in episode.report.faults or ())


def _read(action: Action) -> str:
    """What the parser has made of an action."""
    if action.problem:
        return f"{action.problem_kind}, which the agent is told: {action.problem}"
    if action.code is not None:
        return f"{len(action.code.splitlines())} lines of code"
    if not action.calls:
        return "plain text, without a call"
    return " and ".join(
        f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})" for call in action.calls
    )


def _problems(played: Rollouts, tasks: Iterable[Mapping]) -> Iterator[str]:
    """What breaks the protocol, or the exact repetition of a run."""
    for failure in played.failures:
        yield f"PROBLEM in {failure.call} of task {failure.task_id or '?'}: {failure.reason}: {failure.detail}"
        yield failure.traceback.rstrip()
    starts: dict[int, list] = {}
    for episode in (*played.episodes, *played.lost):
        starts.setdefault(episode.group, []).append((episode.prompt_messages, episode.tools))
    for group, first in starts.items():
        if any(start != first[0] for start in first):
            yield (
                f"PROBLEM: two resets of task {list(tasks)[group]['id']} began differently: all that is random must"
                " come from the task, or runs cannot be repeated"
            )
    if played.too_long:
        yield f"PROBLEM: prompts that do not fit rollout.context: {played.describe_too_long()}"
