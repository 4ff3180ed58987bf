"""What a policy of Desk does at every decision of the test tasks, by what it is told before: the words of a hint, a
success at the start, nothing.

  python -m benchmarks.desk_policy --out=benchmarks/results/desk_policy.md
  python -m benchmarks.desk_policy --length=16 --difficulty=12 --policy=DIR

All at temperature 1, after right steps only. "Sampled" is the mean probability of the whole right action, "greedy" the
share of decisions where the right action is likelier than the usual mistake; "p(right)" and "p(mistake)" are of the one
token with which they differ. How a policy's reviews name faults is measured by benchmarks/attribution.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.pages import markdown_table
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk.demonstrations import ReferenceStep, reference_steps
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.feedback import without_names
from hintsd_jax.envs.desk.tasks import desk_tasks
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy.demonstrator import PROMPTS, Decision, Demonstrator
from hintsd_jax.tools.desk_policy.training import decision_probabilities


def told(demonstrator: Demonstrator, tasks: Sequence[Mapping]) -> Iterator[tuple[str, list[Decision]]]:
    """(what the policy is told before a decision, the decisions of all tasks). Hints of another step and of another
    task are drawn by the demonstrator's random numbers, of another kind than the decision's and of any kind.
    """
    rng = demonstrator.rng
    steps = [[step for request in task["requests"] for step in reference_steps(request)] for task in tasks]
    choices = [[step for step in each if step.wrong] for each in steps]

    def hinted(hint: Callable[[ReferenceStep, int], str | None]) -> list[Decision]:
        decisions = []
        for n, task in enumerate(tasks):
            decisions += demonstrator.decisions(task, lambda step, n=n: hint(step, n))
        return decisions

    def drawn(step: ReferenceStep, pool: Sequence[ReferenceStep], any_kind: bool) -> str | None:
        hints = [each.hint for each in pool if any_kind or each.kind != step.kind]
        return rng.choice(hints) if hints else None

    def solved(shift: int) -> list[Decision]:
        decisions = []
        for n, task in enumerate(tasks):
            solution = [step.right for step in steps[(n + shift) % len(tasks)]]
            messages = PROMPTS.teacher_reprompt(Desk().reset(task).messages, solution=solution)
            decisions += demonstrator.decisions(task, first=messages)
        return decisions

    yield "nothing", hinted(lambda step, n: None)
    yield "the right hint", hinted(lambda step, n: step.hint)
    yield "the right hint without its name", hinted(lambda step, n: without_names(step.hint))
    yield "a hint that asks for the mistake", hinted(lambda step, n: step.wrong_hint)
    yield "a hint on another step, of another kind", hinted(lambda step, n: drawn(step, choices[n], any_kind=False))
    other = lambda n: choices[(n + 1) % len(tasks)]
    yield "another task's hint, of any kind", hinted(lambda step, n: drawn(step, other(n), any_kind=True))
    yield "a success on the task, at the start", solved(0)
    yield "another task's success, at the start", solved(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="assets/desk-policy")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--length", type=int, default=8, help="requests a task")
    parser.add_argument("--difficulty", type=int, default=6, help="decisions a task")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.policy)
    policy, params = load_policy(arguments.policy, remat=False)
    shape = {"length": arguments.length, "difficulty": arguments.difficulty}
    tasks = desk_tasks("test", arguments.data_dir, **shape)[: arguments.tasks]
    reports = {
        words: decision_probabilities(params, policy, decisions)
        for words, decisions in told(Demonstrator(ChatFormat(tokenizer), seed=0), tasks)
    }
    shown = f"{arguments.length} requests, {arguments.difficulty} decisions"
    text = f"# A policy on {len(tasks)} test tasks of Desk\n\n{shown}.\n"
    lines = []
    nothing = reports["nothing"]["all"]
    for words, report in reports.items():
        scores = report["all"]
        lines.append(
            [words, f"{scores['right']:.3f}", f"{scores['right'] - nothing['right']:+.3f}", f"{scores['wrong']:.3f}"]
        )
    text += "\n" + markdown_table(["told before the decision", "p(right)", "minus nothing", "p(mistake)"], lines) + "\n"
    lines = []
    chosen = [reports["nothing"], reports["the right hint"]]
    for kind in chosen[0]:
        cells = [f"{100 * report[kind][how]:.0f}" for report in chosen for how in ("sampled", "greedy")]
        lines.append(["**all decisions**" if kind == "all" else kind, *cells])
    head = ["right action, %", "unhinted, sampled", "unhinted, greedy", "hinted, sampled", "hinted, greedy"]
    text += "\n" + markdown_table(head, lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
