"""What a real model says when it looks back: failed episodes with one fault at a known step, each reviewed under
several prompt sets.

  make real-policy
  python -m benchmarks.reviews --policy=.cache/real-policies/qwen2.5-coder-0.5b-instruct

Half of the episodes are Desk's, half BFCL's (`make bfcl`); scripts play the reference of a task with one fault, of
another kind each time, and go on as if nothing had happened. Printed for every prompt set: the share of answers that
could be read, by the released parser too; that named the faulty step, as many random steps would have, that named it
within one step; tokens read and written an episode. The table goes to docs/real_models.md, every answer verbatim to
benchmarks/results/reviews_<policy>.md: whether a step that was named is a plausible one, only people who read it can
say.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.hindsight_setup import asker, guarded, open_setup
from benchmarks.injected_faults import Case, inject, scripts_of
from benchmarks.pages import REPO, RESULTS, fill, markdown_table
from hintsd_jax.config import base, build
from hintsd_jax.config.schema import Config
from hintsd_jax.envs.registry import resolve
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.analyser import ModelAnalyser
from hintsd_jax.hindsight.questions import Answers, Asker, Question
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.runs.workdir import versions

ENVIRONMENTS = {
    "desk": {"seed": 0, "length": 2, "difficulty": 2, "instructions": "full", "tools": "relevant"},
    "bfcl": {"split": "clean", "categories": ("multi_turn_base",), "max_prompt_chars": 16_000},
}


@dataclasses.dataclass
class Reviewed:
    """One answer. tokens: of the question and of the answer."""

    case: Case
    environment: str
    answer: str
    targets: Sequence
    problem: str | None
    cut: bool
    tokens: tuple[int, int]


def config_of(policy: str, context: int) -> Config:
    """One engine for all, and the released sampling of answers."""
    config = base()
    config.update_from_flattened_dict(
        {
            "policy.path": policy,
            "hindsight.analyser": "student",
            "hindsight.context": context,
            "rollout.slots": 5,
            "rollout.context": 1024,
            "rollout.max_action_tokens": 64,
            "rollout.prefill_buckets": (64, 512),
            **dict.fromkeys(("batch.length_buckets", "batch.branch_buckets", "batch.action_buckets"), ()),
        }
    )
    return build.build(config)


def cases_of(environment: str, chat: ChatFormat, count: int, seed: int) -> list[Case]:
    """Failed episodes, of as many kinds of fault as there are, in a seeded order."""
    env_class, options = resolve(environment), ENVIRONMENTS[environment]
    tasks = list(env_class.tasks("test", "data", **options))[:12]
    cases, _ = inject(chat, partial(env_class, **options), tasks, scripts_of(environment, chat.style), seed)
    random.Random(seed).shuffle(cases)
    chosen: list[Case] = []
    for limit in range(1, len(cases) + 1):  # each kind once before any comes again
        for case in cases:
            of_kind = sum(case.fault == other.fault for other in chosen)
            if len(chosen) < count and case not in chosen and of_kind < limit:
                chosen.append(case)
    return chosen


def remembering(ask: Asker, chat: ChatFormat, seen: list[tuple[int, int, bool]]) -> Asker:
    """The same asker; what each question and answer took is appended to `seen`."""

    def asked(questions: Iterable[Question]) -> Answers:
        questions = list(questions)
        answers = ask(questions)
        for question, text, cut in zip(questions, answers.texts, answers.cut, strict=True):
            tokens = len(chat.prompt(question.messages, tags_stand=True).ids), len(chat.encode(text or ""))
            seen.append((*tokens, cut))
        return answers

    return asked


def reviewed(setup, environment: str, words: str, cases: Sequence[Case], seed: int) -> list[Reviewed]:
    """All cases under one prompt set."""
    seen: list[tuple[int, int, bool]] = []
    ask = remembering(asker(setup, "policy"), setup.chat, seen)
    key_of = lambda episode: job_key(seed, 0, f"review {episode.task_id}", episode.rollout)
    benchmark = prompts.Benchmark.of(resolve(environment), environment)
    analyser = ModelAnalyser(ask, prompts.find(words), benchmark, key_of, "hindsight", 3, 12_000)
    hindsight = analyser.review([case.episode for case in cases])  # all at once: the slots are decoded together
    if len(hindsight.analyses) < len(cases):
        raise RuntimeError(f"some episodes were not answered: {dict(hindsight.dropped)}")
    results = []
    for case, analysis, (question, answer, cut) in zip(cases, hindsight.analyses, seen, strict=True):
        results.append(
            Reviewed(case, environment, analysis.answer, analysis.targets, analysis.problem, cut, (question, answer))
        )
        named = [target.step for target in analysis.targets]
        print(f"{words} {environment} {len(results)}: {named} of {case.step}: {analysis.answer!r}", flush=True)
    return results


def read_as_released(answer: str) -> bool:
    """Whether the released parser reads an answer: JSON from the first "{" to the last "}" with one of its keys."""
    try:
        value = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(key in value for key in ("failures", "failure_step", "failure_steps"))


def row(words: str, results: Sequence[Reviewed], seconds: float) -> list[object]:
    """A line of the table."""
    count, share = len(results), lambda part: f"{sum(part)}/{len(results)}"
    named = [[target.step for target in each.targets] for each in results]
    return [
        words,
        share(each.problem is None for each in results),
        share(read_as_released(each.answer) for each in results),
        share(each.cut for each in results),
        share(each.case.step in steps for each, steps in zip(results, named, strict=True)),
        f"{sum(len(each.targets) / len(each.case.episode.steps) for each in results):.1f}/{count}",
        share(
            any(abs(each.case.step - step) <= 1 for step in steps) for each, steps in zip(results, named, strict=True)
        ),
        f"{sum(map(len, named)) / count:.1f}",
        f"{sum(each.tokens[0] for each in results) / count:.0f}",
        f"{sum(each.tokens[1] for each in results) / count:.0f}",
        f"{seconds / count:.1f}",
    ]


COLUMNS = ["prompts", "readable", "released parser", "cut", "the fault", "by chance", "within 1 step", "targets"]
COLUMNS += ["tokens read", "tokens written", "s"]


def shown(number: int, each: Reviewed) -> str:
    """One answer as a person reads it, with what was wrong and the faulty action."""
    case, last = each.case, len(each.case.episode.steps)
    action = case.episode.steps[case.step - 1].text
    return (
        f"### {number}. {each.environment}, {case.episode.task_id}: {case.fault} at step {case.step} of {last}\n\n"
        f"Taken:\n```\n{action}\n```\nRight:\n```\n{case.right}\n```\nAnswer:\n```\n{each.answer}\n```\n"
        f"Read as: {'; '.join(f'step {t.step}: {t.feedback}' for t in each.targets) or each.problem or 'no step'}\n"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--policy", required=True, help="a Hugging Face directory")
    arguments.add_argument("--episodes", type=int, default=20)
    arguments.add_argument("--prompts", default="released,compact", help="names of prompt sets")
    arguments.add_argument("--context", type=int, default=10_240, help="tokens of a question with its answer")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    name, rows, pages = Path(given.policy).name, [], []
    setup = open_setup(config_of(given.policy, given.context), ["policy"])
    halves = {"desk": given.episodes // 2, "bfcl": given.episodes - given.episodes // 2}
    cases = {environment: cases_of(environment, setup.chat, n, given.seed) for environment, n in halves.items()}
    for words in given.prompts.split(","):
        results, began = [], time.monotonic()
        for environment, chosen in cases.items():
            results += reviewed(setup, environment, words, chosen, given.seed)
        rows.append(row(words, results, time.monotonic() - began))
        pages += [f"## Prompt set {words}\n", *(shown(number, each) for number, each in enumerate(results, 1))]
    table = markdown_table(COLUMNS, rows)
    made = f"{time.strftime('%Y-%m-%d')}, `python -m benchmarks.reviews {' '.join(sys.argv[1:])}`"
    head = f"# Reviews by {name}\n\n{made}. Versions: {versions()}.\n\n{table}\n"
    (RESULTS / f"reviews_{name}.md").write_text("\n".join([head, *pages]))
    fill(REPO / "docs" / "real_models.md", f"reviews of {name}", f"{table}\n\n({made})")
    print(table)


if __name__ == "__main__":
    guarded(main)
