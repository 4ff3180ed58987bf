"""BFCL's dialogue: messages, tools that come later, limits and ends, in both formats; what is cut for the agent."""

import json

import pytest

from hintsd_jax.envs.base import Action
from hintsd_jax.envs.bfcl.env import MAX_EPISODE_STEPS, MAX_TURN_STEPS, Bfcl
from hintsd_jax.envs.bfcl.execute import tool_docs
from tests.bfcl_helpers import DONE, action_of, answer_of, call, entry_of, parse_action, play, task_of, tasks

NOTE = " Note that the provided function is in Python 3 syntax."
MORE_TOOLS = "I have updated some more functions you can choose from. What about now?"
NOTHING = Action("", (call("no_such_tool"),))


def docs_of(task):
    return [doc for name in entry_of(task)["involved_classes"] for doc in tool_docs(name)]


@pytest.mark.parametrize("category", ["base", "miss_param", "long_context"])
def test_tools_and_messages_are_the_official_ones(category):
    for task in tasks(category)[::20]:
        start = Bfcl().reset(task)
        assert list(start.messages) == entry_of(task)["question"][0]
        assert list(start.tools) == [doc | {"description": doc["description"] + NOTE} for doc in docs_of(task)]
        assert not any("Python 3 syntax" in doc["description"] for doc in docs_of(task))  # shared, unchanged
        _, _, results = play(task)
        questions = [list(r.messages) for r in results if not any(m["role"] == "tool" for m in r.messages)]
        assert questions == entry_of(task)["question"][1:] + [[]]
        assert not any(result.tools for result in results)


def test_tools_that_come_later_come_with_the_user_turn_that_announces_them():
    for task in tasks("miss_func"):
        ((turn, names),) = entry_of(task)["missed_function"].items()
        start = Bfcl().reset(task)
        docs = docs_of(task)
        assert list(start.tools) == [
            doc | {"description": doc["description"] + NOTE} for doc in docs if doc["name"] not in names
        ]
        _, last, results = play(task)
        assert last.reward == 1.0
        closing = [result for result in results if all(m["role"] == "user" for m in result.messages)]
        for index, result in enumerate(closing, 1):
            if index == int(turn):
                assert result.messages == ({"role": "user", "content": MORE_TOOLS},)
                # without the note
                assert list(result.tools) == [next(doc for doc in docs if doc["name"] == name) for name in names]
            else:
                assert list(result.messages) == (entry_of(task)["question"] + [[]])[index] and not result.tools


def test_a_tool_that_comes_later_can_be_called_before():
    """The benchmark's executor finds the method on the backend, whatever the list says."""
    task = task_of("miss_func", 0)
    assert entry_of(task)["missed_function"] == {"3": ["sort"]}
    environment = Bfcl()
    environment.reset(task)
    (message,) = environment.step(action_of(call("sort", file_name="no_such_file"))).messages
    assert message["content"] == '{"error": "sort: no_such_file: No such file or directory"}'


@pytest.mark.parametrize(
    "text", ["", "Sorry.", "<tool_call>\n{not json}\n</tool_call>", '<tool_call>\n{"name": "ls"}\n</tool_call>']
)
def test_an_action_without_a_readable_call_ends_the_user_turn_as_in_the_official_handler(text):
    task = task_of("base", 0)
    environment = Bfcl(unreadable_calls="end_turn")
    environment.reset(task)
    for question in entry_of(task)["question"][1:]:
        assert list(environment.step(parse_action(text)).messages) == question
    last = environment.step(parse_action(text))
    assert (last.reward, last.terminated) == (0.0, True)
    assert "user turn 1 of" in environment.report().summary and environment.report().faults[0].step == 1


def test_the_official_step_limit():
    task = next(task for task in tasks("base") if len(json.loads(task["ground_truth"])) > 1)
    environment = Bfcl()
    environment.reset(task)
    turns = [environment.step(NOTHING) for _ in range(MAX_TURN_STEPS + 1)]
    assert not any(turn.truncated or turn.terminated for turn in turns[:-1])
    assert turns[-1].truncated and turns[-1].messages and turns[-1].reward == 0
    assert (
        environment.failure.error_type == "multi_turn:force_terminated"
        and "more than 20 steps" in environment.report().summary
    )
    # In the last turn the limit only ends the turn: the episode is still scored.
    answer = answer_of(task)
    environment.reset(task)
    for calls in answer[:-1]:
        environment.step(action_of(*calls))
        environment.step(Action(DONE))
    environment.step(action_of(*answer[-1]))
    turns = [environment.step(NOTHING) for _ in range(MAX_TURN_STEPS)]
    assert turns[-1].terminated and turns[-1].reward == 1.0


