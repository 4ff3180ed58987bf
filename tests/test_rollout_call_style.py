"""The style of calls is found from the template: what it renders is what the parser reads, and what is written in that
style goes through whole episodes.
"""

import pytest

from hintsd_jax.envs.base import Report, Start, StepResult, ToolCall
from hintsd_jax.envs.call_reading import BARE, FENCED, HERMES, LFM2, OLMO3, PYTHONIC, STYLES, XML
from hintsd_jax.envs.desk import Desk
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.script import ground_truth, with_fault
from hintsd_jax.envs.tool_calls import parse_action, render_calls
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.chat_template import Template
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import Sampling
from tests.helpers import (
    LFM2_TEMPLATE,
    LFM25_TEMPLATE,
    LLAMA4_TEMPLATE,
    MINIMAL_TEMPLATE,
    OLMO3_TEMPLATE,
    QWEN3_CODER_TEMPLATE,
    QWEN3_TEMPLATE,
    QWEN35_TEMPLATE,
    make_llama_tokenizer,
    make_tokenizer,
)

LFM2_TOKENS = ("<|tool_call_start|>", "<|tool_call_end|>")
SCHEMAS = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "sure": {"type": "boolean"},
    "places": {"type": "array"},
    "options": {"type": "object"},
    "nothing": {"type": ["string", "null"]},
}
TOOLS = ({"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": SCHEMAS}}},)
VALUES = {
    "text": 'a "quoted" line\nand </parameter> [f(a=1)] é\U0001f600',
    "count": 3,
    "ratio": 2.5,
    "sure": True,
    "places": ["here", {"x": [1, None]}],
    "options": {"deep": {"er": [True, "x"]}},
    "nothing": None,
}


def tokenizer_of(template):
    if template is LLAMA4_TEMPLATE:
        return make_llama_tokenizer(template)
    return make_tokenizer(template, extra=LFM2_TOKENS if template in (LFM2_TEMPLATE, LFM25_TEMPLATE) else ())


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (QWEN3_TEMPLATE, HERMES),
        (QWEN3_CODER_TEMPLATE, XML),
        (QWEN35_TEMPLATE, XML),
        (LFM25_TEMPLATE, LFM2),
        (LFM2_TEMPLATE, LFM2),
        (LLAMA4_TEMPLATE, PYTHONIC),
        (OLMO3_TEMPLATE, OLMO3),
    ],
)
def test_the_style_is_found_and_a_dialogue_in_it_is_what_the_template_renders(template, style):
    chat = ChatFormat(tokenizer_of(template), history="keep")
    assert chat.style == style
    # Those of a thinking family drop earlier thinking, which is declared; nothing else differs.
    assert (chat.deviation is None) == (template not in (QWEN3_TEMPLATE, QWEN35_TEMPLATE))
    text = render_calls([ToolCall("go", {"text": "x"}), ToolCall("go", {})], style)
    assert chat.is_plain_action(text) and chat.decode(chat.encode(text)).endswith(text)


@pytest.mark.parametrize(
    ("template", "style", "values"),
    [
        (QWEN3_TEMPLATE, HERMES, VALUES),
        (QWEN3_CODER_TEMPLATE, XML, VALUES),
        (QWEN35_TEMPLATE, XML, VALUES),
        # No escapes: a quote of the kind that stands around the text ends it.
        (LFM25_TEMPLATE, LFM2, VALUES),
        (OLMO3_TEMPLATE, OLMO3, VALUES),
        (LLAMA4_TEMPLATE, PYTHONIC, {"text": "it's\n[f(a=1)] é", "nothing": ""}),
    ],
)
@pytest.mark.parametrize("said", ["", "I go."])
def test_what_the_template_renders_is_what_the_parser_reads(template, style, values, said):
    """Calls as data, rendered by transformers; also several in a message, and after a text."""
    tokenizer, one_only = tokenizer_of(template), template is LLAMA4_TEMPLATE
    calls = (
        [ToolCall("go", values)] if one_only else [ToolCall("go", values), ToolCall("go", {}), ToolCall("go", values)]
    )
    data = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    asked = [{"role": "user", "content": "Go."}]
    answer = {"role": "assistant", "content": said, "tool_calls": data}
    before = tokenizer.apply_chat_template(asked, tokenize=False)
    text = tokenizer.apply_chat_template([*asked, answer], tokenize=False)
    assert text.startswith(before)
    stop = "<|eot_id|>" if one_only else "<|im_end|>"
    body = text.removeprefix(before).partition("assistant")[2].removeprefix("<|end_header_id|>").strip()
    action = parse_action(body.removesuffix(stop), style, tools=TOOLS)
    assert (action.problem, action.calls) == (None, tuple(calls))


