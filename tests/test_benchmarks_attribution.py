"""What the attribution and placement benchmarks count, with scripts for policies and answers that are known."""

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import attribution, feedback_effect, hindsight_setup, injected_faults, placement
from benchmarks.feedback_effect import CONTEXTS
from benchmarks.hindsight_setup import Setup
from benchmarks.injected_faults import Case
from benchmarks.rates import cell, percent, ratio
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.config import base, build
from hintsd_jax.envs.desk import Desk, script
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode, Step
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.session import Session
from hintsd_jax.statistics import interval
from tests.chat_server import PROXIES, serving

POLICY = str(Path(__file__).parents[1] / "assets" / "desk-policy")
CHAT = ChatFormat(load_tokenizer(POLICY))
TASKS = [generate_task(2, n, 4, 3) for n in range(6)]
SCRIPTS = injected_faults.scripts_of("desk", CHAT.style)


def setup_of(engine=None, policy=None, trained=None, env_class=Desk, name="desk", **settings):
    """With an engine there is a session, whose weights are `trained` as they are; without, only scripts are played."""
    edge = base()
    edge.policy.path, edge.env.name, edge.hindsight.prompts = POLICY, name, "compact"
    config = build.build(edge).replaced({key.replace("__", "."): value for key, value in settings.items()})
    session = None
    if engine is not None:
        session = Session(config, build.algorithm(config), None, policy, None, trained, CHAT, engine, env_class)
        session.weights = lambda trained: trained
    return Setup(config, CHAT, env_class, session)


def inject(setup, tasks, scripts):
    return injected_faults.inject(CHAT, setup.make_env, tasks, scripts, 0)


@pytest.fixture(scope="module")
def injected():
    return inject(setup_of(), TASKS, SCRIPTS)


def test_every_case_fails_by_its_one_fault(injected):
    cases, counts = injected
    assert (
        sum(count["failed"] for count in counts.values()) == len(cases) == Counter(case.fault for case in cases).total()
    )
    assert counts["wrong_order"]["failed"] == 0 < counts["wrong_order"]["injected"]
    assert all(count["failed"] == count["injected"] for kind, count in counts.items() if kind != "wrong_order")
    for case in cases:
        assert not case.episode.success and [fault.step for fault in case.episode.report.faults] == [case.step]
        task = next(task for task in TASKS if task["id"] == case.episode.task_id)
        reference = script.ground_truth(task).actions
        assert case.right == reference[case.step - 1] != case.episode.steps[case.step - 1].text
        assert [step.text for step in case.episode.steps[: case.step - 1]] == list(reference[: case.step - 1])
    forgotten = next(case for case in cases if case.fault == "forgotten_call")
    assert [call.name for call in forgotten.wanted] == ["notify"]
    stopped = next(case for case in cases if case.fault == "early_stop")  # a look-up, or at once what it is for
    assert 1 <= len(stopped.wanted) <= 2


def test_an_analyser_is_given_the_step_and_nothing_else(injected):
    cases = injected[0][:4]
    asked = []

    def answers(job):
        asked.append(CHAT.decode(job.prompt))
        step = cases[len(asked) - 1].step + (len(asked) == 2)  # the second speaks of another step
        return [json.dumps({"failures": [{"step": step, "feedback": f"do {len(asked)}"}]})]

    setup = setup_of(ScriptedEngine(CHAT, answers))
    reports = [case.episode.report for case in cases]
    targets, dropped = hindsight_setup.feedback_on_steps(
        setup, "policy", [(case.episode, np.zeros(2, np.uint32), case.step) for case in cases]
    )
    wanted = [Target(case.step, f"do {n}") for n, case in enumerate(cases, 1)]
    assert targets == [wanted[0], None, *wanted[2:]] and dropped == {"bad_step": 1}
    assert [case.episode.report for case in cases] == reports
    for case, question in zip(cases, asked, strict=True):
        assert (
            f"The step: #{case.step}<|im_end|>" in question and case.episode.report.faults[0].feedback not in question
        )


def test_a_model_behind_a_server_is_asked_without_any_weights(injected, monkeypatch, tmp_path):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    path = tmp_path / "config.py"
    path.write_text("from hintsd_jax.config import base\nget_config = base\n")
    cases = injected[0][:12]
    with serving(
        lambda exchange: exchange.answer(json.dumps({"failures": [{"step": 5, "feedback": "Go home."}]}))
    ) as server:
        names, values = ["endpoint", "random"], ["env.name=desk", f"endpoint.url={server.url}", "endpoint.model=m"]
        setup = hindsight_setup.open_setup(hindsight_setup.load_config(str(path), POLICY, values, names), names)
        result = attribution.measure(setup, "endpoint", cases, SCRIPTS, 0)
        assert len(server.requests) == len(cases) and "feedback" not in result
    row = result["location"]["all"]
    assert row["targets"]["value"] == 1 and row["recall"]["value"] == pytest.approx(
        np.mean([case.step == 5 for case in cases]), abs=1e-6
    )
    assert row["distance"]["value"] == pytest.approx(np.mean([abs(case.step - 5) for case in cases]), abs=1e-6)


