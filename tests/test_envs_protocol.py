"""The gate behind environments: what is right is copied, anything else is one clear line."""

import numpy as np
import pytest

from hintsd_jax.envs.base import Fault, Report, Start, StepResult
from hintsd_jax.envs.protocol import (
    MAX_FEEDBACK_CHARS,
    MAX_MESSAGE_CHARS,
    ProtocolError,
    checked,
    checked_tasks,
    checked_version,
    checked_words,
)
from hintsd_jax.errors import UserError

USER = {"role": "user", "content": "Go."}
START = Start((USER,))


def test_what_is_right_is_copied_in_plain_types():
    tool = {"name": "cat", "parameters": {}}
    message = dict(USER, more="is left out")
    start = checked("reset", Start([{"role": "system", "content": "Rules."}, message], [tool]))
    assert start == Start(({"role": "system", "content": "Rules."}, USER), ({"name": "cat", "parameters": {}},))
    result = checked("step", StepResult([message], np.float32(0.5), np.bool_(True), 0, [tool]))
    assert result == StepResult((USER,), 0.5, True, False, ({"name": "cat", "parameters": {}},))
    assert (type(result.reward), type(result.terminated), type(result.truncated)) == (float, bool, bool)
    tool["name"], message["content"] = "dog", "Stop."  # what the environment changes later stays its own
    assert start.tools == result.tools == ({"name": "cat", "parameters": {}},) and result.messages == (USER,)
    assert checked("step", StepResult((), terminated=True)) == StepResult((), terminated=True)
    assert checked("step", StepResult((), truncated=True)) == StepResult((), truncated=True)
    faults = (fault for fault in [Fault(1, "so")])  # may be read once only
    assert checked("report", Report("r", faults, [True, False]), steps=1) == Report(
        "r", (Fault(1, "so"),), (True, False)
    )
    assert checked("report", Report("r")) == Report("r", None, ())
    assert checked("close", "whatever") is None


class Sly:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name):
        raise ZeroDivisionError(f"{name} \ud800")


class SlyText(str):
    def encode(self, *args):
        return b"x"

    def __getitem__(self, key):
        raise RuntimeError("no")


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def endless(value):
    while True:
        yield value


STEP = lambda **changes: StepResult(**({"messages": (USER,)} | changes))
REFUSED = [
    ("reset", None, "returned NoneType, not a Start"),
    ("reset", Start(()), "no messages"),
    ("reset", Start((USER, {"role": "system", "content": "x"})), "may only come first"),
    ("reset", Start((USER,), tools=({1, 2},)), "not JSON"),
    ("reset", Start((USER,), tools=("cat",)), "must be a JSON object"),
    ("reset", Start((USER,), tools=(nested(70),)), "nested more than 64 deep"),
    ("reset", Start((USER,), tools=(nested(100_000),)), "not JSON: maximum recursion depth"),
    ("reset", Start((USER,), tools=({"description": "\ud800"},)), "the tools are not Unicode"),
    ("reset", Start((USER,), tools=({"\udfff": 1},)), "the tools are not Unicode"),
    ("reset", Start((USER,), tools=endless({})), "more than 10,000 tools"),
    ("reset", Start((USER,), tools=[{"a": "x" * 4_000_001}] * 2), "more than 8,000,000 characters"),
    ("reset", StepResult((USER,)), "not a Start"),
    ("step", None, "returned NoneType, not a StepResult"),
    ("step", "done", "returned str, not a StepResult"),
    ("step", START, "returned Start, not a StepResult"),
    ("step", StepResult(()), "must end the episode"),
    ("step", StepResult(None), "'NoneType' object is not iterable"),
    ("step", StepResult("hello"), "the messages are str, not a tuple"),
    ("step", StepResult(("hello",)), "a message is str"),
    ("step", StepResult(endless(USER)), "more than 10,000 messages"),
    ("step", StepResult((Sly(),)), "cannot be read: ZeroDivisionError: __class__ ?"),
    ("step", StepResult(({"role": "assistant", "content": "x"},)), "role 'assistant': use user, tool"),
    ("step", StepResult(({"role": "\ud800", "content": "x"},)), "use user, tool"),
    ("step", StepResult(({"role": "user"},)), "content is NoneType"),
    ("step", StepResult(({"role": "user", "content": "\ud800"},)), "not Unicode"),
    ("step", StepResult(({"role": "user", "content": SlyText("\ud800")},)), "not Unicode"),
    ("step", STEP(reward=float("nan")), "not a finite number"),
    ("step", STEP(reward=float("-inf")), "not a finite number"),
    ("step", STEP(reward=1e300), "the reward is 1e+300, not a finite number (of at most 1e+09)"),
    ("step", STEP(reward=10**400), "not a finite number"),
    ("step", STEP(reward="1"), "not a finite number"),
    ("step", STEP(terminated="no"), "terminated is 'no', not a bool"),
    ("step", STEP(truncated=None), "truncated is None, not a bool"),
    ("step", STEP(terminated=np.array([1, 2])), "truth value of an array"),
    ("step", STEP(tools={"a": 1}), "the tools are dict, not a tuple"),
    ("step", STEP(tools=[{"a": {1}}]), "the tools are not JSON"),
    ("step", STEP(tools=[{"a": float("nan")}]), "not JSON"),
    ("report", None, "not a Report"),
    ("report", Report(3), "summary is not text"),
    ("report", Report("x", 3), "'int' object is not iterable"),
    ("report", Report("x", (Fault(0, "f"),)), "not a Fault with a step from 1 on"),
    ("report", Report("x", (Fault(True, "f"),)), "not a Fault with a step from 1 on"),
    ("report", Report("x", (Fault(1, None),)), "not a Fault with a step from 1 on"),
    ("report", Report("x", ((1, "f"),)), "not a Fault"),
    ("report", Report("x", (Fault(10**9, "f"),)), "names step 1000000000 of an episode with 2 steps"),
    ("report", Report("x", (Fault(3, "f"),)), "names step 3 of an episode with 2 steps"),
    ("report", Report("x", (Fault(10**5000, "f"),)), "of an episode with 2 steps"),
    ("report", Report("x", endless(Fault(1, "f"))), "more than 1,000 faults"),
    ("report", Report("x", None, (1,)), "valid_turns are (1,), not bools"),
    ("report", Report("x", None, endless(True)), "more than 10,000 valid_turns"),
    ("report", Report("x", (Fault("y" * 10**6, "f"),)), "not a Fault with a step from 1 on"),
]


