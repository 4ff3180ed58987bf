"""Answers of analysers and judges: whatever stands around the last complete object, the method's order of drops, and
every drop counted.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.hindsight.parse import REASONS, parse_failures, parse_hint, parse_verdict, whole_number
from hintsd_jax.hindsight.targets import Target

_steps = st.integers(-1, 8) | st.booleans() | st.floats() | st.text() | st.none()
_feedback = st.text(max_size=4) | st.none() | st.sampled_from(["x", "<think>", "</think>"])
_entry = st.fixed_dictionaries({}, optional={"step": _steps, "feedback": _feedback})
_entries = st.lists(_entry | st.integers() | st.none() | st.text(), max_size=9)
# What models write around an answer: quoted calls, broken JSON, fences, other objects, the form that was asked for.
_around = st.lists(
    st.sampled_from(
        [
            "#1 ok\n",
            '<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>\n',
            "```json\n",
            "\n```",
            '{"reward": 0}',
            "{2}",
            "{",
            "}",
            '{"failures": [{"step": 1, ',
            '{"failures": [{"step": 2, "feedback": "..."}]}',
            "I think that",
            "[]",
            '"',
        ]
    ),
    max_size=4,
).map("".join)


def answer(*pairs) -> str:
    return json.dumps({"failures": [{"step": step, "feedback": feedback} for step, feedback in pairs]})


@settings(max_examples=150, deadline=None)
@given(_entries, st.integers(0, 6), st.integers(1, 4), st.sampled_from(["", "#1 ok\n", "<think>\n{}</think>"]))
def test_targets_are_valid_sorted_unique_and_limited(entries, num_steps, max_targets, before):
    parsed = parse_failures(before + json.dumps({"failures": entries}) + "\nDone.", num_steps, max_targets)
    steps = [target.step for target in parsed.targets]
    assert parsed.problem is None
    assert steps == sorted(set(steps)) and len(steps) <= max_targets
    assert all(type(step) is int and 1 <= step <= num_steps for step in steps)
    assert all(target.feedback.strip() == target.feedback != "" for target in parsed.targets)
    assert len(parsed.targets) + sum(parsed.dropped.values()) == len(entries)  # nothing silently
    assert set(parsed.dropped) <= set(REASONS) and all(count > 0 for count in parsed.dropped.values())


@settings(max_examples=200, deadline=None)
@given(_around, _around, st.sampled_from([answer((2, "do {a}")), '{"failure_step": 2, "feedback": "do {a}"}']))
def test_an_answer_is_read_whatever_stands_around_it(before, after, text):
    parsed = parse_failures(before + text + after, 5, 3)
    assert parsed.targets == (Target(2, "do {a}"),) and parsed.problem is None and not parsed.dropped


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text('{}[]":,failurestep0123 ', max_size=40), st.booleans())
def test_never_raises(text, cut):
    parsed = parse_failures(text, 5, 3, cut=cut)
    assert (parsed.problem is not None) == (parsed.dropped == {"truncated" if cut else "unparsable": 1})
    assert parse_verdict(text) in (None, 1, -1, 0) and parse_hint(text)[0] in (True, False)


def test_the_drops_come_in_the_methods_order():
    first = ((9, "out"), (4, "  "), (4, "four"), (2, "two"), (4, "again"))
    text = answer(*first, (0, "zero"), (3, "three"), (1, "one"), (True, "t"), (2.5, "between"))
    parsed = parse_failures(text, 4, 3)
    # the first valid entry of a step stands; sorting comes before the limit, so step 4 goes though it was written first
    assert parsed.targets == (Target(1, "one"), Target(2, "two"), Target(3, "three"))
    assert parsed.dropped == {"bad_step": 4, "empty_feedback": 1, "repeated_step": 1, "over_limit": 1}


@pytest.mark.parametrize(
    "value, step",
    [(2, 2), (2.0, 2), ("2", 2), (" 2.0 ", 2), ("step 2", 2), ("Step #2", 2), ("#2", 2), (-1, -1), ("-1", -1)]
    + [(2.5, None), ("2.5", None), (True, None), (None, None), ([2], None), ("two", None), ("", None), ("2 or 3", None)]
    + [(float("nan"), None), (float("inf"), None), (1e300, int(1e300)), ("9" * 5000, None), ("٣", 3)],
)
def test_whole_numbers_as_models_write_them(value, step):
    assert whole_number(value) == step


@pytest.mark.parametrize(
    "text, targets",
    [
        ('{"failure_step": 2, "feedback": "a"}', [(2, "a")]),
        ('{"failure_step": "2", "feedback": " a "}', [(2, "a")]),
        ('{"failure_steps": [3, 1.0], "feedback": "a"}', [(1, "a"), (3, "a")]),
        ('{"failure_steps": [], "feedback": ""}', []),
        ('{"analysis": {"failures": [{"step": 1, "feedback": "a"}]}}', [(1, "a")]),
        ('{"failures": [{"step": 1, "feedback": "two\nlines"}]}', [(1, "two\nlines")]),
        ('{"failures": [], "failure_step": 3, "feedback": "a"}', []),
        (answer((1, "first thought")) + "\nNo:\n" + answer((3, "second thought")), [(3, "second thought")]),
        (answer((1, "whole")) + "\n" + answer((1, "whole"))[:-4], [(1, "whole")]),
    ],
)
def test_the_forms_of_an_answer(text, targets):
    parsed = parse_failures(text, 3, 3)
    assert [(target.step, target.feedback) for target in parsed.targets] == targets and parsed.problem is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "}{",
        '{"failures": 3}',
        '{"failures": {"step": 1}}',
        '{"other": []}',
        '{"failures": [}',
        '{"failures": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a":' * 20_000,
        "<think>\n" + answer((1, "x")),
        answer((1, "x"))[:-2],
        answer((1, "a draft")) + "</think>\nNothing.",
        answer((2, "..."), (3, " … ")),  # the form that was asked for, and nothing else
    ],
)
def test_what_cannot_be_read_drops_the_whole(text):
    for cut, reason in ((False, "unparsable"), (True, "truncated")):
        parsed = parse_failures(text, 3, 3, cut=cut)
        assert parsed.targets == () and parsed.dropped == {reason: 1} and parsed.problem
    assert "cut" in parsed.problem


@pytest.mark.parametrize(
    "text",
    [
        answer((1, "a draft")) + "</think>" + answer((1, "do a")),
        "#1 wanted a, got b, bad\n" + answer((1, "do a")),
        "<think>\nmaybe {step 2}?\n</think>\n\n" + answer((1, "do a")),
        "it may be {2}</think>" + answer((1, "do a")),
        "```json\n" + answer((1, " do a\n")) + "\n```\nThat is all.",
        answer((1, "do a")) + "\n<think>\nwas that right?",
    ],
)
def test_reasoning_around_the_answer_is_dropped(text):
    assert parse_failures(text, 3, 3).targets == (Target(1, "do a"),)


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<think>\n</think>", "</think> {"])
def test_feedback_may_speak_of_tags(tag):
    text = answer((1, f"write {tag} first"))
    assert parse_failures(text, 1, 1).targets == parse_failures("<think>\nhm\n</think>\n" + text, 1, 1).targets
    assert parse_failures(text, 1, 1).targets[0].feedback == f"write {tag} first"


def test_no_failures_is_an_answer():
    parsed = parse_failures('{"failures": []}', 3, 3)
    assert parsed.targets == () and parsed.problem is None and parsed.dropped == {}


def test_feedback_is_taken_only_for_the_step_asked_about():
    parsed = parse_failures(answer((1, "a"), (2, "b")), 3, 1, only_step=2)
    assert parsed.targets == (Target(2, "b"),) and parsed.dropped == {"bad_step": 1}


def test_feedback_can_always_be_tokenised():
    parsed = parse_failures('{"failures": [{"step": 1, "feedback": "a\\ud800b"}]}', 1, 1)
    assert parsed.targets == (Target(1, "a?b"),)
    assert parse_hint('{"hint": "a\\ud800b"}') == (True, "a?b")


@pytest.mark.parametrize(
    "text, verdict",
    [('{"verdict": 1}', 1), ('It is wrong.\n{"verdict": -1.0}', -1), ('{"verdict": "0"}', 0), ('{"verdict": "+1"}', 1)]
    + [('{"verdict": 2}', None), ('{"verdict": true}', None), ("1", None), ('{"verdict": 1', None), ("", None)],
)
def test_verdicts(text, verdict):
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    "text, read",
    [
        ('{"hint": " Look first. "}', (True, "Look first.")),
        ('{"hint": ""}', (True, None)),
        ('{"hint": null}', (True, None)),
    ]
    + [('{"hint": "..."}', (True, None)), ('{"hint": 3}', (False, None)), ("no", (False, None))],
)
def test_hints(text, read):
    assert parse_hint(text) == read