def case_of(step, steps=6, fault="a"):
    episode = Episode("t", 0, (), steps=[Step(0, 1, 0, "x")] * steps)
    return Case(episode, fault, step, "right", ())


def test_location_by_hand():
    cases = [case_of(2), case_of(3), case_of(5), case_of(6)]
    named = [[Target(2, "w"), Target(4, "w")], [Target(4, "w")], [], [Target(1, "w"), Target(2, "w"), Target(3, "w")]]
    found = attribution.location(cases, named)
    values = {name: found[name] if isinstance(found[name], int) else found[name]["value"] for name in found}
    known = {
        "episodes": 4,
        "answered": 3,
        "targets": 1.5,
        "precision": 1 / 6,
        "recall": 1 / 4,
        "within_1": 2 / 4,
        "distance": 4 / 3,
        "steps": 6,
    }
    assert values == pytest.approx(known, abs=1e-6)
    assert found["precision"]["n"] == 6 and found["distance"]["n"] == 3
    nothing = attribution.location(cases, [[]] * 4)
    assert nothing["precision"] is None and nothing["distance"] is None and nothing["recall"]["value"] == 0
    assert [case_of(step).third for step in range(1, 7)] == ["early", "early", "middle", "middle", "late", "late"]
    assert [case_of(step, 2).third for step in (1, 2)] == ["early", "middle"] and case_of(1, 1).third == "early"


def test_analysers_against_the_injected_step(injected):
    cases, _ = injected
    setup = setup_of()
    environment = attribution.measure(setup, "environment", cases, SCRIPTS, 0)
    assert (
        environment["location"]["all"]["precision"]["value"] == environment["location"]["all"]["recall"]["value"] == 1.0
    )
    assert "feedback" not in environment  # there is no teacher
    drawn = attribution.measure(setup, "random", cases, SCRIPTS, 0)["location"]["all"]
    expected = np.mean([1 / len(case.episode.steps) for case in cases])
    assert (
        abs(drawn["recall"]["value"] - expected) < 4 * np.sqrt(expected / len(cases)) and drawn["targets"]["value"] == 1
    )
    groups = {"the demonstrator's kinds", "other kinds", "all"}
    assert set(environment["location"]) == {case.fault for case in cases} | groups
    parts = [environment["location"][group]["episodes"] for group in ("the demonstrator's kinds", "other kinds")]
    assert sum(parts) == environment["location"]["all"]["episodes"] == len(cases)
    keyed = [(case.episode, np.zeros(2, np.uint32), case.step) for case in cases]
    targets, dropped = hindsight_setup.feedback_on_steps(setup, "environment", keyed)
    assert not dropped and [target.step for target in targets] == [case.step for case in cases]
    elsewhere, dropped = hindsight_setup.feedback_on_steps(
        setup, "environment", [(episode, key, step - 1) for episode, key, step in keyed if step > 1]
    )
    assert set(elsewhere) == {None} and dropped == {"not_a_fault_to_it": len(elsewhere)}
    with pytest.raises(UserError, match="no analyser 'oracle' that answers"):
        hindsight_setup.analyse(setup, "oracle", [])
    with pytest.raises(UserError, match="no analyser oracle"):
        hindsight_setup.open_setup(setup.config, ["oracle"])


def test_contexts_are_the_templates_own(injected):
    case = next(case for case in injected[0] if case.step > 4)
    found = feedback_effect.contexts(CHAT, case, "Use a.", "Use b.")
    before, tools = case.episode.dialogue(case.step), case.episode.tools
    at = len(case.episode.prompt_messages)
    said = lambda text: [{"role": "user", "content": text}]
    truth = {
        "none": before,
        "start": [*before[:at], *said("Use a."), *before[at:]],
        "other": [*before, *said("Use b.")],
        "step": [*before, *said("Use a.")],
    }
    assert list(found) == list(CONTEXTS)
    assert {name: tuple(ids) for name, ids in found.items()} == {
        name: CHAT.prompt(messages, tools).ids for name, messages in truth.items()
    }


def test_others_are_of_another_task_and_say_something_else(injected):
    cases = injected[0]
    feedback = [f"say {n % 5}" for n in range(len(cases))]
    for n, other in enumerate(feedback_effect.feedback_of_others(cases, feedback)):
        assert other != feedback[n]
    assert feedback_effect.feedback_of_others(cases[:1], ["only"]) == ["only"]


