"""Does the BFCL environment score as the benchmark's own executor and checker do? Counts disagreements over seeded
answers.

  python -m benchmarks.bfcl_agreement --out=benchmarks/results/bfcl_agreement.md

Three kinds of answers to the 800 tasks: the ground truth (whose result texts are compared too), the ground truth with
one or two faults of the kinds that a policy makes, and random calls after the tools' schemas. Each is played through
the environment and given to the official `multi_turn_checker`; what is compared is (valid, error type).

The official executor keeps its instances in module globals under a name: every check gets a new name, and they are
removed afterwards. Its long contexts are shared between instances: what a check has changed in them is put back.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import importlib
import inspect
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import markdown_table
from hintsd_jax.envs.base import Action, ToolCall
from hintsd_jax.envs.bfcl.env import Bfcl
from hintsd_jax.envs.bfcl.execute import Backends, tool_docs
from hintsd_jax.envs.bfcl.tasks import CATEGORIES, WHEEL_VERSION, read_json_lines

Answer = list[list[ToolCall]]  # [turn][call]

_MULTI_TURN = "bfcl_eval.eval_checker.multi_turn_eval"
_fresh = itertools.count()


def all_tasks(categories: Sequence[str] = CATEGORIES) -> list[dict[str, str]]:
    """Task mappings as `tasks/bfcl.py` makes them, read from the wheel here."""
    tasks = []
    for category in categories:
        answers = {
            item["id"]: item["ground_truth"] for item in read_json_lines(f"possible_answer/BFCL_v4_{category}.json")
        }
        for entry in read_json_lines(f"BFCL_v4_{category}.json"):
            texts = {"entry": json.dumps(entry), "ground_truth": json.dumps(answers[entry["id"]])}
            tasks.append({"id": entry["id"], "split": "test", "category": category} | texts)
    return tasks


def tool_function(name: str, class_names: Sequence[str]) -> Any:
    """The wheel's function behind a tool name."""
    paths = importlib.import_module("bfcl_eval.constants.executable_backend_config").CLASS_FILE_PATH_MAPPING
    for class_name in reversed(class_names):
        if any(doc["name"] == name for doc in tool_docs(class_name)):
            return getattr(getattr(importlib.import_module(paths[class_name]), class_name), name)
    raise KeyError(name)


def answer_of(task: Mapping[str, str]) -> Answer:
    """The ground truth as [turn][ToolCall], read here on its own: an oracle does not use the code under test."""
    class_names = json.loads(task["entry"])["involved_classes"]
    answer = []
    for turn in json.loads(task["ground_truth"]):
        calls = []
        for text in turn:
            node = ast.parse(text, mode="eval").body
            keywords = {item.arg: ast.literal_eval(item.value) for item in node.keywords}
            positional = [ast.literal_eval(item) for item in node.args]
            bound = inspect.signature(tool_function(node.func.id, class_names)).bind(None, *positional, **keywords)
            bound.arguments.pop("self")
            calls.append(ToolCall(node.func.id, dict(bound.arguments)))
        answer.append(calls)
    return answer


def corrupted(answer: Answer, class_names: Sequence[str], rng: random.Random) -> Answer:
    """The answer with one or two faults of the kinds that a policy makes."""
    answer = [[ToolCall(call.name, dict(call.arguments)) for call in calls] for calls in answer]
    for _ in range(rng.randint(1, 2)):
        turn = rng.choice([index for index, calls in enumerate(answer) if calls] or [0])
        calls = answer[turn]
        if not calls:
            break
        at = rng.randrange(len(calls))
        match rng.choice(
            ("drop", "double", "swap", "argument", "extra argument", "tool", "insert", "undefined", "move", "empty")
        ):
            case "drop":
                del calls[at]
            case "double":
                calls.insert(at, calls[at])
            case "swap":
                rng.shuffle(calls)
            case "argument" if calls[at].arguments:
                key = rng.choice(sorted(calls[at].arguments))
                calls[at].arguments[key] = rng.choice(
                    [0, -1, 2.5, "", "x", None, True, [], ["a", 1], {"a": 1}, "document", 10**6]
                )
            case "extra argument":
                calls[at].arguments["unknown"] = 1
            case "tool" | "insert" as kind:
                calls[at : at + (kind == "tool")] = [random_call(class_names, ["document"], rng)]
            case "undefined":
                calls.insert(at, ToolCall("no_such_tool", {"a": 1}))
            case "move":
                answer[rng.randrange(len(answer))].append(calls.pop(at))
            case "empty":
                calls.clear()
    return answer


