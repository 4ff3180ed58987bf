# SPDX-License-Identifier: Apache-2.0

"""Scripts of AppWorld tasks for the scripted policy: a task in, the texts of an episode's actions out: the reference
solution, or the reference with one fault at a known step.

A reference is the body of `solution` in a task's ground truth, one statement a step, in the form that `prompt.SYSTEM`
asks for; one that returns early is played as a whole, and has no place for a fault. After a fault all goes on as the
reference has it; what then no longer works is an error in the output, as always. Every script ends with a step that
completes the task, should it still be open.

Invariant: everything follows from the task, its ground truth, the kind of fault and the seed. Scripts know the ground
truth: they are for measuring the loop, the scores and hindsight, never for training.
"""

import ast
import copy
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hintsd_jax.envs.appworld.prompt import render_code
from hintsd_jax.envs.appworld.tasks import GET_DATA, task_folder
from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.script import Script, choose_site
from hintsd_jax.errors import UserError

FAULTS = {
    "dropped_step": "one statement with a call of an API is left out",
    "wrong_argument": "one constant argument of an API has another value of its type",
    "wrong_answer": "the task is completed with another answer",
    "early_stop": "the task is completed before anything was changed",
}
COMPLETE = "complete_task"
END = render_code("That is all I can do.", "apis.supervisor.complete_task()")
FILES = ("compiled_solution.py", "solution.py")

Site = int
"""A statement of the reference, 0-based."""


def ground_truth(task: Mapping[str, Any], root: str) -> Script:
    """The reference's steps. Raises UserError where the root holds none."""
    statements = _statements(task, root)
    if _returns(statements):
        return Script((render_code("I do it all at once.", f"{_source(task['id'], root)}\nsolution(apis, None)"), END))
    return Script((*map(_text, statements), END))


def sites(task: Mapping[str, Any], fault: str, root: str) -> list[Site]:
    """Where a kind of fault can be put into a task.

    Raises ValueError for a kind that is not in `FAULTS`.
    """
    if fault not in FAULTS:
        raise ValueError(f"no fault {fault!r}: choose one of {', '.join(FAULTS)}")
    statements = _statements(task, root)
    if _returns(statements):
        return []
    return [n for n in range(len(statements)) if _faulty(statements, fault, n, random.Random(0)) is not None]


def with_fault(task: Mapping[str, Any], fault: str, seed: int, root: str, site: Site | None = None) -> Script | None:
    """The reference with one fault: at `site` (one of `sites(task, fault, root)`), or at one that the seed draws.

    None where the task has no place for it. Raises ValueError for another kind or site.
    """
    rng, site = choose_site(task["id"], fault, seed, sites(task, fault, root), site)
    statements = None if site is None else _faulty(_statements(task, root), fault, site, rng)
    if site is None or statements is None:
        return None
    return Script((*map(_text, statements), END), fault, site + 1)


def _faulty(statements: list[ast.stmt], fault: str, n: int, rng: random.Random) -> list[ast.stmt] | None:
    """The statements with the fault in the n-th; None where it has no place there."""
    before, statement, after = statements[:n], statements[n], statements[n + 1 :]
    completes = bool(_calls(statement, COMPLETE))
    match fault:
        case "dropped_step":
            return [*before, *after] if not completes and _calls(statement) and after else None
        case "wrong_argument":
            changed = None if completes else _changed(statement, rng)
            return None if changed is None else [*before, changed, *after]
        case "wrong_answer":
            answered = [call for call in _calls(statement, COMPLETE) if any(k.arg == "answer" for k in call.keywords)]
            return [*before, _parsed("apis.supervisor.complete_task(answer='none of these')")] if answered else None
        case "early_stop":
            looks = n > 0 and not any(map(_changes, before))
            return [*before, _parsed("apis.supervisor.complete_task()")] if looks and _changes(statement) else None
    return None


def _changes(statement: ast.stmt) -> bool:
    """Whether a statement may change something: it has a call of an API that does more than log in and look up."""
    looking = ("login", "show_", "search_", "list_", "get_")
    return any(
        not call.func.attr.startswith(looking) for call in _calls(statement) if isinstance(call.func, ast.Attribute)
    )


def _calls(node: ast.AST, name: str = "") -> list[ast.Call]:
    """The calls `apis.APP.NAME(...)` in a statement; of any API where no name is given."""
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Attribute)
        and isinstance(call.func.value.value, ast.Name)
        and call.func.value.value.id == "apis"
        and name in ("", call.func.attr)
    ]


def calls_in(code: str) -> tuple[ToolCall, ...]:
    """The calls of APIs that a code has, in no particular order, named APP.API, each argument as it is written; none of
    what is no Python.
    """
    try:
        found = _calls(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    arguments = lambda call: {str(keyword.arg): ast.unparse(keyword.value) for keyword in call.keywords}
    return tuple(ToolCall(ast.unparse(call.func).removeprefix("apis."), arguments(call)) for call in found)


def _changed(statement: ast.stmt, rng: random.Random) -> ast.stmt | None:
    statement = copy.deepcopy(statement)
    constants = [
        keyword.value
        for call in _calls(statement)
        for keyword in call.keywords
        if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str | int | float)
    ]
    if not constants:
        return None
    constant = rng.choice(constants)
    value: Any = constant.value
    if isinstance(value, bool):
        constant.value = not value
    else:
        constant.value = f"{value} 2" if isinstance(value, str) else value + rng.choice((1, 2, 10))
    return statement


def _statements(task: Mapping[str, Any], root: str) -> list[ast.stmt]:
    """The imports and definitions around `solution`, if any, as one statement each, then its own."""
    module = _parse(task["id"], _source(task["id"], root))
    solution = next((n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == "solution"), None)
    body = module.body
    if solution is not None:
        body = [*(n for n in module.body if n is not solution and not _is_text(n)), *solution.body]
    return [statement for statement in body if not _is_text(statement)]


def _returns(statements: list[ast.stmt]) -> bool:
    """Whether a solution returns before its last statement, outside of its own functions."""
    pending: list[ast.AST] = list(statements)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Return):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            pending += list(ast.iter_child_nodes(node))
    return False


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _source(task_id: str, root: str) -> str:
    folder = task_folder(root, task_id) / "ground_truth"
    for file in (folder / name for name in FILES):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    together = Path(root).expanduser() / "solutions.json"  # of an invented root
    if together.is_file():
        return json.loads(together.read_text(encoding="utf-8"))[task_id]
    raise UserError(f"no reference solution of task {task_id} in {folder} ({', '.join(FILES)}): {GET_DATA}")


def _parse(task_id: str, source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"the reference solution of task {task_id} is not Python: {error}") from error


def _parsed(code: str) -> ast.stmt:
    return ast.parse(code).body[0]


def _text(statement: ast.stmt) -> str:
    names = sorted({call.func.attr for call in _calls(statement) if isinstance(call.func, ast.Attribute)})
    thought = f"Next: {', '.join(names).replace('_', ' ')}." if names else "I work with what I have."
    return render_code(thought, ast.unparse(statement))
