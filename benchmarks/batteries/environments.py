# SPDX-License-Identifier: Apache-2.0

"""Environments that misbehave: what becomes of the run that plays them, and of the episodes beside theirs.

  python -m benchmarks.batteries.environments [--seed N] [--cases N]

Each case plays three tasks, two rollouts each, by the collector, with scripted actions: at the first task the
environment (`rogue.Rogue`) does something wrong in one of its methods: it raises, exits, hangs, dies, fills the memory,
forges answers, leaves threads and processes behind, or returns what the protocol does not allow. In a thread and in a
process of its own, where a thread can survive it at all. What is wanted: no run is lost; the other two tasks are played
to their success; every episode of the first is either played whole, or dropped and counted with a reason and words; a
report or a close that fails is counted too; every record can be written. A part of the cases is done again from the
journal, against an environment that behaves now: it has to come out the same. Further cases are classes whose `tasks`,
`version` or words are wrong, and have to be refused in one line.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.batteries import battery
from benchmarks.batteries.battery import Case, Ending, Outcome
from benchmarks.batteries.rogue import ACTS, HALF, KILLING_ACTS, METHODS, VALUES, Rogue, Sly
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.protocol import checked_tasks, checked_version, checked_words
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_host import Host, ThreadHost
from hintsd_jax.rollout.env_process import ProcessHost
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.runs.journal import Journal
from hintsd_jax.sampling import EngineConfig, Sampling

POLICY = Path(__file__).parents[2] / "assets" / "desk-policy"
ROGUE = "benchmarks.batteries.rogue:Rogue"
CONTEXT, ROLLOUTS, STEPS = 2_000, 2, 6
CONFIG = RolloutConfig(max_steps=STEPS, context=CONTEXT, sampling=Sampling(1.0, 1.0, 0, 64))
# What does no harm, or is cut and said so: the episode is played to its end.
HARMLESS = ("shouts", "leaves a thread", "leaves a daemon", "forks and goes on twice", "control tokens")
HARMLESS_AT = {("report", "half a character"), ("report", "long texts"), *(("close", name) for name in VALUES["close"])}
HARMLESS_AT |= {("close", "forges another shape")}  # any value is a good close
# The prompt or the observation fills the context: no fault of the environment's, and counted as what it is.
LONG = ("a long prompt", "a long text")
SLOW = (
    "hangs",
    "holds the interpreter",
    "forks many",
    "sends itself a stop",
    *(n for n in KILLING_ACTS if "forge" in n),
)


@cache
def chat() -> ChatFormat:
    """Of the embedded policy's tokenizer."""
    return ChatFormat(load_tokenizer(str(POLICY)))


@cache
def process_host() -> Host:
    """One for all cases, as one serves a whole run."""
    return ProcessHost(ROGUE, {}, memory_gib=0.25)


def play(host: Host, first: Mapping[str, Any], limit: float, journal: Journal | None = None) -> Rollouts:
    """Two good tasks beside the `first`."""
    tasks = [{"id": "first", **first}, {"id": "second"}, {"id": "third"}]
    engine: Any = ScriptedEngine(chat(), lambda job: ["Well."] * STEPS, EngineConfig(2, CONTEXT, 64))
    return run_episodes(
        engine, None, chat(), host, tasks, ROLLOUTS, CONFIG, seed=0, step=0, call_timeout_s=limit, journal=journal
    )


def judge(played: Rollouts, at: str, does: str) -> Outcome:
    """What is to be said of a case, see the module."""
    for record in [*(e.to_json() for e in played.episodes), *(dataclasses.asdict(f) for f in played.failures)]:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    good = [episode for episode in played.episodes if episode.task_id != "first"]
    first = [episode for episode in played.episodes if episode.task_id == "first"]
    if len(good) != 2 * ROLLOUTS or not all(
        e.reward == 1 and e.terminated and e.report and e.report.faults for e in good
    ):
        return Outcome(Ending.LOST, f"neighbours: {[(e.task_id, e.ended, e.detail) for e in good]}")
    if played.begun != 3 * ROLLOUTS or len(first) + sum(played.dropped.values()) != ROLLOUTS:
        return Outcome(Ending.LOST, f"{played.begun} begun, {len(first)} played, dropped {dict(played.dropped)}")
    failures = [failure for failure in played.failures if failure.detail and failure.reason.startswith("env_")]
    says = f"{dict(played.dropped) or 'all played'}; {failures[0].call + ': ' + failures[0].detail if failures else ''}"
    if does in LONG:
        cut = all(episode.ended == "context" for episode in first)
        return Outcome(Ending.COUNTED if cut else Ending.SILENT, says)
    if does in HARMLESS or (at, does) in HARMLESS_AT:
        fine = len(first) == ROLLOUTS and all(episode.reward == 1 for episode in first)
        return Outcome(Ending.FINE if fine else Ending.LOST, says)
    if len(failures) != ROLLOUTS or len(failures) != len(played.failures):
        return Outcome(Ending.SILENT, f"failures: {[(f.call, f.reason, f.detail) for f in played.failures]}")
    lost = ROLLOUTS if at in ("reset", "step") else 0  # a report or a close that fails costs no episode
    counted = sum(number for reason, number in played.dropped.items() if reason.startswith("env_")) == lost
    return Outcome(Ending.COUNTED if counted else Ending.SILENT, says)


def misdeed(at: str, does: str, process: bool) -> Callable[[], Outcome]:
    """A case of one misdeed."""

    def run() -> Outcome:
        host = process_host() if process else ThreadHost(Rogue)
        played = play(host, {"at": at, "does": does}, 1.0 if does in SLOW else 30.0)
        return judge(played, at, does)

    return run