UNREADABLE = ("<tool_call>\n{not json}\n</tool_call>", '{"name": "ls", "arguments": {}}', "[ls()]")


@pytest.mark.parametrize("text", UNREADABLE)
def test_an_agent_is_told_that_its_call_could_not_be_read(text):
    action = parse_action(text)
    for form in ("official", "paper"):
        environment = Bfcl(format=form)
        environment.reset(task_of("base", 0))
        (message,) = environment.step(action).messages
        assert message["role"] == ("tool" if form == "official" else "user") and action.problem in message[
            "content"
        ].replace('\\"', '"')
        # the user turn goes on, and the step counts towards the limit
        assert "tool_call" in environment.step(NOTHING).messages[0]["content"] or form == "official"
        later = [environment.step(action) for _ in range(MAX_TURN_STEPS - 1)]
        assert [turn.truncated for turn in later].index(True) == (18 if form == "official" else 17)
        assert environment.report().faults[0].step == 1
    # plain text ends it, and so does everything without a call where the handler's rule is asked for
    for option, said in (("tell", "Done."), ("end_turn", text)):
        environment = Bfcl(unreadable_calls=option)
        environment.reset(task_of("base", 0))
        assert list(environment.step(parse_action(said)).messages) == entry_of(task_of("base", 0))["question"][1]


def test_calls_that_the_handler_would_not_read_are_run_where_the_trainer_reads_them():
    action = parse_action('<tool_call>{"name": "pwd", "arguments": {}}</tool_call>')
    assert len(action.calls) == 1
    for option, role in (("tell", "tool"), ("end_turn", "user")):
        environment = Bfcl(unreadable_calls=option)
        environment.reset(task_of("base", 0))
        assert environment.step(action).messages[0]["role"] == role


def test_a_turn_that_was_right_and_went_on_to_the_limit_is_faulted_where_it_began_to_waste_steps():
    task = next(task for task in tasks("base") if len(json.loads(task["ground_truth"])) > 1)
    environment = Bfcl()
    environment.reset(task)
    environment.step(action_of(*answer_of(task)[0]))
    while not environment.step(NOTHING).truncated:
        pass
    (fault,) = environment.report().faults
    assert fault.step == 2 and "more than 20 steps in one user turn" in fault.feedback


LOOK, SEEN = action_of(call("pwd")), action_of(call("ls"))


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ([LOOK, SEEN, LOOK, SEEN], 3),  # repeats what it knows
        ([LOOK, NOTHING, SEEN, NOTHING], 2),  # an error
        ([LOOK, SEEN, parse_action("<tool_call>")], 3),  # unreadable
        ([action_of(call("pwd"), call("no_such_tool")), SEEN], 2),  # something new in every step: the last
        ([NOTHING, "close", LOOK, SEEN], 1),  # nothing wasted in the open turn, but before
        ([NOTHING, LOOK, LOOK, "close", SEEN, LOOK, action_of(call("pwd"), call("ls"))], 7),  # the open turn first
        ([LOOK, "close", LOOK], 3),  # another turn: no repetition
    ],
)
def test_an_episode_that_a_limit_has_cut_is_at_fault_where_it_wasted_steps(steps, fault):
    """The host loop's limits: the environment does not know of them, and no turn that ended was wrong."""
    task = next(task for task in tasks("miss_param") if not answer_of(task)[0])  # nothing to do in the first turn
    for form in ("official", "paper") if "close" not in steps else ("official",):
        environment = Bfcl(format=form, ground_truth_in_report=True)
        environment.reset(task | {"split": "train"})
        for step in steps:
            environment.step(Action(DONE) if step == "close" else step)
        report = environment.report()
        (found,) = report.faults
        assert found.step == fault and "before this user turn was done" in found.feedback
        assert f"- step {fault}: " in report.summary and "not finished" in report.summary
    expected = json.loads(task["ground_truth"])[steps.count("close")]
    assert all(text in found.feedback for text in expected)


