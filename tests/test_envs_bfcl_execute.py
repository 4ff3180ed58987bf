"""BFCL's backends: result texts are the official executor's, every episode has its own state, hard mathematics still
works.
"""

import copy
import importlib
import json
import random
import threading

from benchmarks.bfcl_agreement import Official
from hintsd_jax.envs.base import Action
from hintsd_jax.envs.bfcl.env import Bfcl
from hintsd_jax.envs.bfcl.execute import Backends
from tests.bfcl_helpers import action_of, answer_of, call, entry_of, play, task_of, tasks


def backends_of(task):
    entry = entry_of(task)
    return Backends(entry["initial_config"], entry["involved_classes"], "long_context" in task["id"])


def test_result_texts_are_the_official_executors_for_every_call_of_the_ground_truth():
    official, count = Official(), 0
    for task in tasks():
        backends, wanted = backends_of(task), official.texts(task)
        assert [backends.call(call.name, call.arguments) for calls in answer_of(task) for call in calls] == wanted, (
            task["id"]
        )
        count += len(wanted)
    assert count == 4625


def test_arguments_are_bound_by_name_with_their_defaults():
    backends = Backends({}, ["MathAPI"])
    assert (
        backends.bound("round_number", {}, (2.5,))
        == {"number": 2.5, "decimal_places": 0}
        == backends.bound("round_number", {"number": 2.5})
    )
    assert backends.bound("add", {"wrong": 1}) == {"wrong": 1} == backends.bound("no_such_tool", {"wrong": 1})


def test_two_episodes_of_one_task_share_no_state():
    for task in tasks()[::40]:
        environments = [Bfcl() for _ in range(3)]
        for environment in environments:
            environment.reset(task)
        results = [[] for _ in environments]
        for calls in answer_of(task):
            for environment, own in zip(environments, results):
                own += [environment.step(Action("", tuple(calls)))] if calls else []
                own.append(environment.step(Action("Done.")))
        assert results[0] == results[1] == results[2] and results[0][-1].reward == 1.0
        assert play(task, environment=environments[0])[1].reward == 1.0  # and a reset forgets everything
    stored = ["a"]
    backends = Backends({}, ["TwitterAPI"])
    backends.instances["TwitterAPI"].authenticated = True
    assert "error" not in backends.call("post_tweet", {"content": "x", "tags": stored}).lower()
    stored.append("b")
    assert "b" not in list(backends.instances["TwitterAPI"].tweets.values())[-1]["tags"]


def test_the_balance_of_a_long_context_card_stays_in_its_episode():
    """16 episodes at once book with a card out of the benchmark's shared table; each sees its own balance only."""
    shared = importlib.import_module(
        "bfcl_eval.eval_checker.multi_turn_eval.func_source_code.long_context"
    ).CREDIT_CARD_EXTENSION
    before = copy.deepcopy(shared)
    task = task_of("long_context", 150)
    travel = backends_of(task).instances["TravelAPI"]
    card = max(
        shared.keys() - entry_of(task)["initial_config"]["TravelAPI"]["credit_card_list"],
        key=lambda key: shared[key]["balance"],
    )
    token, balance = travel.access_token, travel.credit_card_list[card]["balance"]
    booking = {
        "travel_date": "2024-11-16",
        "travel_from": "SFO",
        "travel_to": "LAX",
        "travel_class": "economy",
        "card_id": card,
    }
    actions = action_of(
        call("set_budget_limit", access_token=token, budget_limit=1.0),
        call("book_flight", access_token=token, **booking),
    )

    def act(out):
        backends = backends_of(task)
        texts = [backends.call(one.name, one.arguments) for one in actions.calls]
        out.append((texts, backends.instances["TravelAPI"].credit_card_list[card]["balance"]))

    results = []
    threads = [threading.Thread(target=act, args=(results,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16 and all(one == results[0] for one in results)
    assert '"booking_status": true' in results[0][0][1]
    assert (
        results[0][1] < balance
        and shared == before
        and backends_of(task).instances["TravelAPI"].credit_card_list[card]["balance"] == balance
    )


def test_hard_but_legal_mathematics_still_works():
    backends = Backends({}, ["MathAPI"])
    assert backends.call("power", {"base": 2, "exponent": 100}) == json.dumps({"result": 2**100})
    assert backends.call("power", {"base": -1, "exponent": 10**9}) == '{"result": 1}'
    assert backends.call("power", {"base": 9, "exponent": -(10**9)}) == '{"result": 0.0}'
    assert backends.call("logarithm", {"value": "100", "base": "1e1", "precision": 5}) == "{'result': mpf('2.0')}"
    assert backends.call("square_root", {"number": 2, "precision": 40}).count("1") > 3
    assert "not an argument name" in backends.call("add", {"a": 1, "b": 2, "c d": 3})
    assert backends.call("round_number", {"number": 2.567, "decimal_places": 1}) == '{"result": 2.6}'
    # text stays text
    assert backends.call("add", {"a": "__import__('os')", "b": "!"}) == json.dumps({"result": "__import__('os')!"})
    assert backends.call("add", {"a": 1}).startswith(
        "Error during execution: MathAPI.add() missing 1 required positional argument: 'b'"
    )
    # as the executor says
    assert backends.call("add", {"a": float("nan"), "b": 1}) == "Error during execution: name 'nan' is not defined"
    assert backends.call("mean", {"numbers": [1, float("-inf")]}) == "Error during execution: name 'inf' is not defined"


def test_precision_does_not_leak_between_threads():
    def work(precision, out):
        backends, rng = Backends({}, ["MathAPI"]), random.Random(precision)
        for _ in range(60):
            out.add(backends.call("logarithm", {"value": 10, "base": 3, "precision": precision}))
            backends.call("square_root", {"number": 2, "precision": rng.randint(1, 50)})

    outs = [set() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(5 + 20 * (index % 2), out)) for index, out in enumerate(outs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(out) for out in outs] == [1] * 4 and outs[0] == outs[2] != outs[1] == outs[3]
