"""Whether a lesson at one kind of Desk's decisions carries over to the others: a policy is trained on the right actions
of one kind alone, and the chance of the right candidate is looked at for every kind, before and after.

  python -m benchmarks.carry_over --out=benchmarks/results/carry_over.md
  python -m benchmarks.carry_over --policy=DIR --updates=6 --rows=12 --tasks=20

Where one distils matters if the others hardly change: the wanted bound is 5 points. Lessons are decisions of the
train split: cross-entropy on the whole right action, without a hint and after right steps only, by Adam at the
same learning rate for every kind. The chances are of the test split, at temperature 1, after right steps too.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from benchmarks.pages import markdown_table
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.desk.tasks import desk_tasks
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy import training
from hintsd_jax.tools.desk_policy.demonstrator import Decision, Demonstrator, WeightedTokens
from hintsd_jax.tools.desk_policy.rows import packed

LEARNING_RATE = 3e-4
BOUND = 0.05


def lesson(decision: Decision) -> WeightedTokens:
    """The right action after its context; the context is only read."""
    context, right = list(decision.context), list(decision.right)
    return WeightedTokens([*context, *right], [0.0] * len(context) + [1.0] * len(right))


def changes(before: dict[str, float], after: dict[str, float], taught: str) -> tuple[float, float, str, float]:
    """(the taught kind's change, the mean of the others', the other kind that changed most, its change)."""
    others = {kind: after[kind] - before[kind] for kind in before if kind not in ("all", taught)}
    most = max(others, key=lambda kind: abs(others[kind]))
    return after[taught] - before[taught], float(np.mean(list(others.values()))), most, others[most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="assets/desk-policy")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--tasks", type=int, default=100, help="of the test split")
    parser.add_argument("--updates", type=int, default=8, help="on each kind")
    parser.add_argument("--rows", type=int, default=16, help="lessons an update")
    parser.add_argument("--length", type=int, default=8, help="requests a task")
    parser.add_argument("--difficulty", type=int, default=6, help="decisions a task")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    policy, params = load_policy(arguments.policy, remat=False)
    demonstrator = Demonstrator(ChatFormat(load_tokenizer(arguments.policy)), seed=0)
    shape = {"length": arguments.length, "difficulty": arguments.difficulty}

    def decisions(split: str, count: int) -> list[Decision]:
        tasks = desk_tasks(split, arguments.data_dir, **shape)[:count]
        return [decision for task in tasks for decision in demonstrator.decisions(task)]

    test, train = decisions("test", arguments.tasks), decisions("train", 10 * arguments.tasks)
    longest = max(len(lesson(decision).ids) for decision in train)
    optimizer = optax.adam(LEARNING_RATE)
    step = training.make_step(policy, optimizer)

    def chances(weights) -> dict[str, float]:
        report = training.decision_probabilities(weights, policy, test)
        return {kind: scores["right"] for kind, scores in report.items()}

    def taught(lessons: Sequence[Decision]) -> dict[str, float]:
        weights, rng = jax.tree.map(lambda leaf: leaf.copy(), params), random.Random(0)
        state = optimizer.init(weights)
        for _ in range(arguments.updates):
            rows = [lesson(decision) for decision in rng.choices(lessons, k=arguments.rows)]
            weights, state, _ = step(weights, state, packed({"episodes": rows}, longest))
        return chances(weights)

    before, lines = chances(params), []
    for kind in DECISIONS:
        own, mean, most, change = changes(before, taught([d for d in train if d.kind == kind]), kind)
        within = "yes" if abs(change) <= BOUND else "no"
        lines.append([kind, f"{before[kind]:.2f}", f"{own:+.2f}", f"{mean:+.2f}", f"{change:+.2f} ({most})", within])
        print(*lines[-1], flush=True)
    head = ["taught", "p(right) before", "its change", "others, mean", "others, largest", f"within {BOUND:.2f}"]
    shown = f"{arguments.updates} updates of {arguments.rows} lessons on one kind; {arguments.length} requests,"
    shown += f" {arguments.difficulty} decisions; {arguments.tasks} test tasks"
    text = f"# What a lesson at one kind does to the others\n\n{shown}.\n\n{markdown_table(head, lines)}\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
