"""Dialogues for `algorithm = sft` from an environment's scripted reference: tasks of a split in, a file of chat JSONL
out.

  python -m benchmarks.scripted_dialogues --out=runs/desk.jsonl                            Desk, 1,000 training tasks
  python -m benchmarks.scripted_dialogues --config=textworld --tasks=100 --out=runs/textworld.jsonl
  hintsd-jax train --config=desk --config.algorithm=sft --config.sft.path=runs/desk.jsonl

The reference knows the ground truth (PRIVILEGED), so this is SFT on a perfect policy. Episodes that do not succeed are
left out and counted. A file of any other policy's dialogues has the same form: see `hintsd_jax.rollout.dialogues`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.hindsight_setup import Setup, guarded, load_config, open_setup
from benchmarks.injected_faults import play_scripts, scripts_of
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.episode import Episode


def dialogue(episode: Episode) -> dict[str, Any]:
    """An episode as the file has it, without what came after its last action."""
    messages = [*episode.dialogue(len(episode.steps)), {"role": "assistant", "content": episode.steps[-1].text}]
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    tools = [dict(tool) for tool in episode.tools_at(len(episode.steps))]
    return {"messages": plain} | ({"tools": tools} if tools else {})


def dialogues(setup: Setup, split: str, count: int) -> Iterator[Mapping[str, Any] | None]:
    """Of the first `count` tasks of a split; None where the reference does not succeed."""
    config = setup.config
    scripts, tasks = scripts_of(config.env.name, setup.chat.style, config.env.options), setup.tasks(split)
    tasks = [tasks[n] for n in range(min(count or len(tasks), len(tasks)))]
    right = {task["id"]: [scripts.right(task)] for task in tasks}
    for _, (episode,) in play_scripts(setup.chat, setup.make_env, tasks, right):
        yield dialogue(episode) if episode.success else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="desk", help="the name of a shipped config, or a file")
    parser.add_argument("--split", default="", help="whose tasks; by default the config's training split")
    parser.add_argument("--tasks", type=int, default=1000, help="the first so many; 0: all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="further values, key=value")
    arguments = parser.parse_args()
    config = load_config(arguments.config, None, arguments.overrides)
    written, failed = [], 0
    for found in dialogues(open_setup(config, []), arguments.split or config.tasks.train_split, arguments.tasks):
        failed += found is None
        written += [] if found is None else [json.dumps(found, ensure_ascii=False)]
    if not written:
        raise UserError("the reference succeeded in no task: nothing is written")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(line + "\n" for line in written))
    print(f"{len(written):,} dialogues in {arguments.out}; {failed} episodes of the reference did not succeed")


if __name__ == "__main__":
    guarded(main)