def test_what_a_teacher_makes_of_feedback(injected):
    """A teacher that obeys what it reads last: acts are right with the feedback at the step, nowhere else."""
    later = [case for case in injected[0] if case.step > 2]
    cases = list({case.episode.task_id: case for case in later}.values())  # one a task
    policy = PolicyConfig(
        vocab_size=CHAT.vocab_size, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
        rope_theta=500.0, norm_eps=1e-6, tie_embeddings=True, max_positions=512, remat=False,
    )  # fmt: skip
    feedback = [f"Now number {n}." for n in range(len(cases))]

    def obey(job):
        text = CHAT.decode(job.prompt)
        obeyed = [
            case.right
            for n, case in enumerate(cases)
            if text.endswith(f"number {n}.<|im_end|>\n<|im_start|>assistant\n")
        ]
        return [*obeyed, "Done."]

    params = decoder.init_params(policy, jax.random.key(0))
    setup = setup_of(ScriptedEngine(CHAT, obey), policy, params)
    readings = feedback_effect.read(setup, cases, feedback, 0)
    found = feedback_effect.summary(readings)
    acts = {context: rate["value"] for context, rate in found["acts"].items()}
    assert (
        acts == {"none": 0.0, "start": 0.0, "other": 0.0, "step": 1.0} and found["acts_gain"]["start"]["value"] == 1.0
    )
    case, reading = cases[3], readings[3]
    step, right = case.episode.steps[case.step - 1], CHAT.encode(case.right)
    ids = np.array([[*case.episode.tokens[: step.start], *right]])
    logits = np.asarray(decoder.project(params, policy, decoder.forward(params, policy, ids)))[
        0, step.start - 1 : -1
    ].astype(np.float64)
    wanted = logits[np.arange(len(right)), right] - np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(reading.right["none"], wanted, atol=1e-4)
    assert found["logprob"]["right none"]["value"] == pytest.approx(
        np.mean([r.right["none"].mean() for r in readings]), abs=1e-6
    )
    taken = case.episode.tokens[step.start : step.stop]
    assert reading.taken["step"].shape == (len(taken),)
    assert taken[: reading.differs] == list(right[: reading.differs])
    assert taken[reading.differs] != right[reading.differs]
    tight = dataclasses.replace(setup.policy.engine.config, context=60)
    tight_setup = setup_of(ScriptedEngine(CHAT, obey, tight), policy, params)
    assert feedback_effect.read(tight_setup, cases, feedback, 0) == [None] * len(cases)


def test_a_plain_command_is_right_to_the_letter_and_calls_however_they_are_worded(injected):
    command = dataclasses.replace(case_of(1), right="open chest")
    said = ("open chest", " open chest\n", "open the chest", "open chest\ntake key", "", "I open chest")
    assert [feedback_effect.is_right(text, command, CHAT.style) for text in said] == [True] * 2 + [False] * 4
    calling = next(case for case in injected[0] if case.wanted)
    taken = calling.episode.steps[calling.step - 1].text
    said = (calling.right, f"Well.\n{calling.right}", taken, "Done.")
    assert [feedback_effect.is_right(text, calling, CHAT.style) for text in said] == [True] * 2 + [False] * 2


def test_placement_with_a_policy_that_obeys_what_it_has_just_read():
    """Without feedback it makes the usual mistake; with it just before an action it goes on rightly from there."""
    drawn = [generate_task(2, n, 4, 3) for n in range(20)]
    faulty = {task["id"]: script.with_fault(task, "forgotten_call", 0) for task in drawn}
    tasks = [task for task in drawn if faulty[task["id"]]][:3]
    assert len(tasks) >= 2

    def policy(job):
        episode = job.episode
        made = faulty[episode.task_id]
        while True:
            number = len(episode.steps) + 1
            said = episode.dialogue(number)[-1]["content"]
            if said.startswith("Call "):
                yield from script.ground_truth(next(t for t in tasks if t["id"] == episode.task_id)).actions[
                    number - 1 :
                ]
            yield made.actions[number - 1]

    setup = setup_of(ScriptedEngine(CHAT, policy), rollout__context=1 << 20, hindsight__context=1 << 20)
    episodes, *_ = setup.policy.play({}, tasks, 2, step=0)
    assert not any(episode.success for episode in episodes)
    found = placement.measure(setup, "environment", {task["id"]: task for task in tasks}, episodes, 2, 0)
    assert found["targets"] == len(episodes) == found["episodes"] and not found["dropped"]
    for subset in ("all targets", "first targets", "targets that are the only true fault"):
        row = found["subsets"][subset]
        rates = {arm: rate["value"] for arm, rate in row["success"].items()}
        assert rates == {"none": 0.0, "start": 0.0, "target": 1.0, "retry": 0.0, "retry_start": 1.0}
        assert row["gain"]["target - none"]["value"] == 1.0 and row["episodes"] == len(episodes)
    assert "| environment | all targets" in placement.table({"environment": found})


