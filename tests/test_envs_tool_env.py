"""Tools from typed methods: their schemas, what reaches them, who is to blame, and what is refused by name."""

import dataclasses
import json
import sys
import types
from typing import Any, Literal

import pytest

from hintsd_jax.envs.base import Action, Fault, Report, ToolCall
from hintsd_jax.envs.desk.office import tool_docs
from hintsd_jax.envs.protocol import ProtocolError, checked
from hintsd_jax.envs.registry import resolve
from hintsd_jax.envs.tool_calls import parse_action, render_call
from hintsd_jax.envs.tool_env import CallError, ToolEnv, tool
from hintsd_jax.envs.typed_tools import tools_of
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.env_call import CallFailure
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.env_pool import EnvPool


class Shop(ToolEnv):
    """A shop with one shelf."""

    system = "You keep a shop."

    @classmethod
    def tasks(cls, split, data_dir, **options):
        return [{"id": f"{split}-{n}"} for n in range(3)]

    def begin(self, task):
        self.shelf = {"apple": 2}
        self.seen = []
        return f"Sell one apple ({task['id']})."

    @tool
    def sell(
        self,
        item: str,
        number: int = 1,
        price: float | None = None,
        size: Literal["small", "large"] = "small",
        tags: list[str] = (),
        notes: dict[str, Any] = {},  # noqa: B006
        gift: bool = False,
    ):
        """Sells an item.

        The shelf must hold it.

        Args:
          item: what is sold; one of
            the shelf
          price (float, optional): of each, in euros

        Returns:
          Nothing: of use.
        """
        self.seen.append((item, number, price, size, tags, notes, gift))
        if self.shelf.get(item, 0) < number:
            raise CallError("not enough there")
        self.shelf[item] -= number

    @tool
    def look(self):
        """What is on the shelf."""
        return self.shelf

    @tool
    def shut(self, why: str):
        """Shuts the shop."""
        self.over = True
        return f"Shut: {why}"

    @tool
    def break_down(self):
        """Fails."""
        raise ValueError("the till is on fire")

    @tool
    def unwritable(self):
        """Returns what is no JSON."""
        return {1, 2}

    def reward(self):
        return float(self.shelf == {"apple": 1})


def opened(env_class=Shop):
    env = env_class(size=3)
    start = checked("reset", env.reset({"id": "train-0"}))
    return env, start


def texts(env, *calls):
    result = checked("step", env.step(Action("", tuple(ToolCall(name, arguments) for name, arguments in calls))))
    return [message["content"] for message in result.messages]


def test_schemas_say_what_signature_and_docstring_do():
    _, start = opened()
    assert [m["role"] for m in start.messages] == ["system", "user"] and "train-0" in start.messages[1]["content"]
    assert [each["function"]["name"] for each in start.tools] == ["sell", "look", "shut", "break_down", "unwritable"]
    assert start.tools[0] == {
        "type": "function",
        "function": {
            "name": "sell",
            "description": "Sells an item.\n\nThe shelf must hold it.",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"type": "string", "description": "what is sold; one of the shelf"},
                    "number": {"type": "integer", "default": 1},
                    "price": {
                        "anyOf": [{"type": "number"}, {"type": "null"}],
                        "description": "of each, in euros",
                        "default": None,
                    },
                    "size": {"type": "string", "enum": ["small", "large"], "default": "small"},
                    "tags": {"type": "array", "items": {"type": "string"}, "default": []},
                    "notes": {"type": "object", "additionalProperties": True, "default": {}},
                    "gift": {"type": "boolean", "default": False},
                },
                "required": ["item"],
            },
        },
    }
    assert start.tools[1]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_schemas_are_written_as_the_embedded_policy_knows_them():
    class Office(Shop):
        @tool
        def list_sizes(self, title: str):
            """Sizes of a file's copies."""

        @tool
        def send_file(self, to: str, file: str):
            """Send to an address a file."""

    desk = {doc["function"]["name"]: json.dumps(doc) for doc in tool_docs()}
    for name in ("list_sizes", "send_file"):
        assert json.dumps(Office.tools[name].schema) == desk[name]


