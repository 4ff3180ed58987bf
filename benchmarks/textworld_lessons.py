"""Lessons for a short warm start on TextWorld, for a model whose own hindsight is too weak to learn from: failed
episodes with their review, and steps under a hint, as dialogues for `algorithm = sft`.

  python -m benchmarks.textworld_lessons --quests=120 --out=data/textworld_lessons.jsonl

A careless player loses quests that no run plays (of `--seed`). It writes several commands at once, the whole list, a
command that leads nowhere, or one that the game does not know. The environment's report, which knows the truth
(PRIVILEGED), is what a review answers. Under a hint the right command follows a right one, and any possible command one
that names it, so that words are read; nothing shows how to play without a hint.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.injected_faults import play_scripts
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.config import build, files
from hintsd_jax.config.schema import Config
from hintsd_jax.envs.base import Action, Fault, Message
from hintsd_jax.envs.textworld import TextWorld
from hintsd_jax.envs.textworld.env import ADVICE
from hintsd_jax.hindsight import prompts
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode

LIST = "Possible commands:\n"
OTHER = 0.3  # share of hints that name a command other than the right one


def careless(task: Mapping, rng: random.Random, steps: int) -> list[str]:
    """The commands of an episode of the careless player; it may win by chance."""
    env, commands = TextWorld(), []
    message = env.reset(task).messages[-1]
    habit = rng.choice(["several", "all", "one", "one", "mixed"])  # as models do: most go on as they began
    for _ in range(steps):
        listed = _listed(message)
        kind = habit if rng.random() < 0.8 else rng.choice(["several", "all", "one", "unknown"])
        if kind == "mixed":
            kind = rng.choice(["several", "one", "unknown"])
        if commands and rng.random() < 0.3:
            command = commands[-1]
        elif kind == "several":
            first = rng.randrange(len(listed))
            command = "\n".join(listed[first : first + rng.randint(2, 4)])
        elif kind == "all":
            command = "\n".join(listed)
        else:
            command = rng.choice(listed)
            if kind == "unknown":
                command = f"please {command}"
        commands.append(command)
        result = env.step(Action(command))
        if result.terminated:
            break
        message = result.messages[-1]
    env.close()
    return commands


def review(episode: Episode, faults: Sequence[Fault], config: Config) -> list[dict[str, Any]]:
    """The analyser's question about an episode, and the answer that the report would give."""
    hindsight, benchmark = config.hindsight, prompts.Benchmark.of(TextWorld, config.env.name)
    words = prompts.find(hindsight.prompts)
    asked = words.review(episode, benchmark, hindsight.max_targets, hindsight.max_trajectory_chars)
    if hindsight.max_targets == 1:  # the question asks for one step in another form then
        answer: dict[str, Any] = {"failure_step": faults[0].step, "feedback": faults[0].feedback}
    else:
        named = faults[: hindsight.max_targets]
        answer = {"failures": [{"step": fault.step, "feedback": fault.feedback} for fault in named]}
    return [*map(dict, asked), {"role": "assistant", "content": json.dumps(answer)}]


def hinted(episode: Episode, fault: Fault, config: Config, rng: random.Random) -> list[dict[str, Any]]:
    """A dialogue up to a faulty step, a hint there, and the command that the hint names."""
    dialogue, command = episode.dialogue(fault.step), _advised(fault)
    if rng.random() < OTHER:
        command = rng.choice(_listed(dialogue[-1]))
    said = prompts.find(config.hindsight.prompts).teacher_feedback(ADVICE.format(command))
    before = [{**message, "weight": 0} if message["role"] == "assistant" else {**message} for message in dialogue]
    return [*before, {"role": "user", "content": said}, {"role": "assistant", "content": command}]


def lessons(config: Config, chat: ChatFormat, quests: int, seed: int) -> list[list[dict[str, Any]]]:
    """The dialogues of so many quests, in a seeded order: of each lost episode its review and one hinted step."""
    steps = config.rollout.max_steps
    options = {**config.env.options, "seed": seed, "size": quests, "limit": steps}
    tasks = TextWorld.tasks("train", config.env.data_dir, **options)
    play = {task["id"]: [careless(task, random.Random(f"{seed} {task['id']}"), steps)] for task in tasks}
    rows: list[list[dict[str, Any]]] = []
    rng = random.Random(seed)
    for _, (episode,) in play_scripts(chat, partial(TextWorld, **options), tasks, play):
        faults = episode.report.faults if episode.report and episode.report.faults else ()
        if known := [fault for fault in faults if _advised(fault)]:  # else the quest cannot be won any more
            rows += [review(episode, known, config), hinted(episode, rng.choice(known), config, rng)]
    rng.shuffle(rows)
    return rows


def _advised(fault: Fault) -> str:
    """The command that a fault's feedback names; "" where there is none."""
    found = re.fullmatch(re.escape(ADVICE).replace(r"\{\}", "(.+)"), fault.feedback)
    return found[1] if found else ""


def _listed(message: Message) -> list[str]:
    """The commands that an observation lists."""
    return message["content"].rpartition(LIST)[2].splitlines()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="textworld", help="whose prompts, options and lengths are used")
    parser.add_argument("--policy", help="a Hugging Face directory in place of the config's, for its chat template")
    parser.add_argument("--quests", type=int, default=120)
    parser.add_argument("--seed", type=int, default=100, help="of the quests; another than the run's env.options.seed")
    parser.add_argument("--out", type=Path, default=Path("data/textworld_lessons.jsonl"))
    chosen = parser.parse_args(arguments)
    config = build.build(files.load(chosen.config))
    tokenizer = load_tokenizer(chosen.policy or config.policy.path)
    rows = lessons(config, ChatFormat(tokenizer, history="keep"), chosen.quests, chosen.seed)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    print(f"{chosen.out}: {len(rows)} dialogues of {chosen.quests} quests")


if __name__ == "__main__":
    main()
