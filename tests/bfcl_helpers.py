"""Shared by the tests of the BFCL environment: all tasks, and playing answers as text."""

import functools
import json

import pytest

pytest.importorskip("bfcl_eval", reason="the benchmark's wheel is not installed: run `make bfcl`")

from benchmarks.bfcl_agreement import all_tasks, answer_of
from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.bfcl.env import Bfcl
from hintsd_jax.envs.tool_calls import parse_action, render_call

DONE = "Done."  # an action without a call: the user turn ends


@functools.cache
def tasks(category=None):
    """The 200 tasks of a category, or all 800."""
    return tuple(all_tasks([f"multi_turn_{category}"] if category else all_categories()))


def all_categories():
    return [f"multi_turn_{name}" for name in ("base", "miss_func", "miss_param", "long_context")]


def task_of(category, index):
    return tasks(category)[index]


def entry_of(task):
    return json.loads(task["entry"])


def action_of(*calls):
    """Calls as a policy writes them, through the parser."""
    action = parse_action("\n".join(map(render_call, calls)))
    assert action.problem is None and len(action.calls) == len(calls)
    return action


def play(task, answer=None, environment=None, one_call_a_step=False):
    """Plays [turn][ToolCall], the ground truth by default; returns (environment, last StepResult, all Turns). Stops
    where the episode ends.
    """
    environment, turns = environment or Bfcl(), []
    environment.reset(task)
    for calls in answer_of(task) if answer is None else answer:
        groups = [[call] for call in calls] if one_call_a_step else [calls]
        for action in [*(action_of(*group) for group in groups if group), parse_action(DONE)]:
            turns.append(environment.step(action))
            if turns[-1].terminated or turns[-1].truncated:
                return environment, turns[-1], turns
    raise AssertionError("the answer ended before the episode")


def call(name, **arguments):
    return ToolCall(name, arguments)
