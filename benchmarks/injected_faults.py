"""Episodes with one fault that we put in ourselves: tasks and an environment's scripts in, failed episodes whose faulty
step is known out.

A script plays the reference solution of a task with one fault of a known kind at a known step, and goes on as if
nothing had happened. What succeeds all the same is counted and left out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hintsd_jax.envs.base import Environment, ToolCall
from hintsd_jax.envs.code_blocks import CODE
from hintsd_jax.envs.script import Script
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import Sampling

THIRDS = ("early", "middle", "late")
UNBOUNDED = 1 << 30
ROLLOUT = RolloutConfig(UNBOUNDED, UNBOUNDED, Sampling(1.0, 1.0, 0, UNBOUNDED))
BATCH = 16  # tasks; each of their scripts has an environment in a thread of its own


@dataclasses.dataclass(frozen=True)
class Scripts:
    """An environment's scripts. faults: kinds with what they are. right: task -> right actions. faulty: (task, kind,
    seed) -> a script with that fault, or None. sort: (task, episode, step) -> what the policy's own faults are sorted
    by. groups: kinds that are also reported together, by a name.
    """

    faults: Mapping[str, str]
    right: Callable[[Mapping], Sequence[str]]
    faulty: Callable[[Mapping, str, int], Script | None]
    sort: Callable[[Mapping, Episode, int], str]
    groups: Mapping[str, Sequence[str]]


def scripts_of(environment: str, style: str, options: Mapping[str, Any] = MappingProxyType({})) -> Scripts:
    """style: of tool calls, see `envs.tool_calls`. options: of the environment. Raises UserError for an environment
    that has no scripts.
    """
    if environment == "desk":
        from hintsd_jax.envs.desk import script

        def request(task: Mapping, episode: Episode, step: int) -> str:
            """The kind of request that was open; one is closed by an action without a call."""
            actions = [parse_action(earlier.text, style) for earlier in episode.steps[: step - 1]]
            return task["requests"][sum(not (action.calls or action.problem) for action in actions)]["kind"]

        # What the embedded policy saw in its warm-up, with hints in the demonstrator's words, and what it never saw.
        known = list(script.CHOICES)
        other = [kind for kind in script.FAULTS if kind not in script.CHOICES]
        right = lambda task: script.ground_truth(task, style).actions
        faulty = lambda task, kind, seed: script.with_fault(task, kind, seed, style=style)
        groups = {"the demonstrator's kinds": known, "other kinds": other}
        faults = {kind: script.FAULTS[kind] for kind in (*known, *other)}
        return Scripts(faults, right, faulty, request, groups)
    if environment == "bfcl":
        from hintsd_jax.envs.bfcl import script

        right = lambda task: script.ground_truth(task, one_call_a_step=True, style=style).actions
        faulty = lambda task, kind, seed: script.with_fault(task, kind, seed, style=style)
        return Scripts(script.FAULTS, right, faulty, lambda task, episode, step: task["category"], {})
    if environment == "appworld":
        from hintsd_jax.envs.appworld import script
        from hintsd_jax.envs.appworld.options import Options

        root = Options.parse(options).root
        right = lambda task: script.ground_truth(task, root).actions
        faulty = lambda task, kind, seed: script.with_fault(task, kind, seed, root)
        return Scripts(script.FAULTS, right, faulty, lambda task, episode, step: task["category"] or "unknown", {})
    if environment == "textworld":
        from hintsd_jax.envs.textworld import script

        def faulty(task: Mapping, kind: str, seed: int) -> Script | None:
            if not task["limit"]:
                raise UserError("scripts that do not win go on to the game's limit: give env.options.limit")
            return script.with_fault(task, kind, seed)

        right = lambda task: script.ground_truth(task).actions
        length = lambda task, episode, step: f"quest of {task['quest_length']}"
        return Scripts(script.FAULTS, right, faulty, length, {})
    raise UserError(
        f"no scripts of faults for environment {environment!r}: desk, bfcl, appworld and textworld have them"
    )


def calls_in(text: str, style: str) -> tuple[ToolCall, ...]:
    """The calls that an action makes: tool calls, or those that its code has, with arguments as they are written."""
    action = parse_action(text, style)
    if style != CODE or action.code is None:
        return action.calls
    from hintsd_jax.envs.appworld import script

    return script.calls_in(action.code)


@dataclasses.dataclass
class Case:
    """A failed episode with its one fault: the kind and the 1-based step. right: the action that would have been right
    there. wanted: the calls that would have been right in its place, the reference's for the rest of that user turn
    (of code, which has no turns: for the rest of the episode) but the taken ones.
    """

    episode: Episode
    fault: str
    step: int
    right: str
    wanted: tuple[ToolCall, ...]

    @classmethod
    def of(cls, episode: Episode, fault: str, step: int, reference: Sequence[str], style: str) -> Case:
        """`reference`: the texts of all right actions, the same as the episode's up to the step."""
        wanted: list[ToolCall] = []
        for text in reference[step - 1 :]:
            calls = calls_in(text, style)
            if not calls and style != CODE:
                break
            wanted += calls
        taken = calls_in(episode.steps[step - 1].text, style)
        return cls(episode, fault, step, reference[step - 1], tuple(call for call in wanted if call not in taken))

    @property
    def third(self) -> str:
        """Where in the episode the fault is."""
        return THIRDS[3 * (self.step - 1) // len(self.episode.steps)]


def play_scripts(
    chat: ChatFormat,
    make_env: Callable[[], Environment],
    tasks: Sequence[Mapping],
    scripts: Mapping[str, Sequence[Sequence[str]]],
    seed: int = 0,
) -> Iterator[tuple[Mapping, list[Episode]]]:
    """(task, the episode of each of its scripts). scripts: task id -> the actions of each rollout, the same number of
    rollouts for every task. Raises RuntimeError where an episode could not be played.
    """

    def script(job: Any) -> Sequence[str]:
        rollout: int = job.episode.rollout
        return scripts[job.episode.task_id][rollout]

    host = ThreadHost(make_env)
    engine: Any = ScriptedEngine(chat, script)  # in place of sampling.Engine
    for first in range(0, len(tasks), BATCH):
        batch = tasks[first : first + BATCH]
        rollouts = len(scripts[batch[0]["id"]])
        played = run_episodes(
            engine, None, chat, host, batch, rollouts, ROLLOUT, seed=seed, step=0, call_timeout_s=60.0
        )
        if played.dropped or played.failures:
            raise RuntimeError(f"episodes that could not be played: {dict(played.dropped)} {played.failures[:3]}")
        for n, task in enumerate(batch):
            yield task, played.episodes[n * rollouts : (n + 1) * rollouts]


def inject(
    chat: ChatFormat, make_env: Callable[[], Environment], tasks: Sequence[Mapping], scripts: Scripts, seed: int
) -> tuple[list[Case], dict[str, Counter]]:
    """Cases that fail, and by kind how many were `injected` and how many `failed`."""
    cases, counts = [], {kind: Counter(injected=0, failed=0) for kind in scripts.faults}
    right = {task["id"]: tuple(scripts.right(task)) for task in tasks}
    faulty = {task["id"]: [scripts.faulty(task, kind, seed) for kind in scripts.faults] for task in tasks}
    # A task without a place for a fault plays the reference once more, uncounted.
    actions = {
        name: [right[name], *(script.actions if script else right[name] for script in faulty[name])] for name in right
    }
    for task, (reference, *episodes) in play_scripts(chat, make_env, tasks, actions, seed):
        if not reference.success:  # some tasks of BFCL cannot be solved one call a step
            continue
        for script, episode in zip(faulty[task["id"]], episodes, strict=True):
            if script is not None:
                counts[script.fault]["injected"] += 1
            if script is not None and not episode.success:
                counts[script.fault]["failed"] += 1
                cases.append(Case.of(episode, script.fault, script.step, right[task["id"]], chat.style))
    return cases, counts