@pytest.mark.parametrize(("method", "value", "message"), REFUSED)
def test_anything_else_is_refused_in_one_short_line(method, value, message):
    with pytest.raises(ProtocolError) as error:
        checked(method, value, steps=2)
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 700 and text.encode()


def test_texts_of_any_size_are_kept_as_far_as_they_are_of_use():
    long = "x" * (MAX_MESSAGE_CHARS + 1)
    (message,) = checked("step", STEP(messages=({"role": "tool", "content": long},))).messages
    assert message["content"] == long[:-1] + "... [cut: the first 8000000 of 8000001 characters]"
    report = checked("report", Report("\ud800" + long, (Fault(1, "y" * (MAX_FEEDBACK_CHARS + 5)),)), steps=1)
    assert report.summary.startswith("?xx") and len(report.summary) < 21_000 and report.summary.encode()
    assert report.faults[0].feedback.endswith("y... [cut: 20000 of 20005 characters]")
    with pytest.raises(ProtocolError, match="more than 32,000,000 characters"):
        checked("step", STEP(messages=({"role": "tool", "content": long},) * 4))
    (message,) = checked("step", STEP(messages=({"role": "tool", "content": SlyText("fine")},))).messages
    assert type(message["content"]) is str and message["content"] == "fine"


def an_environment(tasks, **attributes):
    return type("Env", (), attributes | {"tasks": classmethod(tasks)})


def raising(error):
    def tasks(cls, split, data_dir, /, **options):
        raise error

    return tasks


def inner(known=1):
    return [{"id": "t"}]


def lists(value):
    return lambda cls, split, data_dir, /, **options: value


class Broken(list):
    def __getitem__(self, index):
        raise KeyError("\ud800")