def random_call(class_names: Sequence[str], values: Sequence[Any], rng: random.Random) -> ToolCall:
    """A call after the documentation of a random tool; `values` are words and numbers of the task to draw from."""
    doc = rng.choice([doc for name in class_names for doc in tool_docs(name)])
    required = doc["parameters"].get("required", [])
    arguments = {
        key: _value(schema, values, rng)
        for key, schema in doc["parameters"]["properties"].items()
        if rng.random() < (0.97 if key in required else 0.5)
    }
    return ToolCall(doc["name"], arguments)


def random_answer(task: Mapping[str, str], rng: random.Random) -> Answer:
    """Random calls among some of the ground truth's, so that some turns come out right."""
    entry = json.loads(task["entry"])
    values = [value for value in _leaves(entry["initial_config"]) if not isinstance(value, str) or len(value) < 80][
        :200
    ] or ["x"]
    answer = []
    for calls in answer_of(task):
        kept = calls if rng.random() < 0.7 else [call for call in calls if rng.random() < 0.5]
        extra = [random_call(entry["involved_classes"], values, rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 4)))]
        for call in extra:
            kept = [*kept[: (at := rng.randint(0, len(kept)))], call, *kept[at:]]
        answer.append(list(kept))
    return answer


def _value(schema: Mapping[str, Any], values: Sequence[Any], rng: random.Random) -> Any:
    if "enum" in schema and rng.random() < 0.9:
        return rng.choice(schema["enum"])
    if rng.random() < 0.03:  # of another type than the schema says
        return rng.choice([None, "", -1, True, [], {"a": 1}, "x"])
    match schema.get("type"):
        case "integer":
            return rng.choice(
                [0, 1, 2, 5, 10, -1, 30, *(value for value in values if isinstance(value, int) and abs(value) < 1000)]
            )
        case "float" | "number":
            return rng.choice([0, 1, 2.5, 10.0, -3.25, 1000])
        case "boolean":
            return rng.random() < 0.5
        case "array":
            return [_value(schema.get("items", {}), values, rng) for _ in range(rng.randint(0, 3))]
        case "dict" | "object":
            return {key: _value(inner, values, rng) for key, inner in schema.get("properties", {}).items()}
    return rng.choice(["x", "a.txt", *(str(value) for value in values)])


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


class Official:
    """The benchmark's executor and checker, every check as if it were the first."""

    def __init__(self):
        self._utils = importlib.import_module(f"{_MULTI_TURN}.multi_turn_utils")
        self._checker = importlib.import_module(f"{_MULTI_TURN}.multi_turn_checker")
        shared = vars(importlib.import_module(f"{_MULTI_TURN}.func_source_code.long_context"))
        self._shared = {
            name: value for name, value in shared.items() if name.isupper() and isinstance(value, dict | list)
        }
        self._before = copy.deepcopy(self._shared)
        self.leaks = 0  # checks that changed a long context

    def verdict(
        self, task: Mapping[str, str], steps: Sequence[Sequence[Sequence[ToolCall]]]
    ) -> tuple[bool, str | None]:
        """(valid, error type) of [turn][step][call]."""
        texts = [[[_text(call) for call in step] for step in turn] for turn in steps]
        with _Fresh(self) as name:
            entry, ground_truth = json.loads(task["entry"]), json.loads(task["ground_truth"])
            verdict = self._checker.multi_turn_checker(texts, ground_truth, entry, task["category"], name)
        return verdict["valid"], verdict.get("error_type")

    def texts(self, task: Mapping[str, str]) -> list[str]:
        """The results of the ground truth's calls."""
        entry, calls = json.loads(task["entry"]), [call for turn in json.loads(task["ground_truth"]) for call in turn]
        long_context = "long_context" in task["id"]
        with _Fresh(self) as name:
            where = (entry["initial_config"], entry["involved_classes"], name, entry["id"], long_context)
            return self._utils.execute_multi_turn_func_call(calls, *where)[0]