@pytest.mark.parametrize(
    ("text", "style", "calls"),
    [
        # The examples of the model cards.
        (
            '<|tool_call_start|>[get_candidate_status(candidate_id="12345")]<|tool_call_end|>Checking the current'
            " status of candidate ID 12345.",
            LFM2,
            [ToolCall("get_candidate_status", {"candidate_id": "12345"})],
        ),
        (
            '[get_weather(location="Vancouver"), calculate_route(start="Boston", end="New York")]',
            PYTHONIC,
            [
                ToolCall("get_weather", {"location": "Vancouver"}),
                ToolCall("calculate_route", {"start": "Boston", "end": "New York"}),
            ],
        ),
        (
            "<tool_call>\n<function=example>\n<parameter=first>\nvalue_1\n</parameter>\n<parameter=second>\nThis value"
            "\nhas lines\n</parameter>\n</function>\n</tool_call>",
            XML,
            [ToolCall("example", {"first": "value_1", "second": "This value\nhas lines"})],
        ),
    ],
)
def test_published_examples_are_read_and_written_the_same(text, style, calls):
    action = parse_action(text, style)
    assert action.calls == tuple(calls) and text.startswith(render_calls(calls, style))


# What other families write around a call; the frames of their turns are left out.
FOREIGN = {
    "gpt-oss (harmony)": "'<|channel|>commentary to=functions.' ~ f.name ~ ' json<|message|>' ~ (f.arguments | tojson)",
    "DeepSeek": "'<｜tool▁call▁begin｜>function<｜tool▁sep｜>' ~ f.name ~ ('\\n```json\\n' + f.arguments) ~ '\\n```'",
    "Kimi K2": "'<|tool_call_begin|>functions.' ~ f.name ~ ':0<|tool_call_argument_begin|>' ~ (f.arguments | tojson)",
    "GLM": "'<tool_call>' ~ f.name ~ '\\n<arg_key>at</arg_key>\\n<arg_value>x</arg_value>\\n</tool_call>'",
    "Seed-OSS": "'<seed:tool_call><function=' ~ f.name ~ '><parameter=at>x</parameter></function></seed:tool_call>'",
    "MiniMax": "'<minimax:tool_call>\\n<invoke name=\"' ~ f.name ~ '\">\\n</invoke></minimax:tool_call>'",
    "Gemma 4": "'<|tool_call>call:' ~ f.name ~ '{at:x}<tool_call|>'",
    "Mistral": "'[TOOL_CALLS]' ~ f.name ~ '[ARGS]' ~ (f.arguments | tojson)",
    "Cohere": '\'Action: [{"tool_name": "\' ~ f.name ~ \'", "parameters": {}}]\'',
    "Llama's <function=...> tags": "'<function=' ~ f.name ~ '>' ~ (f.arguments | tojson) ~ '</function>'",
}


def writing(call):
    """A template that writes calls so; `f` has the name and the arguments."""
    calls = "{%- for c in m.tool_calls or [] -%}{%- set f = c.function -%}{{- " + call + " -}}{%- endfor -%}"
    return MINIMAL_TEMPLATE.replace("{%- for m in messages -%}", "{%- for m in messages -%}" + calls)