def test_what_a_tool_gets_and_what_the_agent_reads():
    env, _ = opened()
    given = {"item": "apple", "price": 2, "tags": ["a"], "notes": {"b": [1]}, "size": "large"}
    assert texts(env, ("sell", given), ("look", {})) == ["Ok.", '{"apple": 1}']
    assert env.seen == [("apple", 1, 2.0, "large", ["a"], {"b": [1]}, False)] and type(env.seen[0][2]) is float
    env.seen[0][5]["b"].append(2)
    assert given["notes"] == {"b": [1]}  # what a tool keeps is its own
    assert texts(env, ("sell", {"item": "pear"})) == ["Error: not enough there."]
    assert env.steps == 2


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("sel", {}, "no tool 'sel'; did you mean 'sell'?"),
        ("sell", {}, "sell: item is missing"),
        ("sell", {"item": "apple", "colour": "red"}, "colour is unknown"),
        ("sell", {"item": 3}, "item: Input should be a valid string"),
        ("sell", {"item": "apple", "number": "1"}, "number: Input should be a valid integer"),
        ("sell", {"item": "apple", "number": True}, "number: Input should be a valid integer"),
        ("sell", {"item": "apple", "size": "huge"}, "size: Input should be 'small' or 'large'"),
        ("sell", {"item": "apple", "tags": ["a", 2]}, "tags.1: Input should be a valid string"),
        ("sell", {"item": "apple", "gift": 1}, "gift: Input should be a valid boolean"),
        ("sell", {"item": "apple", "a": 1, "b": 2, "c": 3, "d": 4}, "c is unknown; and 1 more"),
        ("reward", {}, "no tool 'reward'"),
        ("x" * 100_000, {}, "no tool"),
        ("look", {"y" * 100_000: 1}, "is unknown"),
    ],
)
def test_calls_that_do_not_fit_are_the_agents_mistakes_and_reach_no_tool(name, arguments, said):
    env, _ = opened()
    [text] = texts(env, (name, arguments))
    assert text.startswith("Error: ") and said in text and len(text) < 400 and "\n" not in text
    assert env.seen == [] and env.shelf == {"apple": 2} and not env.over


def test_a_first_message_that_is_none_is_a_fault_that_names_begin():
    mute = type("Mute", (Shop,), {"begin": lambda self, task: None})
    with pytest.raises(ProtocolError, match="begin returned NoneType: return the user's first message, a text"):
        opened(mute)


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("break_down", "ValueError: the till is on fire"),
        ("unwritable", "Shop.unwritable returned {1, 2}, which is no JSON"),
    ],
)
def test_what_else_a_tool_raises_is_a_fault_of_the_world(name, detail):
    with EnvPool(ThreadHost(Shop), 1, 10.0) as pool:
        pool.reset(0, {"id": "train-0"}, ()).result()
        failure = pool.step(0, Action("", (ToolCall(name, {}),))).result()
    assert isinstance(failure, CallFailure) and failure.reason == "env_error" and detail in failure.detail


def test_an_action_without_calls_ends_the_episode_or_is_answered():
    env, _ = opened()
    assert texts(env, ("sell", {"item": "apple"})) == ["Ok."]
    unread = checked("step", env.step(Action("?", problem="no JSON", problem_kind="json")))
    assert unread.messages == ({"role": "tool", "content": "Error: no JSON."},) and not unread.terminated
    result = checked("step", env.step(Action("Done.")))
    assert (result.messages, result.reward, result.terminated) == ((), 1.0, True)
    assert checked("report", env.report(), 3) == Report("") and env.close() is None

    class Talkative(Shop):
        def reply(self, text):
            return None if self.steps > 1 else f"You said {text}"

        def report(self):
            return Report("sold nothing", (Fault(self.steps, "Sell."),))

    env, start = opened(Talkative)
    assert len(start.tools) == 5
    assert checked("step", env.step(Action("hm"))).messages == ({"role": "user", "content": "You said hm"},)
    result = checked("step", env.step(Action("bye")))
    assert (result.reward, result.terminated) == (0.0, True)
    assert env.report().faults == (Fault(2, "Sell."),)
    env.reset({"id": "train-1"})
    assert (env.steps, env.over) == (0, False)