class _Fresh:
    """A name that the executor has not seen; afterwards nothing of it is left."""

    def __init__(self, official: Official):
        self._official = official

    def __enter__(self) -> str:
        self._names = set(vars(self._official._utils))
        return f"check{next(_fresh)}"

    def __exit__(self, *exception: object) -> None:
        official = self._official
        for name in set(vars(official._utils)) - self._names:
            del vars(official._utils)[name]
        if official._shared != official._before:
            official.leaks += 1
            for name, value in official._shared.items():
                value.clear()
                (value.update if isinstance(value, dict) else value.extend)(copy.deepcopy(official._before[name]))


def _text(call: ToolCall) -> str:
    return f"{call.name}({','.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


def steps_of(answer: Answer, rng: random.Random | None = None) -> list[list[list[ToolCall]]]:
    """All calls of a turn in one step; with `rng` cut into several, as a policy would make them."""
    steps = []
    for calls in answer:
        cuts = (
            sorted(rng.sample(range(1, len(calls)), rng.randint(0, min(3, len(calls) - 1))))
            if rng and len(calls) > 1
            else []
        )
        steps.append([calls[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(calls)])] if calls else [])
    return steps


def play(task: Mapping[str, str], steps: Sequence[Sequence[Sequence[ToolCall]]], env: Bfcl) -> tuple[bool, str | None]:
    """(valid, error type) by the environment."""
    env.reset(task)
    reward = 0.0
    for turn in steps:
        for step in turn:
            env.step(Action("", tuple(step)))
        reward = env.step(Action("Done.")).reward
    return reward == 1.0, None if reward or env.failure is None else env.failure.error_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corrupted", type=int, default=5_000)
    parser.add_argument("--random", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bfcl_agreement.md"))
    arguments = parser.parse_args()
    tasks, official, env = all_tasks(), Official(), Bfcl(unreadable_calls="end_turn")
    rng = random.Random(arguments.seed)
    apart: list[str] = []

    calls = different = 0
    for task in tasks:
        entry = json.loads(task["entry"])
        backends = Backends(entry["initial_config"], entry["involved_classes"], "long_context" in task["id"])
        ours = [backends.call(call.name, call.arguments) for turn in answer_of(task) for call in turn]
        theirs = official.texts(task)
        calls, different = calls + len(theirs), different + sum(a != b for a, b in zip(ours, theirs, strict=True))
    rows = [["result texts of the ground truth's calls", f"{calls:,}", different, ""]]

    def compare(what: str, answers: Iterator[tuple[Mapping[str, str], Answer]], cut: bool) -> None:
        began, count, wrong, official_verdicts = time.perf_counter(), 0, 0, collections.Counter()
        for task, answer in answers:
            steps = steps_of(answer, rng if cut else None)
            ours, theirs = play(task, steps, env), official.verdict(task, steps)
            count, wrong = count + 1, wrong + (ours != theirs)
            official_verdicts[theirs[1] or "valid"] += 1
            if ours != theirs:
                apart.append(f"{task['id']}: ours {ours}, official {theirs}: {steps}")
        named = [f"{name.removeprefix('multi_turn:')} {number:,}" for name, number in official_verdicts.most_common()]
        rows.append([what, f"{count:,}", wrong, ", ".join(named)])
        print(*rows[-1], f"{time.perf_counter() - began:.0f} s", sep=", ", flush=True)

    compare("ground truth", ((task, answer_of(task)) for task in tasks), cut=False)
    mixed = [tasks[number % len(tasks)] for number in range(max(arguments.corrupted, arguments.random))]
    classes = lambda task: json.loads(task["entry"])["involved_classes"]
    faulty = ((task, corrupted(answer_of(task), classes(task), rng)) for task in mixed[: arguments.corrupted])
    compare("corrupted", faulty, cut=True)
    compare("random", ((task, random_answer(task, rng)) for task in mixed[: arguments.random]), cut=True)

    text = (
        f"# Agreement with the official BFCL checker\n\n{time.strftime('%Y-%m-%d')}."
        f" `python -m benchmarks.bfcl_agreement --seed={arguments.seed}`, bfcl-eval {WHEEL_VERSION}, all four"
        " multi-turn categories. Compared: (valid, error type), and the texts of results. Checks after which the"
        f" official long contexts had to be put back: {official.leaks}.\n\n"
    )
    text += markdown_table(["answers", "count", "disagreements", "official verdicts"], rows, left=(0, 3)) + "\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    print(text, *apart[:20], sep="\n")


if __name__ == "__main__":
    main()