def test_own_failures_are_held_against_the_report(injected, monkeypatch):
    """Of every second failure the analyser names the fault, of those every second in the report's words; asked about
    the step it says them in every third.
    """
    cases, _ = injected
    episodes = [case.episode for case in cases]
    fault = {id(episode): episode.report.faults[0] for episode in episodes}
    words = lambda episode, right: fault[id(episode)].feedback if right else "Something else."

    def analyse(setup, name, keyed):
        of = lambda n, episode: (Target(fault[id(episode)].step, words(episode, n % 4 == 0)),) if n % 2 == 0 else ()
        return Hindsight([Analysis(episode, of(n, episode)) for n, (episode, _) in enumerate(keyed)])

    def feedback_on_steps(setup, name, given):
        assert [step for *_, step in given] == [fault[id(episode)].step for episode, *_ in given]
        return [Target(step, words(e, True)) if n % 3 == 0 else None for n, (e, _, step) in enumerate(given)], {}

    monkeypatch.setattr(attribution, "analyse", analyse)
    monkeypatch.setattr(attribution, "feedback_on_steps", feedback_on_steps)
    monkeypatch.setattr(Session, "play", lambda *arguments, **options: SimpleNamespace(episodes=episodes))
    found = attribution.own_failures(setup_of(engine=object()), "policy", TASKS, SCRIPTS, 0)
    n = len(episodes)
    of_all = {rate: found["by"]["all"][rate]["value"] for rate in ("recall", "precision", "same_words", "asked")}
    known = {"recall": -(-n // 2) / n, "precision": 1.0, "same_words": -(-n // 4) / -(-n // 2), "asked": -(-n // 3) / n}
    assert of_all == pytest.approx(known, abs=1e-6) and found["failed"] == n
    assert "the same when asked about a fault, %" in attribution.own_table("policy", found)


@pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="the benchmark's wheel is not installed: run `make bfcl`"
)
def test_bfcl_by_the_same_code(tmp_path):
    from hintsd_jax.envs.bfcl import Bfcl
    from hintsd_jax.envs.bfcl.tasks import bfcl_tasks

    tasks = bfcl_tasks("eval", str(tmp_path))[:3]
    scripts = injected_faults.scripts_of("bfcl", CHAT.style)
    setup = setup_of(env_class=Bfcl, name="bfcl")
    cases, counts = inject(setup, tasks, scripts)
    assert counts["early_stop"] == {"injected": 3, "failed": 3} and len(cases) >= 10
    found = attribution.measure(setup, "environment", cases, scripts, 0)
    assert found["location"]["all"]["recall"]["value"] == 1.0
    dropped = next(case for case in cases if case.fault == "dropped_call")
    start = dropped.episode.steps[dropped.step - 1].start
    assert (
        dropped.wanted and feedback_effect.contexts(CHAT, dropped, "a", "b")["none"] == dropped.episode.tokens[:start]
    )
    text = attribution.tables({"injected": counts, "analysers": {"environment": found}, "own": {}}, scripts)
    assert "Not scored" in text and "| early_stop " in text


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_ratios(pairs):
    parts, wholes = [min(a, b) for a, b in pairs], [b for _, b in pairs]
    found = ratio(parts, wholes)
    if not sum(wholes):
        assert found is None
        return
    assert found["value"] == pytest.approx(sum(parts) / sum(wholes), abs=1e-6) and found["n"] == sum(wholes)
    assert 0 <= found["low"] <= found["high"] <= 1


def test_a_ratio_over_ones_is_the_mean_with_its_known_interval():
    values = np.random.default_rng(1).random(60)
    found = ratio(values)
    np.testing.assert_allclose([found["low"], found["high"]], interval(values), atol=0.01)
    assert percent(ratio([1, 1, 0, 0, 1, 1, 1, 1])).startswith("75.0 [")
    assert cell(None) == "-"


def test_configs_and_their_mistakes(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("from hintsd_jax.config import base\nget_config = base\n")
    config = hindsight_setup.load_config(str(path), POLICY, ["hindsight.max_targets=1", "env.name=desk"])
    assert (config.policy.path, config.hindsight.max_targets, config.env.name) == (POLICY, 1, "desk")
    for override, message in {
        "hindsight.max_targts=1": "max_targts",
        "chat.history=template": r"chat\.history = keep",
        "seed=-1": "impossible",
    }.items():
        with pytest.raises(UserError, match=message):
            hindsight_setup.load_config(str(path), POLICY, [override])
    with pytest.raises(UserError, match="no scripts"):
        injected_faults.scripts_of("chess", CHAT.style)