def test_a_tool_may_end_the_episode_and_what_comes_after_is_not_called():
    env, _ = opened()
    action = Action("", (ToolCall("shut", {"why": "rain"}), ToolCall("sell", {"item": "apple"})))
    result = checked("step", env.step(action))
    assert [m["content"] for m in result.messages] == ["Shut: rain"] and result.terminated and env.seen == []


def test_calls_as_policies_write_them():
    env, _ = opened()
    call = ToolCall("sell", {"item": "apple", "notes": {"é": None}})
    assert texts(env, *((c.name, c.arguments) for c in parse_action(render_call(call)).calls)) == ["Ok."]


def with_tool(method):
    return type("Own", (ToolEnv,), {method.__name__: method})


class Custom:
    pass


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


def refused_methods():
    @tool
    def untyped(self, a: str, b):
        "Does."

    @tool
    def starred(self, *names: str):
        "Does."

    @tool
    def keywords(self, **names: str):
        "Does."

    @tool
    def positional(self, a: str, /):
        "Does."

    @tool
    def silent(self, a: str): ...

    @tool
    def only_arguments(self, a: str):
        """
        Args:
          a: something
        """

    @tool
    def misspelt(self, item: str):
        """Does.

        Args:
          itme: something
        """

    @tool
    def custom(self, a: str, b: Custom):
        "Does."

    @tool
    def quoted(self, a: "Nowhere"):  # noqa: F821
        "Does."

    @tool
    async def later(self):
        "Does."

    @tool
    def report(self):
        "Does."

    @tool
    def selfless():
        "Does."

    @staticmethod
    @tool
    def static(a: str):
        "Does."

    return {
        untyped: "untyped: b has no type: write `b: str`",
        starred: "starred takes *names: str: name each argument",
        keywords: "keywords takes **names: str: name each argument",
        positional: "positional: a is positional only",
        silent: "silent has no docstring",
        only_arguments: "only_arguments has no docstring",
        misspelt: "misspelt: its docstring has the argument 'itme', its signature has not; did you mean 'item'?",
        custom: "custom: b has a type that JSON has no form of",
        quoted: "quoted: its types cannot be read (NameError",
        later: "later: make it a plain method",
        report: "report: choose another name",
        selfless: "selfless: make it a plain method",
        static: "static: make it a plain method",
    }


@pytest.mark.parametrize(("method", "said"), refused_methods().items(), ids=lambda each: getattr(each, "__name__", ""))
def test_unclear_signatures_are_refused_in_one_line_that_names_the_method(method, said):
    with pytest.raises(UserError) as error:
        with_tool(method)
    assert f"tool Own.{said}" in str(error.value) and "\n" not in str(error.value)


def test_what_a_class_lacks_is_named(monkeypatch):
    module = types.ModuleType("a_module_of_tools")
    module.Half = type("Half", (ToolEnv,), {"begin": Shop.begin})
    module.Shop = Shop
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(UserError, match="class 'Half' lacks reward, tasks"):
        resolve("a_module_of_tools:Half")
    assert resolve("a_module_of_tools:Shop") is Shop


def test_a_tool_that_is_refused_names_the_environment_too(tmp_path, monkeypatch):
    text = "from hintsd_jax.envs.tool_env import *\nclass Own(ToolEnv):\n  @tool\n  def sell(self, item): 'Sells.'\n"
    (tmp_path / "with_an_untyped_tool.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        resolve("with_an_untyped_tool:Own")
    start = "environment 'with_an_untyped_tool:Own': tool Own.sell: item has no type"
    assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_values_of_ones_own_types_and_tools_of_base_classes():
    class Base(Shop):
        @tool()
        def draw(self, at: Point):
            """Draws a point."""
            return [at.x, at.y]

        look = None  # no tool any more

    env, start = opened(Base)
    assert "look" not in env.tools and list(tools_of(Base))[-1] == "draw" and len(start.tools) == 5
    with pytest.raises(UserError, match="tool Base.look has no @tool: repeat it, or write look = None to take it"):
        type("Base", (Shop,), {"look": lambda self: ""})
    assert "look" not in type("Leaf", (Base,), {"look": lambda self: ""}).tools  # a method of one's own, by now
    assert texts(env, ("draw", {"at": {"x": 1}}), ("draw", {"at": {"y": 1}})) == [
        "[1, 0]",
        "Error: draw: at.x is missing.",
    ]
