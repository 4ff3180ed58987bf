"""Scripts of BFCL tasks: the ground truth is valid as played, a fault is what it says, where it says, from its seed
alone; and what the benchmark that plays them counts."""

import ast
import json
import re

import pytest

from benchmarks import bfcl_scripted, pages
from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.envs.bfcl import Bfcl, script
from hintsd_jax.envs.bfcl.tasks import CATEGORIES, bfcl_tasks
from hintsd_jax.envs.call_reading import BARE, STYLES
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from tests.helpers import make_tokenizer

pytest.importorskip("bfcl_eval", reason="the benchmark's wheel is not installed: run `make bfcl`")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Every task of the eval split: 20 indices in each category."""
    return bfcl_tasks("eval", str(tmp_path_factory.mktemp("tasks")))[:]


def play(task, actions):
    """The last `StepResult`, and how many of the actions were played."""
    environment = Bfcl()
    environment.reset(task)
    for number, action in enumerate(actions, 1):
        result = environment.step(parse_action(action))
        if result.terminated or result.truncated:
            return result, number
    raise AssertionError("the actions ended before the episode")


@pytest.mark.parametrize("one_call_a_step", [False, True])
def test_the_ground_truth_is_valid(tasks, one_call_a_step):
    assert {task["category"] for task in tasks} == set(CATEGORIES)
    for task in tasks:
        played = script.ground_truth(task, one_call_a_step)
        turn, number = play(task, played.actions)
        assert (turn.reward, turn.terminated, number) == (1.0, True, len(played.actions)), task["id"]
        assert (played.fault, played.step) == ("", 0)


@pytest.mark.parametrize("style", STYLES)
def test_the_ground_truth_is_valid_in_every_style_of_calls(tasks, style):
    """Numbers, lists and dictionaries too, which XML reads by the benchmark's own documentation of tools."""
    for task in tasks[::5]:
        environment = Bfcl()
        tools = list(environment.reset(task).tools)
        for action in script.ground_truth(task, style=style).actions:
            result = environment.step(parse_action(action, style, tools=tools))
            tools += result.tools
        assert (result.reward, result.terminated) == (1.0, True), task["id"]


def test_turns_calls_and_closing_texts(tasks):
    for task in tasks:
        turns = json.loads(task["ground_truth"])
        wanted = [
            name for turn in turns for name in [*(ast.parse(call, mode="eval").body.func.id for call in turn), None]
        ]
        names = [[call.name for call in parse_action(text).calls] for text in script.ground_truth(task, True).actions]
        assert [group[0] if group else None for group in names] == wanted and all(len(group) < 2 for group in names)
        together = [[call.name for call in parse_action(text).calls] for text in script.ground_truth(task).actions]
        flat = lambda groups: [name for group in groups for name in group]
        assert flat(together) == flat(names) and len(together) == sum(1 + bool(turn) for turn in turns)
    bare = script.ground_truth(tasks[0], style=BARE).actions[0]
    assert parse_action(bare, BARE).calls == parse_action(script.ground_truth(tasks[0]).actions[0]).calls != ()


@pytest.mark.parametrize("fault", script.FAULTS)
def test_a_fault_is_one_change_at_its_step(tasks, fault):
    count = failed = 0
    drawn = set()
    for task in tasks:
        faulty = script.with_fault(task, fault, seed=3)
        assert faulty == script.with_fault(task, fault, seed=3)
        if faulty is None:
            assert not script.sites(task, fault)
            continue
        count += 1
        right = script.ground_truth(task, True).actions
        at = faulty.step - 1
        assert faulty.fault == fault and faulty.actions[:at] == right[:at] and faulty.actions[at] != right[at]
        old, new = parse_action(right[at]).calls, parse_action(faulty.actions[at]).calls
        rest, wanted_rest = faulty.actions[at + 1 :], right[at + 1 :]
        match fault:
            case "dropped_call":
                assert faulty.actions[at:] == right[at + 1 :]
            case "wrong_argument":
                assert (
                    rest == wanted_rest
                    and new[0].name == old[0].name
                    and new[0].arguments.keys() == old[0].arguments.keys()
                )
                changed = [name for name, value in new[0].arguments.items() if value != old[0].arguments[name]]
                assert len(changed) == 1 and type(new[0].arguments[changed[0]]) is type(old[0].arguments[changed[0]])
            case "wrong_tool":
                assert (
                    rest == wanted_rest
                    and new[0].name != old[0].name
                    and new[0].arguments.items() <= old[0].arguments.items()
                )
                documented = {tool["name"]: tool["parameters"] for tool in Bfcl().reset(task).tools}[new[0].name]
                assert set(documented["required"]) <= new[0].arguments.keys() <= documented["properties"].keys()
            case "wrong_order":
                assert (
                    (faulty.actions[at], rest[0]) == (right[at + 1], right[at])
                    and rest[1:] == wanted_rest[1:]
                    and rest[0] != script.DONE
                )
            case "early_stop":
                assert set(faulty.actions[at:]) == {script.DONE} and faulty.actions.count(script.DONE) == right.count(
                    script.DONE
                )
        failed += play(task, faulty.actions)[0].reward == 0
        drawn |= {script.with_fault(task, fault, seed).step for seed in range(5)} if task is tasks[0] else set()
    share = {"dropped_call": 0.95, "wrong_argument": 0.8, "wrong_tool": 0.95, "wrong_order": 0.2, "early_stop": 1.0}[
        fault
    ]
    assert count >= 60 and share <= failed / count <= (1.0 if fault != "wrong_order" else 0.7)
    assert len(drawn) > 1  # another seed, another place


