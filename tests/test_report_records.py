"""What is kept of an episode, and where targets are counted."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.tools.report import records
from tests.report_helpers import record, span


def test_a_row_and_an_entry():
    whole = record("t", 2, targets=(2, 4), length=5)
    assert records.row(whole) == {
        "task": "t",
        "rollout": 2,
        "success": 0,
        "steps": 5,
        "ended": "terminated",
        "targets": [2, 4],
        "trained": [2, 4],
        "review": "named",
        "missed": 0,
        "tokens": 15,
        "divergence": records.number(sum(sum(s["divergence"]) for s in whole["trained"]) / 6, 3),
    }
    entry = records.entry(whole)
    assert [t["feedback"] for t in entry["hindsight"]["targets"]] == [
        "Use the other one at 2.",
        "Use the other one at 4.",
    ]
    assert entry["faults"] == [{"step": 2, "feedback": "Truth."}]
    assert entry["trained"][1]["pieces"] == [" w0", " w1", " w2"] and entry["trained"][1]["teacher_best"] == [
        " v0",
        " v1",
        " v2",
    ]
    assert records.entry(record() | {"trained": [span(1) | {"teacher_best": [" w0", "", " w2"]}]})["trained"][0][
        "teacher_best"
    ] == [None, "", None]
    for name in ("divergence", "teacher_gap"):
        for kept, value in zip(entry["trained"][0][name], whole["trained"][0][name], strict=True):
            assert math.isclose(kept, value, rel_tol=5e-3)
    again = whole | {
        "occurrence": 1,
        "steps": [*whole["steps"][:4], whole["steps"][4] | {"cut": True, "problem": "json"}],
    }
    assert records.row(again)["task"] == "t (2)"
    notes = [step["note"] for step in records.entry(again)["steps"]]
    assert notes == [""] * 4 + ["cut at its token limit; its call could not be read (json)"]
    assert "streams" not in entry and "logprobs" not in entry  # token ids stay in the folder


def test_what_hindsight_made_of_an_episode():
    unread = record() | {"hindsight": record()["hindsight"] | {"problem": "no JSON"}}
    half_read = record(targets=(3,)) | {"hindsight": record(targets=(3,))["hindsight"] | {"problem": "one is no step"}}
    cases = {
        "named": record(targets=(2,)),
        "nothing": record(),
        "unreadable": unread,
        "skipped": record(hindsight=None),
        "": record(success=True),
    }
    assert {name: records.row(each)["review"] for name, each in cases.items()} == {name: name for name in cases}
    assert records.row(half_read)["review"] == "named"
    # the true fault is step 2
    missed = {name: records.row(each)["missed"] for name, each in cases.items()}
    assert missed == {"named": 0, "nothing": 1, "unreadable": 1, "skipped": 0, "": 0}
    assert records.row(half_read)["missed"] == 1
    assert records.row(record(targets=(3,), report=None))["missed"] == 0  # nobody knows
    held_out = records.row(record(hindsight=None), training=False)
    assert (held_out["review"], held_out["missed"]) == ("", 0)  # of these none is looked back on


def test_records_without_hindsight():
    entry = records.entry(record(success=True, trained=False))
    assert entry["trained"] == [] and entry["hindsight"] is None
    assert records.entry(record(report=None))["faults"] == []


def test_a_loss_without_a_teacher_has_advantages_only():
    span = {"step": 1, "pieces": ["a", "b"], "advantage": [0.5, -0.5]}
    assert records.entry(record(trained=False) | {"trained": [span]})["trained"] == [span | {"tokens": 2}]


def test_long_texts_and_spans_are_cut_and_say_so():
    text = "x" * (records.LONGEST + 1234)
    assert records.clip(text).startswith("x" * records.LONGEST + "\n[1,234 more characters")
    assert records.clip("x" * records.LONGEST) == "x" * records.LONGEST
    long = {"step": 1, "pieces": ["a"] * (records.MOST_TOKENS + 1), "divergence": [1.0] * (records.MOST_TOKENS + 1)}
    [kept] = records.entry(record(trained=False) | {"trained": [long]})["trained"]
    assert (
        kept["tokens"] == records.MOST_TOKENS + 1
        and len(kept["pieces"]) == len(kept["divergence"]) == records.MOST_TOKENS
    )


@given(st.floats() | st.integers(-(10**12), 10**12) | st.none())
def test_numbers_are_plain_and_close(value):
    kept = records.number(value)
    if value is None or not math.isfinite(value):
        assert kept is None
    else:
        assert math.isclose(kept, value, rel_tol=5.1e-4) and (isinstance(kept, int) or math.isfinite(kept))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 30), max_size=3)), max_size=5), max_size=4)
)
def test_target_counts_equal_a_plain_count(steps):
    counts = records.TargetCounts()
    plain = Counter()
    for number, episodes in enumerate(steps, 1):
        found = [
            record(targets=[t for t in targets if t <= length], length=length, trained=False)
            for length, targets in episodes
        ]
        counts.add(number, found)
        plain.update((number, t["step"]) for r in found for t in r["hindsight"]["targets"])
    said = counts.to_json()
    if not plain:
        assert said is None
        return
    assert (
        Counter(
            {
                (s, n): c
                for s, row in zip(said["steps"], said["absolute"], strict=True)
                for n, c in enumerate(row, 1)
                if c
            }
        )
        == plain
    )
    assert [sum(row) for row in said["relative"]] == [sum(row) for row in said["absolute"]]
    assert len(said["absolute"][0]) == max(n for _, n in plain)


def test_tenths_of_an_episode():
    assert [records.tenth(step, 10) for step in range(1, 11)] == list(range(10))
    assert [records.tenth(step, 2) for step in (1, 2)] == [2, 7]
    assert [records.tenth(step, 40) for step in (1, 4, 5, 40)] == [0, 0, 1, 9]
    assert records.tenth(1, 1) == 5 and records.tenth(99, 3) == 9
