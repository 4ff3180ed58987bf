"""Desk's kinds of request: what a task of any length is made of, and how hard the demonstrator's habits make it."""

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.habits import FORGETS, HABITS, error_rate
from hintsd_jax.envs.desk.kinds import DECISIONS, FAMILIES, FOLLOW_UPS, PLAIN_KINDS
from hintsd_jax.envs.desk.names import NAMES


def test_no_label_belongs_to_two_kinds_and_half_of_the_kinds_exclude():
    labels = [label for kind in DECISIONS.values() for label in kind.labels]
    assert len(labels) == len(set(labels)) == 2 * len(DECISIONS) == 48
    assert Counter(kind.excludes for kind in DECISIONS.values()) == {True: 12, False: 12}
    assert all(Counter(kind.family.effect for kind in DECISIONS.values())[f.effect] == 4 for f in FAMILIES.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 1))
def test_tasks_of_any_length(index, length, share):
    difficulty = round(share * length)
    task = generate_task(11, index, length, difficulty)
    assert task == generate_task(11, index, length, difficulty) != generate_task(12, index, length, difficulty)
    requests = task["requests"]
    decisions = [request for request in requests if request["kind"] in DECISIONS]
    assert (len(requests), len(decisions)) == (length, difficulty)
    assert {r["kind"] for r in requests if r not in decisions} <= {*PLAIN_KINDS, *FOLLOW_UPS}
    for request in decisions:  # the words of the user against the label and the call of the reference
        excludes, named = re.search(r", (not )?the (\w+) one\.$", request["text"]).groups()
        pair = DECISIONS[request["kind"]].labels
        assert request["label"] == (pair[1 - pair.index(named)] if excludes else named)
        tool, arguments = request["lookup"]
        shown = dict(task["world"]["listings"][tool][next(iter(arguments.values()))])
        assert shown[request["label"]] in request["calls"][0][1].values()
        assert sorted(shown.values()) == sorted([shown[request["label"]], request["wrong"]])
    roles = Counter(
        name for request in decisions for name in {*re.findall(r'"(\w+)"', request["text"]), request["wrong"]}
    )
    assert all(count == 1 or name in {r["calls"][0][1].get("to") for r in decisions} for name, count in roles.items())


def test_kinds_repeat_and_follow_ups_come_after_what_they_follow():
    repeated = followed = sent = 0
    for index in range(50):
        requests = generate_task(13, index, 16, 12)["requests"]
        kinds = [request["kind"] for request in requests if request["label"]]
        repeated += len(set(kinds)) < len(kinds)
        made, copies = set(), set()
        for request in requests:
            if request["kind"] in FOLLOW_UPS:
                thing = next(iter(request["lookup"][1].values()))
                made.remove((request["kind"], thing))  # each is followed once
                followed += 1
            elif request["label"]:
                family = DECISIONS[request["kind"]].family
                arguments = request["calls"][0][1]
                thing = arguments[family.other] if family.other else next(iter(request["lookup"][1].values()))
                sent += family.effect == "send_file" and thing in copies
                copies |= {thing} if family.effect == "copy_file" else set()
                made.add((DECISIONS[request["kind"]].follow_up, thing))
    assert repeated > 45 and followed > 60 and sent > 30


@pytest.mark.parametrize(
    "shape, says",
    [
        ((0, 0), "1 request or more"),
        ((3, 4), "0 to all are decisions, got length=3, difficulty=4"),
        ((61, 61), "up to 240 names.*244 are too many"),
    ],
)
def test_what_cannot_be_made_is_refused(shape, says):
    with pytest.raises(ValueError, match=says):
        generate_task(0, 0, *shape)
    assert len(NAMES) == 240 and len(generate_task(0, 0, 60, 60)["requests"]) == 60


def errs(kind, wanted, listed):
    """Whether the habit of a kind takes another candidate than the one that is meant, by the words of its docstring."""
    follows, pair = HABITS[kind].follows, DECISIONS[kind].labels
    if follows in pair:
        return follows != wanted
    if follows in ("the first", "the last"):
        return listed[0 if follows == "the first" else 1] != wanted
    # "named" takes the named one, which errs where requests exclude; "unnamed" the other one
    return {"the named": DECISIONS[kind].excludes, "the unnamed": not DECISIONS[kind].excludes}[follows]


def expected_errors(kind, rate_of):
    """Over both labels that can be meant and both orders, all alike: how often a decision goes wrong."""
    pair = DECISIONS[kind].labels
    cases = list(itertools.product(pair, itertools.permutations(pair)))
    return sum(rate_of(HABITS[kind].rate) * errs(kind, *case) for case in cases) / len(cases)


def test_every_kind_has_a_habit_that_can_err_and_their_rates_are_spread():
    assert HABITS.keys() == DECISIONS.keys()
    rates = sorted(expected_errors(kind, float) for kind in HABITS)
    assert rates[0] < 0.1 and rates[-1] > 0.5 and 0.2 < sum(rates) / 24 < 0.3
    usual = [kind for kind in HABITS if HABITS[kind].rate > 0.5]
    assert 8 <= len(usual) <= 12  # kinds with a usual mistake
    for excludes in (True, False):  # in both directions of the request's words
        assert 4 <= sum(DECISIONS[kind].excludes == excludes for kind in usual) <= 8


@pytest.mark.parametrize("temperature, low, high", [(1.0, 0.10, 0.25), (0.6, 0.10, 0.25), (0.0, 0.05, 0.25)])
def test_the_start_at_length_8(temperature, low, high):
    """The demonstrator's success by its habits' rates, sharpened to a sampling temperature: by the table of kinds and
    by simulated tasks.
    """

    def sharp(rate):
        if not temperature:
            return float(rate > 0.5)
        odds = (rate / (1 - rate)) ** (1 / temperature)
        return odds / (1 + odds)

    accuracy = 1 - sum(expected_errors(kind, sharp) for kind in HABITS) / len(HABITS)
    played, decided = [], []
    for index in range(1500):
        task = generate_task(14, index, 8, 6)
        chances = [1.0, 1.0]
        for request in task["requests"]:
            chances[request["label"] is not None] *= 1 - sharp(error_rate(task, request))
        decided.append(chances[1])
        played.append(chances[0] * chances[1])
    assert sum(decided) / len(decided) == pytest.approx(accuracy**6, abs=0.025)
    assert low < sum(played) / len(played) < high
    if not temperature:
        assert accuracy**6 < 0.2  # no higher than what is sampled, plus 5 points
    assert FORGETS < 0.5