def test_a_fault_at_a_chosen_site(tasks):
    task = next(task for task in tasks if len(script.sites(task, "wrong_order")) > 1)
    steps = [script.with_fault(task, "wrong_order", 0, site).step for site in script.sites(task, "wrong_order")]
    assert steps == sorted(set(steps))
    with pytest.raises(ValueError, match="no place for wrong_order at .99, 0."):
        script.with_fault(task, "wrong_order", 0, (99, 0))
    with pytest.raises(ValueError, match="no fault 'typo': choose one of dropped_call"):
        script.with_fault(task, "typo", 0)


# --- the benchmark that plays them through the whole loop ---


def test_the_loop_scores_scripts_as_the_environment_does(tmp_path):
    whole = bfcl_scripted.all_tasks(str(tmp_path), ("multi_turn_base", "multi_turn_long_context"))
    names = ("base_198", "base_199", "long_context_0", "long_context_1")
    assert [task["id"] for task in whole[198:202]] == [f"multi_turn_{name}" for name in names]
    # 34 calls in a user turn that is the first of two, and 34 in the only one: one call a step passes the benchmark's
    # limit.
    some = [
        *whole[::40],
        *(task for task in whole if task["id"] in ("multi_turn_long_context_38", "multi_turn_long_context_46")),
    ]
    chat = ChatFormat(make_tokenizer())
    result = bfcl_scripted.truth(chat, some)
    assert (
        result["tasks"] == {"multi_turn_base": 5, "multi_turn_long_context": 7}
        and sum(result["valid"].values()) == 24 - 2
    )
    assert [(task_id, way, calls) for task_id, way, calls, _ in result["failed"]] == [
        ("multi_turn_long_context_38", "apart", 34),
        ("multi_turn_long_context_46", "apart", 34),
    ]
    for row in bfcl_scripted.faults(chat, some):
        # without the two that cannot be solved so
        scripts = [(task, script.with_fault(task, row["fault"], 0)) for task in some[:-2]]
        rewards = [play(task, faulty.actions)[0].reward for task, faulty in scripts if faulty]
        assert (row["made"], row["failed"]) == (len(rewards), rewards.count(0))


def test_attribution_is_measured_against_the_injected_step():
    def episode(*named):
        faults = None if named == (None,) else tuple(Fault(step, "so") for step in named)
        return Episode("t", 0, (), report=Report("", faults))

    # (named, injected): right; right and one too many; later by two; earlier by one; nothing named; not known; a fourth
    # is cut off
    failed = [(episode(3), 3), (episode(2, 5), 5), (episode(4), 2), (episode(1), 2), (episode(), 1), (episode(None), 1)]
    result = bfcl_scripted.attribution([*failed, (episode(1, 2, 3, 4), 4)])
    assert (result["failed"], result["targets"], result["later"], result["earlier"]) == (7, 8, 1, 2)
    assert result["dropped"] == {"nothing_named": 1, "no_report": 1, "over_limit": 1}
    assert result["precision"] == pytest.approx(2 / 8) and result["recall"] == pytest.approx(2 / 6)


def test_the_tables_stand_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- scripted: made by benchmarks/bfcl_scripted.py -->\nold\n<!-- scripted: end -->\nafter\n"
    )
    row = {
        "fault": "early_stop",
        "made": 8,
        "failed": 4,
        "targets": 6,
        "later": 1,
        "earlier": 0,
        "dropped": {},
        "precision": 0.5,
        "recall": 0.75,
    }
    text = bfcl_scripted.tables({"faults": {"made": "today", "result": [row]}})
    assert "| 8 | 4 (50.0%) | 1.50 | 50.0% | 75.0% | 1 / 0 |" in re.sub(" +", " ", text) and text.endswith("(today)")
    for _ in range(2):
        pages.fill(page, "scripted", text)
    head, rest = page.read_text().split(text)
    assert head.startswith("before\n<!--") and rest.endswith("-->\nafter\n") and "old" not in page.read_text()
