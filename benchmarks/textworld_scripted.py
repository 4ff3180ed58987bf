"""TextWorld without a model: walkthroughs and walkthroughs with one fault through the whole loop.

  python -m benchmarks.textworld_scripted        100 quests of 1, 2 and 4 commands; some minutes, most of it making them

The walkthrough must win, a script with a fault must not, and the reward must be the package's own score. Then, how
often the first fault that the environment reports (PRIVILEGED) is the one that was put in.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.injected_faults import inject, play_scripts, scripts_of
from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.textworld import TextWorld, quests
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode

MARGIN = 4  # commands that a game goes on for beyond its shortest solution


def score_of_the_package(task: Mapping, commands: Sequence[str]) -> float:
    """What the package's own play of a game ends with, as a share of its highest score."""
    infos = quests.package().EnvInfos(score=True, max_score=True)
    game = quests.package().start(quests.game_file(task), request_infos=infos)
    state = game.reset()
    for command in commands:
        state, _, done = game.step(command)
        if done:
            break
    game.close()
    return state["score"] / state["max_score"]


def _first_fault(episode: Episode) -> int:
    """The first step that the environment reports; 0 for none."""
    return episode.report.faults[0].step if episode.report and episode.report.faults else 0


def measure(chat: ChatFormat, data_dir: str, length: int, count: int) -> dict:
    """Of quests of one length."""
    options = {"quest_length": length, "limit": length + MARGIN, "size": count}
    tasks = TextWorld.tasks("test", data_dir, **options)
    scripts, make_env = scripts_of("textworld", chat.style, options), partial(TextWorld, **options)
    right = {task["id"]: [scripts.right(task)] for task in tasks}
    won = equal = 0
    for task, (episode,) in play_scripts(chat, make_env, tasks, right):
        won += episode.success
        equal += episode.reward == score_of_the_package(task, right[task["id"]][0])
    cases, counts = inject(chat, make_env, tasks, scripts, seed=0)
    found = Counter(case.fault for case in cases if _first_fault(case.episode) == case.step)
    faults = {kind: {**count, "first reported": found[kind]} for kind, count in counts.items()}
    return {"quest_length": length, "quests": count, "won": won, "scores equal": equal, "faults": faults}


def tables(rows: list[dict]) -> str:
    truth = markdown_table(
        ["commands", "quests", "walkthrough wins", "reward = the package's score"],
        [[row["quest_length"], row["quests"], row["won"], row["scores equal"]] for row in rows],
    )
    faults = markdown_table(
        ["commands", "fault", "played", "not won", "the first fault that is reported is this one"],
        [[row["quest_length"], kind, *counts.values()] for row in rows for kind, counts in row["faults"].items()],
        left=(0, 1),
    )
    return f"{truth}\n\n{faults}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="assets/desk-policy", help="whose tokenizer and chat template are used")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--lengths", default="1,2,4")
    parser.add_argument("--quests", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "textworld_scripted", help="with .json and .md")
    arguments = parser.parse_args()
    chat = ChatFormat(load_tokenizer(arguments.policy), history="keep")
    began = time.monotonic()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    rows = [measure(chat, arguments.data_dir, length, arguments.quests) for length in lengths]
    arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    made = f"{time.strftime('%Y-%m-%d')}, {TextWorld.version()}, {time.monotonic() - began:.0f} s"
    text = f"# TextWorld by scripts\n\n`python -m benchmarks.textworld_scripted`: {made}.\n\n{tables(rows)}\n"
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