@pytest.mark.parametrize("family", FOREIGN)
def test_other_formats_are_refused_by_name(family):
    with pytest.raises(UserError) as error:
        Template(make_tokenizer(writing(FOREIGN[family])), {})
    line = str(error.value)
    assert line.startswith(f"the chat template writes tool calls in the format of {family}, which is not supported: '")
    assert "look" in line and "\n" not in line and line.endswith(f"on another: {', '.join(STYLES)}")
    assert Template(make_tokenizer(writing(FOREIGN[family])), {}, "xml").style == XML


@pytest.mark.parametrize(
    ("call", "style"),
    [
        ("'```json\\n' ~ ({'name': f.name, 'arguments': f.arguments} | tojson) ~ '\\n```'", FENCED),
        ("'<tool_call>{\"name\": \"' ~ f.name ~ '\", ' ~ ('\"arguments\": ' + f.arguments) ~ '}</tool_call>'", HERMES),
        ("'{\"name\": \"' ~ f.name ~ '\", ' ~ ('\"parameters\": ' + f.arguments) ~ '}'", BARE),
    ],
)
def test_styles_of_templates_that_want_arguments_as_text_too(call, style):
    assert Template(make_tokenizer(writing(call)), {}).style == style


def test_tags_of_calls_stand_only_where_the_policy_writes_them():
    template = Template(tokenizer_of(LFM25_TEMPLATE), {})
    call = render_calls([ToolCall("look", {"at": "x"})], LFM2)
    text = template.render([{"role": role, "content": call} for role in ("user", "assistant", "tool")])
    assert text.count(call) == 1 and f"assistant\n{call}<|im_end|>" in text
    assert text.count("< |tool_call_start|>[look") == 2


@pytest.mark.parametrize("style", STYLES)
def test_scripts_of_desk_are_written_in_every_style(style):
    task, desk = generate_task(5, 0), Desk()
    tools = desk.reset(task).tools
    right = ground_truth(task, style).actions
    wanted = [parse_action(text).calls for text in ground_truth(task).actions]
    assert [parse_action(text, style, tools=tools).calls for text in right] == wanted and any(wanted)
    for text in right:
        result = desk.step(parse_action(text, style, tools=tools))
    assert result.terminated and result.reward == 1
    faulty, hermes = (with_fault(task, "early_stop", 0, style=each) for each in (style, HERMES))
    assert [parse_action(text, style, tools=tools).calls for text in faulty.actions] == [
        parse_action(text).calls for text in hermes.actions
    ]


class Announcing:
    """An environment whose second tool is announced with the first observation; keeps what it was asked for."""

    seen: list = []

    def reset(self, task):
        return Start(({"role": "user", "content": "Go."},), TOOLS)

    def step(self, action):
        self.seen.append(action)
        counting = {"type": "object", "properties": {"number": {"type": "integer"}}}
        later = ({"type": "function", "function": {"name": "count", "parameters": counting}},)
        over = len(self.seen) == 2
        return StepResult(
            ({"role": "user", "content": "More."},), 1.0 if over else 0.0, over, tools=() if over else later
        )

    def report(self):
        return Report("")

    def close(self):
        pass


@pytest.mark.parametrize("history", ["keep", "template"])
def test_values_of_tools_that_were_announced_later_are_converted_too(history):
    chat, Announcing.seen = ChatFormat(tokenizer_of(QWEN3_CODER_TEMPLATE), history=history), []
    calls = [ToolCall("go", {"count": 1, "text": "1"}), ToolCall("count", {"number": 2})]
    engine = ScriptedEngine(chat, lambda job: [render_calls([call], chat.style) for call in calls])
    config = RolloutConfig(8, 1 << 20, Sampling(1.0, 1.0, 0, 1 << 20))
    played = run_episodes(
        engine, None, chat, ThreadHost(Announcing), [{"id": "a"}], 1, config, seed=0, step=0, call_timeout_s=30.0
    )
    assert not played.failures and [list(action.calls) for action in Announcing.seen] == [[call] for call in calls]
    (episode,) = played.episodes
    assert [len(episode.callable_at(number)) for number in (1, 2)] == [1, 2]
    assert len(episode.tools_at(2)) == (1 if history == "keep" else 2)
    assert all("announced" not in step and "tools" not in step for step in episode.to_json()["steps"])
