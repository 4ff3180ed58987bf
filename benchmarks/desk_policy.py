"""What the embedded policy can do before any training: every decision of the test tasks, hinted and not, sampled and
greedy.

  python -m benchmarks.desk_policy --out=benchmarks/results/desk_policy.md

"Sampled" is the mean probability (at temperature 1) of the whole right action after right steps only; "greedy" is the
share of decisions where the right action is likelier than the usual mistake.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.pages import markdown_table
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk.tasks import desk_tasks
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy.demonstrator import Demonstrator
from hintsd_jax.tools.desk_policy.training import decision_probabilities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="assets/desk-policy")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.policy)
    policy, params = load_policy(arguments.policy, remat=False)
    source = desk_tasks("test", arguments.data_dir)
    tasks = [source[n] for n in range(arguments.tasks)]
    chat, reports = ChatFormat(tokenizer), []
    for hinted in (False, True):
        reports.append(decision_probabilities(params, policy, Demonstrator(chat, seed=0), tasks, hinted))
    lines = []
    for kind in reports[0]:
        cells = [f"{100 * report[kind][how]:.0f}" for report in reports for how in ("sampled", "greedy")]
        lines.append(["**all decisions**" if kind == "all" else kind, *cells])
    head = ["right action, %", "unhinted, sampled", "unhinted, greedy", "hinted, sampled", "hinted, greedy"]
    text = markdown_table(head, lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(f"# The embedded policy on {len(tasks)} test tasks of Desk\n\n{text}")


if __name__ == "__main__":
    main()