def resumed(at: str, does: str, process: bool, folder: Path) -> Callable[[], Outcome]:
    """A case that is played again from its journal, in an environment that behaves."""

    def run() -> Outcome:
        path = folder / f"{at}-{does}-{process}.jsonl".replace(" ", "_")
        host = process_host() if process else ThreadHost(Rogue)
        before = play(host, {"at": at, "does": does}, 1.0 if does in SLOW else 30.0, Journal(path))
        after = play(host, {}, 30.0, Journal(path))
        outcome = judge(before, at, does)
        same = before.dropped == after.dropped and [e.to_json() for e in before.episodes] == [
            e.to_json() for e in after.episodes
        ]
        return outcome if same else Outcome(Ending.LOST, f"{dict(before.dropped)}, then {dict(after.dropped)}")

    return run


def constructed(does: str, process: bool) -> Callable[[], Outcome]:
    """A case in which the constructor does it: nothing can be played, and everything is counted."""

    def run() -> Outcome:
        options = {"constructor": does}
        host = ProcessHost(ROGUE, options, 0.25) if process else ThreadHost(lambda: Rogue(**options))
        try:
            played = play(host, {}, 1.0)
        finally:
            host.close()
        if does in HARMLESS:
            return Outcome(Ending.FINE if len(played.episodes) == 3 * ROLLOUTS else Ending.LOST, str(played.dropped))
        counted = not played.episodes and sum(played.dropped.values()) == len(played.failures) == 3 * ROLLOUTS
        return Outcome(
            Ending.COUNTED if counted else Ending.SILENT, f"{dict(played.dropped)}; {played.failures[0].detail}"
        )

    return run


def _raising(error: BaseException) -> Callable[..., Any]:
    def method(*args: Any, **options: Any) -> Any:
        raise error

    return method


ERRORS = (
    ValueError(f"a\nb{HALF}"), TypeError("of its own"), SystemExit(0), SystemExit("bye"), GeneratorExit(),
    RuntimeError("x" * 10**6), OSError(2, "No such file"), RecursionError("deep"), MemoryError(), AssertionError(),
)  # fmt: skip
GIVEN: tuple[Any, ...] = (None, 3, "text", {"a": 1}, iter([{"id": "a"}]), [], [None], [{}], [{"id": 3}], [{"id": ""}])
GIVEN += ([{"id": HALF}], [{"id": "a\nb"}], [{"id": "x" * 10**6}], [{"id": "a"}, {"id": "a"}], [["id"]], Sly())
GIVEN += ([{"id": "a", "category": HALF}], [{"id": "a", "category": None}], [{"id": b"a"}], {"id": "a"}, [Sly()])
WORDS: tuple[Any, ...] = (3, b"x", HALF, "a\nb", "x" * 10**5, ["x"], Sly(), object())


def declared(attributes: Mapping[str, Any]) -> Callable[[], Outcome]:
    """A case of a class that says something wrong of itself: it is refused in one line."""

    def run() -> Outcome:
        env_class = type("Env", (), {"tasks": classmethod(lambda cls, *args: [{"id": "a"}]), **attributes})
        try:
            tasks = checked_tasks(env_class, "train", "data", {}, "mine")
            says = [tasks[0]["id"], checked_version(env_class, "mine"), *checked_words(env_class, "mine")]
        except UserError as error:
            text = str(error)
            one_line = "\n" not in text and len(text) < 1_000 and text.encode()
            return Outcome(Ending.REFUSED if one_line else Ending.TRACEBACK, text)
        return Outcome(Ending.SILENT, f"taken: {says}")

    return run


def make_cases(rng: random.Random, count: int, folder: Path) -> list[Case]:
    """About `count` cases, drawn from all that there are."""
    cases = []
    for process in (False, True):
        where = "process" if process else "thread"
        acts = [*ACTS, *(KILLING_ACTS if process else ())]
        for at in METHODS:
            for does in [*acts, *VALUES[at]]:
                cases.append(Case(f"{at} ({where}): {does}", misdeed(at, does, process)))
        for at in ("reset", "step", "report"):
            for does in ("raises a time-out", "hangs", *(("dies", "allocates") if process else ())):
                cases.append(Case(f"again ({where}): {at} {does}", resumed(at, does, process, folder)))
        cases += [Case(f"constructor ({where}): {does}", constructed(does, process)) for does in acts]
    for number, error in enumerate(ERRORS):
        says = f"{number} raises {type(error).__name__}"
        cases.append(Case(f"tasks: {says}", declared({"tasks": classmethod(_raising(error))})))
        cases.append(Case(f"version: {says}", declared({"version": classmethod(_raising(error))})))
    for number, value in enumerate(GIVEN):
        give = classmethod(lambda cls, *args, value=value: value)
        cases.append(Case(f"tasks: {number} gives {type(value).__name__}", declared({"tasks": give})))
    for number, value in enumerate(WORDS):
        for name in ("version", "benchmark_name", "kinds_of_mistake"):
            given = [value] if name == "kinds_of_mistake" else value
            cases.append(Case(f"words: {number} {name} of {type(value).__name__}", declared({name: given})))
    return rng.sample(cases, min(count, len(cases)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    try:
        return battery.main("environments", "Environments that misbehave", make_cases, 1_000, argv)
    finally:
        process_host().close()


if __name__ == "__main__":
    sys.exit(main())