def test_a_turn_that_its_limit_has_ended_is_at_fault_where_it_wasted_steps():
    """In the last turn, and before; what was really wrong beside it is named too."""
    task = task_of("base", 0)
    answer = answer_of(task)
    for turn in (1, len(answer) - 1):
        for broken in (False, True):
            environment = Bfcl()
            environment.reset(task)
            for calls in answer[:turn]:
                environment.step(action_of(*calls))
                environment.step(Action(DONE))
            first = 2 * turn + 1
            environment.step(action_of(call("mkdir", dir_name="wrong")) if broken else LOOK)
            results = [environment.step(LOOK) for _ in range(MAX_TURN_STEPS)]
            assert results[-1].truncated or results[-1].terminated
            steps = {fault.step: fault.feedback for fault in environment.report().faults}
            # the second look is the first that brings nothing new
            assert sorted(steps) == ([first, first + 2] if broken else [first + 1])
            assert "ended without a call of" in steps[max(steps)]


def test_an_unfinished_episode_reports_what_is_known():
    environment = Bfcl()
    environment.reset(task_of("base", 0))
    report = environment.report()
    assert report.faults is None and report.valid_turns == () and "not finished" in report.summary
    environment.step(Action(DONE))
    assert environment.report().faults[0].step == 1 and environment.report().valid_turns == (False,)


def test_long_results_are_cut_for_the_agent_and_scored_whole():
    for task in tasks()[::90]:
        _, last, turns = play(task, environment=Bfcl(max_observation_chars=10))
        assert last.reward == play(task)[1].reward == 1.0
        texts = [message["content"] for turn in turns for message in turn.messages if message["role"] == "tool"]
        assert any("[cut: the first 10 of " in text for text in texts)
        assert all(len(text) <= 10 or "[cut: " in text for text in texts)


# --- the paper's format ---


def test_the_papers_format_writes_results_in_a_user_message_and_shows_no_new_tools():
    task = task_of("miss_func", 0)
    start = Bfcl(format="paper").reset(task)
    assert [tool["description"] for tool in start.tools] == [
        doc["description"] for doc in docs_of(task) if doc["name"] != "sort"
    ]
    environment = Bfcl(format="paper")
    environment.reset(task)
    (message,) = environment.step(action_of(call("cd", folder="no"), call("pwd"))).messages
    first, second = (
        json.loads(part.removesuffix("\n</tool_call>\n")) for part in message["content"].split("<tool_call>\n")[1:]
    )
    assert message["role"] == "user" and first["name"] == "cd_1" and "error" in first["content"]
    assert second["name"] == "pwd_2" and set(second["content"]) == {"current_working_directory"}
    turns = [environment.step(Action(DONE)) for _ in range(3)]
    assert turns[-1].messages == ({"role": "user", "content": MORE_TOOLS},) and turns[-1].tools == ()


def test_the_papers_format_passes_the_ground_truth_where_every_user_turn_has_a_call():
    passed = 0
    for task in tasks()[::5]:
        environment, last, _ = play(task, environment=Bfcl(format="paper"))
        silent = [turn for turn, calls in enumerate(answer_of(task)) if not calls]
        assert (last.reward, last.terminated) == (float(not silent), True)
        passed += not silent
        if silent:
            assert (
                environment.failure.error_type == "multi_turn:force_terminated"
                and environment.failure.turn == silent[0]
            )
            (fault,) = environment.report().faults
            assert fault.step == sum(1 + bool(calls) for calls in answer_of(task)[: silent[0] + 1])
            assert "no tool was called" in fault.feedback
    assert 70 < passed < 90


def test_the_papers_format_has_twenty_steps_an_episode_and_no_limit_a_turn():
    environment = Bfcl(format="paper")
    environment.reset(task_of("base", 0))
    turns = [environment.step(NOTHING) for _ in range(MAX_EPISODE_STEPS)]
    assert not any(turn.truncated or turn.terminated for turn in turns[:-1])
    assert turns[-1].truncated and turns[-1].reward == 0 and turns[-1].messages
    # The twentieth step may still be the one that ends the episode.
    task = next(task for task in tasks("base") if len(answer_of(task)) == 2 and all(answer_of(task)))
    environment.reset(task)
    first, second = answer_of(task)
    actions = [action_of(*first), *[NOTHING] * 16, Action(DONE), action_of(*second), Action(DONE)]
    last = [environment.step(action) for action in actions][-1]
    assert len(actions) == MAX_EPISODE_STEPS and last.terminated and last.reward == 1.0