TASKS = [
    (
        raising(ValueError("a\nb\ud800")),
        {},
        "tasks.. of environment 'e', split 'train' failed: ValueError: a b. .test_envs_protocol.py, line .*, in tasks",
    ),
    (raising(SystemExit(0)), {}, "failed: SystemExit: 0"),
    (raising(TypeError("unsupported operand")), {"size": 3}, "failed: TypeError: unsupported operand"),
    (raising(GeneratorExit()), {}, "failed: GeneratorExit"),
    (raising(UserError("install it")), {}, "^install it$"),
    (
        lambda cls, split, data_dir, size=1: inner(),
        {"sise": 3},
        "env.options.sise: environment 'e' has no such option; did you mean 'size'\\?",
    ),
    (lambda cls, split, data_dir: inner(), {"size": 3}, "env.options.size: environment 'e' .*; it takes none"),
    (lambda cls, split, data_dir, *, path: inner(), {}, "env.options.path is missing: environment 'e' needs it"),
    (lambda cls, split, data_dir, /, **all: inner(**all), {"sise": 3}, "^env.options.sise: tasks.. of .* no such"),
    (lambda cls, split, data_dir, /, **all: inner(unknown=1), {"sise": 3}, "failed: TypeError.*'unknown'"),
    (lambda cls: [], {}, "tasks.. of environment 'e' takes no split and data_dir: too many"),
    (lists(None), {}, "returned NoneType: return a list"),
    (lists({"a": 1}), {}, "returned dict"),
    (lists("abc"), {}, "returned str"),
    (lists(iter([{"id": "a"}])), {}, "returned list_iterator"),
    (lists([]), {}, "has no tasks in split 'train'"),
    (lists([{"id": "a"}, None]), {}, "task 1 of .* is NoneType, not a mapping"),
    (lists([{"name": "a"}]), {}, 'its "id" is NoneType, not text'),
    (lists([{"id": 3}]), {}, 'its "id" is int, not text'),
    (lists([{"id": ""}]), {}, 'its "id" has 0 characters'),
    (lists([{"id": "a\ud800"}]), {}, 'its "id" is .a.*: use printable Unicode text'),
    (lists([{"id": "a\nb"}]), {}, "use printable Unicode"),
    (lists([{"id": "a" * 10**6}]), {}, "has 1000000 characters"),
    (lists([{"id": "a", "category": "\ud800"}]), {}, 'its "category" is'),
    (lists([{"id": "a", "category": 3}]), {}, 'its "category" is int'),
    (lists([{"id": "a"}, {"id": "b"}, {"id": "a"}]), {}, "task 2 of .* has the id of task 0, 'a': give every task"),
    (lists(Broken([1])), {}, "task 0 of environment 'e', split 'train' failed: KeyError"),
]


@pytest.mark.parametrize(("tasks", "options", "message"), TASKS)
def test_tasks_that_cannot_be_played_are_refused_in_one_line(tasks, options, message):
    with pytest.raises(UserError, match=message) as error:
        checked_tasks(an_environment(tasks), "train", "data", options, "e")
    assert "\n" not in str(error.value) and str(error.value).encode() and len(str(error.value)) < 700


def test_tasks_that_are_no_class_method_are_refused():
    with pytest.raises(UserError, match="tasks of environment 'e' is a plain method: write @classmethod above it"):
        checked_tasks(type("Env", (), {"tasks": lambda self, split, data_dir: []}), "train", "data", {}, "e")
    bare = type("Env", (), {"tasks": lambda split, data_dir: [{"id": "a"}]})  # called on the class, it needs no mark
    assert len(checked_tasks(bare, "train", "data", {}, "e")) == 1


def test_tasks_are_read_once_or_as_they_are_drawn():
    class Many(list):
        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            return {"id": f"t{index % 10**6}"}

    good = checked_tasks(an_environment(lists(({"id": "a"}, {"id": "b"}))), "train", "data", {}, "e")
    assert len(good) == 2 and good[-1] == {"id": "b"} and good[:1] == [{"id": "a"}] and list(good) == good[:]
    many = checked_tasks(an_environment(lists(Many())), "train", "data", {}, "e")
    assert many[5] == many[5] == {"id": "t5"} and many[10**9 - 1] == {"id": "t999999"}
    with pytest.raises(UserError, match="task 1000005 of .* has the id of task 5"):
        many[10**6 + 5]
    said = type("Said", (list,), {"unique_ids": True})([{"id": "a"}, {"id": "a"}])
    assert len(checked_tasks(an_environment(lists(said)), "train", "data", {}, "e")) == 2


def failing(cls):
    raise SystemExit("bye")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"version": classmethod(failing)}, "version of environment 'e' failed: SystemExit: bye"),
        ({"version": classmethod(lambda cls: None)}, "version of environment 'e' is NoneType, not text"),
        ({"version": 1.0}, "is float, not text"),
        ({"version": "a\n\ud800"}, "use printable Unicode"),
        ({"version": property(failing)}, "failed|property"),
        ({"benchmark_name": 3}, "benchmark_name of environment 'e' is int"),
        ({"kinds_of_mistake": ("x", None)}, "kinds_of_mistake of environment 'e' is NoneType"),
        ({"kinds_of_mistake": "one"}, "kinds_of_mistake are str, not a tuple"),
    ],
)
def test_what_a_class_says_of_itself_is_checked(attributes, message):
    with pytest.raises(UserError, match=message) as error:
        env_class = an_environment(lists([]), **attributes)
        checked_version(env_class, "e")
        checked_words(env_class, "e")
    assert "\n" not in str(error.value) and str(error.value).encode()


def test_a_class_that_says_nothing_or_what_is_right():
    plain = an_environment(lists([]))
    assert checked_version(plain, "e") == "" and checked_words(plain, "e") == ("", ())
    full = an_environment(lists([]), version=lambda: "b 1", benchmark_name="B", kinds_of_mistake=["x"])
    assert checked_version(full, "e") == "b 1" and checked_words(full, "e") == ("B", ("x",))
