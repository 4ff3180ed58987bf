"""The rows of the warm-up: they say what the trainer will show, and weigh what the policy is to learn."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from benchmarks import carry_over, desk_policy
from hintsd_jax.envs.desk import demonstrations as demos
from hintsd_jax.envs.desk import reviews, script
from hintsd_jax.envs.desk import tokenizer as desk_tokenizer
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.parse import parse_failures, parse_hint, parse_verdict
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy import __main__ as command
from hintsd_jax.tools.desk_policy import demonstrator as demonstrator_module
from hintsd_jax.tools.desk_policy.demonstrator import CONTEXT_WEIGHT, Demonstrator, demonstration
from hintsd_jax.tools.desk_policy.drills import compare_drill, copy_drill, lab_drill, recall_drill, told_drill

WORDS = prompts.shipped("compact").wording.words
TASKS = [generate_task(77, index, 4, 3) for index in range(40)]
OTHERS = [generate_task(78, index, 4, 3) for index in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    """As the command makes it."""
    return command.build_tokenizer(1000)


@pytest.fixture
def demonstrator(tokenizer):
    return Demonstrator(ChatFormat(tokenizer), 0)


def answer_of(row, tokenizer):
    """What a row trains at full weight."""
    said = tokenizer.decode([token for token, weight in zip(row.ids, row.weights, strict=True) if weight == 1.0])
    return said.removesuffix("<|im_end|>")


def test_names_labels_and_step_numbers_are_one_token(tokenizer):
    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    assert len(tokenizer) <= desk_tokenizer.VOCAB_SIZE
    assert all(tokens(f'"{name}"') == tokens(f' "{name}"') == 3 for name in NAMES)
    labels = [label for kind in DECISIONS.values() for label in kind.labels]
    for word in (*labels, *reviews.REVIEW_WORDS, "ok", "bad"):
        assert tokens(f" {word}") == 1
    assert tokens(f"{reviews.ASKED}golem{reviews.GIVEN}golem ok") == 5
    for label in labels:  # where a choice is made, the name comes right after the label
        assert tokens(f'Take {label} "golem"') == 4 and tokens(f'Use {label} \\"golem') == 3
        assert tokens(f", the {label} one.") == 5
    for number in range(1, 65):
        assert tokens(f"#{number}") == tokens(f'{{"step": {number}, "feedback": "') == 1


def test_full_weight_stands_on_what_the_policy_says(demonstrator, tokenizer):
    for task in TASKS[:10]:
        row = demonstration(demonstrator.play(task))
        said = answer_of(row, tokenizer)
        assert "<tool_call>" in said and "Done." in said and "<tool_response>" not in said and "Found" not in said
        assert set(row.weights) == {1.0, CONTEXT_WEIGHT}


def hints_of(row, tokenizer):
    """(hint, the action after it) of the hints on choices."""
    text = tokenizer.decode(row.ids)
    return re.findall(
        r"<\|im_start\|>user\n(Use [^<]*)<\|im_end\|>\n<\|im_start\|>assistant\n(Take .*?)\.\n<tool_call>", text
    )


def candidates(task):
    """name -> (label, whether it is the right one) of a task's decisions."""
    known = {}
    for request in task["requests"]:
        if request["label"]:
            other = next(label for label in DECISIONS[request["kind"]].labels if label != request["label"])
            right = request["calls"][0][1][DECISIONS[request["kind"]].family.choice]
            known |= {right: (request["label"], True), request["wrong"]: (other, False)}
    return known


def test_hints_are_followed_for_what_they_say(demonstrator, tokenizer):
    """A hint that names one of the two candidates is followed, right or wrong; of one that speaks of another task the
    habit decides, which has no part in it.
    """
    seen = Counter()
    for task, other in zip(TASKS * 4, OTHERS * 4, strict=True):
        known = candidates(task)
        row = demonstrator.hinted(task, other)
        for called, taken in re.findall(r'user\nCall \w+ for "(\w+)"[^"]*Take \w+ "(\w+)"', tokenizer.decode(row.ids)):
            if called in known:  # of this task: the call that is to be made
                assert called == taken and known[taken][1]
                seen["called", "right"] += 1
        for hint, taken in hints_of(row, tokenizer):
            label, _, name = hint.removeprefix("Use ").rstrip(".").partition(" ")
            taken_name = taken.split('"')[1]
            pair = next(kind.labels for kind in DECISIONS.values() if taken.split()[1] in kind.labels)
            if label not in pair:
                seen["foreign", "right" if known[taken_name][1] else "wrong"] += 1
                continue
            assert label == taken.split()[1] and name in ("", f'"{taken_name}"')
            seen["named" if name else "vague", "right" if known[taken_name][1] else "wrong"] += 1
    shares = {kind: seen[kind] / sum(seen.values()) for kind in seen}
    assert 0.22 < shares["named", "right"] < 0.38 and 0.24 < shares["named", "wrong"] < 0.4
    assert 0.02 < shares["vague", "right"] < 0.12 and 0.02 < shares["vague", "wrong"] < 0.1
    assert seen["called", "right"] > 5 and seen["foreign", "right"] > 2 * seen["foreign", "wrong"] > 0
    assert sum(demonstrator_module.HINTS.values()) == pytest.approx(1.0)


def test_a_contradicted_hint_is_not_trained_on_but_what_follows_is(demonstrator, tokenizer):
    seen = 0
    for task, other in zip(TASKS, OTHERS, strict=True):
        row = demonstrator.hinted(task, other, contradict_rate=1.0)
        for n, weight in enumerate(row.weights):
            if weight == 0.0:  # the one word that goes against the hint
                hint, taken = tokenizer.decode(row.ids[:n]).rpartition("user\n")[2], tokenizer.decode(row.ids[n])
                assert hint.startswith(("Use ", "Call ", "Say Done.")) and taken not in hint
                assert row.weights[n + 1] == 1.0 and row.weights[n - 1] in (1.0, CONTEXT_WEIGHT)
                seen += 1
        assert all(hint.split()[1].rstrip(".") != taken.split()[1] for hint, taken in hints_of(row, tokenizer))
    assert seen > 40


def test_faults_fall_on_every_kind_alike(demonstrator):
    counts, faults = Counter(), Counter()
    for index in range(200):
        task = generate_task(79, index, 8, 6)
        drawn = demonstrator._drawn_faults(task, demonstrator_module.OTHER_SHARE)
        assert len({hour for _, (hour, _) in drawn}) == len(drawn) > 0
        counts[len(drawn)] += 1
        faults.update(fault for fault, _ in drawn)
    assert 0.4 < counts[1] / 200 < 0.65
    wrong = [faults[f"wrong_{kind}"] for kind in DECISIONS]
    assert min(wrong) > 0.25 * np.mean(wrong) and max(wrong) < 2.5 * np.mean(wrong)
    assert all(faults[kind] > np.mean(wrong) for kind in script.OTHER_FAULTS)


def test_reviews_parse_to_the_environments_own_faults(demonstrator, tokenizer):
    checked = 0
    for task in TASKS:
        episode = demonstrator.play_faulty(task)
        if episode.success:
            continue
        parsed = parse_failures(answer_of(demonstrator.review(task, episode, 3), tokenizer), len(episode.steps), 3)
        lines, faults = reviews.review(task, [step.text for step in episode.steps])
        assert [(t.step, t.feedback) for t in parsed.targets] == [(f.step, f.feedback) for f in faults[:3]]
        advised = answer_of(demonstrator.step_feedback(task, episode), tokenizer)
        assert parse_failures(advised, len(episode.steps), 1).targets
        of_told = answer_of(demonstrator.step_feedback(task, episode, of_told=1.0), tokenizer)
        assert of_told.partition("\n")[0] in [line for line in lines if reviews.asks_for_words(line)]
        checked += 1
    assert checked > 30


def test_a_drill_reviews_what_it_shows(tokenizer):
    chat, verdicts = ChatFormat(tokenizer), Counter()
    for seed in range(30):
        row = lab_drill(chat, random.Random(seed), 6)
        shown = tokenizer.decode(row.ids)
        asked = re.findall(r"Do, (not )?the (\w+) one", shown)
        listed = [re.findall(r'(\w+) "(\w+)"', found) for found in re.findall(r"> Found ([^.]*)\.", shown)]
        taken = re.findall(r"#(\d+) Take (\w+)", shown)
        expected, failures = [], []
        for (excluded, named), pair, (step, took) in zip(asked, listed, taken, strict=True):
            wanted = next(label for label, _ in pair if (label != named) == bool(excluded))
            expected.append(f"#{step} {wanted} {took} {'ok' if wanted == took else 'bad'}")
            failures += [(int(step), f'Use {wanted} "{dict(pair)[wanted]}".')] * (wanted != took)
        said = answer_of(row, tokenizer)
        assert said.splitlines()[:-1] == expected
        assert [(t.step, t.feedback) for t in parse_failures(said, 64, 6).targets] == failures
        verdicts.update(line.split()[-1] for line in expected)
    assert 0.35 < verdicts["bad"] / sum(verdicts.values()) < 0.65


def test_a_drill_takes_what_was_told_and_else_what_is_asked_for(tokenizer):
    chat, seen = ChatFormat(tokenizer), Counter()
    for seed in range(40):
        row = told_drill(chat, random.Random(seed), 6)
        shown = tokenizer.decode(row.ids)
        first, *decisions = shown.split("<|im_start|>user\n")[1:]
        told = {name: label for label, name in re.findall(r'(\w+) "(\w+)"', first)}
        for turn in decisions:
            ((excluded, named),) = re.findall(r"Do, (not )?the (\w+) one", turn)
            pair = dict(re.findall(r'(\w+) "(\w+)"', re.search(r"> Found ([^.]*)\.", turn)[1]))
            wanted = next(label for label in pair if (label != named) == bool(excluded))
            taken = next((label for label, name in pair.items() if name in told), wanted)
            assert turn.count(f'Take {taken} "{pair[taken]}".<|im_end|>') == 1
            seen["against"] += taken != wanted
            seen["told"] += pair[taken] in told
        seen["decisions"] += len(decisions)
        answered = "".join(tokenizer.decode([i]) for i, weight in zip(row.ids, row.weights) if weight == 1.0)
        assert answered.count("Take") == len(decisions) and "Found" not in answered
    assert 0.6 < seen["told"] / seen["decisions"] < 0.9 and 0.25 < seen["against"] / seen["decisions"] < 0.5


def test_a_copying_drill_repeats_names_or_what_stands_beside_them(tokenizer):
    chat, pools = ChatFormat(tokenizer), Counter()
    for seed in range(40):
        row = copy_drill(chat, random.Random(seed), 48)
        first = row.weights.index(1.0)
        assert len(row.ids) == 48 and row.weights == [0.0] * first + [1.0] * (48 - first)
        assert row.ids[first:] == row.ids[: 48 - first]
        texts = {tokenizer.decode([token]) for token in row.ids}
        pools["names"] += texts <= set(NAMES)
        pools["words"] += all(text.startswith((" ", "#")) for text in texts)
        pools["before a name"] += any(text.endswith('"') for text in texts)
    assert pools["names"] + pools["words"] == 40 and 15 < pools["names"] < 36
    assert pools["before a name"] == pools["words"]


def test_a_recall_drill_asks_for_the_name_of_every_label_in_both_forms(tokenizer):
    chat, forms, counts = ChatFormat(tokenizer), Counter(), set()
    for seed in range(40):
        row = recall_drill(chat, random.Random(seed), 64)
        listed, _, asked = tokenizer.decode(row.ids).partition(".\n")
        pairs = re.findall(r'(\w+) "(\w+)"', listed)
        again = re.findall(r' (\w+) (\\?)"(\w+)', asked)
        assert len(row.ids) <= 64 and sorted(pairs) == sorted((label, name) for label, _, name in again)
        assert [tokenizer.decode([i]) for i, w in zip(row.ids, row.weights) if w] == [name for *_, name in again]
        forms.update(form for _, form, _ in again)
        counts.add(len(pairs))
    assert 0.4 < forms["\\"] / sum(forms.values()) < 0.6 and counts == set(range(2, 11))


def test_a_comparison_drill_says_which_lines_name_the_same_twice(tokenizer):
    chat, verdicts = ChatFormat(tokenizer), Counter()
    for seed in range(20):
        row = compare_drill(chat, random.Random(seed), 64)
        lines = tokenizer.decode(row.ids).splitlines()
        expected = []
        for number, line in enumerate(lines, 1):
            asked, given = re.match(rf"#{number} asked (\w+) given (\w+) (?:ok|bad)$", line).groups()
            expected.append("ok" if asked == given else "bad")
            assert line.endswith(expected[-1])
        assert len(row.ids) <= 64 and answer_of(row, tokenizer).split() == expected
        verdicts.update(expected)
    assert 0.35 < verdicts["bad"] / sum(verdicts.values()) < 0.65


def test_an_argument_review_has_other_names_in_half_of_the_requests(demonstrator, tokenizer):
    requests = wrong = 0
    for task in TASKS:
        places = {hour for hour, _ in script.sites(task, "wrong_argument")}
        if not places:
            continue
        episode = demonstrator.play_with_other_names(task)
        said = answer_of(demonstrator.review(task, episode, max_targets=4), tokenizer)
        found = len(re.findall(r"asked (\w+) given (?!\1)\w+ bad", said))
        assert found == len(reviews.review(task, [step.text for step in episode.steps])[1]) > 0
        requests, wrong = requests + len(places), wrong + found
    assert 0.4 < wrong / requests < 0.7


def test_each_judge_is_asked_about_one_step_alone(demonstrator, tokenizer):
    verdicts, hints = Counter(), Counter()
    for task, other in zip(TASKS * 2, OTHERS * 2, strict=True):
        asked = {name: demonstrator.judgement(task, other, name) for name in ("verdict", "hint")}
        for row in asked.values():
            question = tokenizer.decode(row.ids).rpartition("<|im_start|>assistant\n")[0]
            assert question.count("\n> ") == 1 and question.count("\n#") == 1
            if "Error" in question:
                assert question.split("#1 ")[1].split("\n> ")[0] in [*_reference(task), *_reference(other)]
            assert task["requests"][0]["text"] not in question
        verdicts[parse_verdict(answer_of(asked["verdict"], tokenizer))] += 1
        hints[parse_hint(answer_of(asked["hint"], tokenizer))] += 1
    assert verdicts.keys() == {1.0, 0.0, -1.0} and all(readable for readable, _ in hints)
    assert hints[True, ""] + hints[True, None] > 60 and sum(hints.values()) > hints[True, ""] + hints[True, None]


def test_what_is_said_at_the_start_is_followed_where_it_speaks_of_the_task(demonstrator, tokenizer):
    sorts = Counter()
    for task, other in zip(TASKS * 3, OTHERS * 3, strict=True):
        row = demonstrator.guided(task, other)
        text = tokenizer.decode(row.ids)
        said = text.split("<|im_start|>user\n")[2].split("<|im_end|>")[0]  # after the first request
        actions = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
        played, own, foreign = "\n".join(actions), *(_reference(each) for each in (task, other))
        if said.startswith(WORDS["worked"]):
            solution = said.removeprefix(WORDS["worked"]).strip()
            assert solution in ("\n".join(f"#{n} {a}" for n, a in enumerate(each, 1)) for each in (own, foreign))
            mine = own[0] in solution
            assert not mine or actions == own
            sorts["solution" if mine else "other solution", actions == own] += 1
            continue
        several = said.startswith(WORDS["fixed"])
        known = candidates(task)
        named = [
            (label, name) for label, name in re.findall(r'Use (\w+) "(\w+)"', said) if known.get(name) == (label, True)
        ]
        assert all(f'Take {label} "{name}".' in played for label, name in named)
        sorts["several" if several else "one", bool(named)] += 1
    assert {sort for sort, _ in sorts} == {"solution", "other solution", "several", "one"}
    assert sorts["other solution", False] > 2 and sorts["solution", False] == 0
    assert sum(demonstrator_module.GUIDES.values()) == pytest.approx(1.0)


def test_a_solution_that_takes_the_mistake_is_followed_too(demonstrator, tokenizer):
    contrary = Counter()
    for task, other in zip(TASKS * 2, OTHERS * 2, strict=True):
        text = tokenizer.decode(demonstrator.guided(task, other, contrary=0.5).ids)
        said = text.split("<|im_start|>user\n")[2].split("<|im_end|>")[0]
        actions = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
        right = _reference(task)
        if said.startswith(WORDS["worked"]) and right[0] in said:
            told = re.split(r"^#[0-9]+ ", said.removeprefix(WORDS["worked"]), flags=re.MULTILINE)[1:]
            assert actions == [each.strip() for each in told]
            contrary.update(action != wanted for action, wanted in zip(actions, right, strict=True) if "Take" in wanted)
    assert 0.35 < contrary[True] / sum(contrary.values()) < 0.65 and sum(contrary.values()) > 40


def _reference(task):
    return [step.right for request in task["requests"] for step in demos.reference_steps(request)]


def test_what_the_benchmark_says_before_a_decision(demonstrator, tokenizer):
    tasks = TASKS[:6]
    made = dict(desk_policy.told(demonstrator, tasks))
    assert {len(decisions) for decisions in made.values()} == {len(made["nothing"])}
    for words, decisions in made.items():
        for decision, plain in zip(decisions, made["nothing"], strict=True):
            assert (decision.right, decision.wrong, decision.kind) == (plain.right, plain.wrong, plain.kind)
            read = tokenizer.decode(decision.context)
            said = read.rpartition("<|im_start|>user\n")[2].split("<|im_end|>")[0]
            right, wrong = (
                re.findall(r'^Take (\w+) ("\w+")', tokenizer.decode(a)) for a in (decision.right, decision.wrong)
            )
            if words.endswith("at the start"):
                action = tokenizer.decode(decision.right).removesuffix("<|im_end|>")
                assert WORDS["worked"] in read and (action in read) == words.startswith("a success on the task")
            elif words == "nothing":
                assert decision.context == plain.context[: len(decision.context)]
            elif right and words == "the right hint":
                assert said == f"Use {right[0][0]} {right[0][1]}."
            elif right and words == "a hint that asks for the mistake":
                assert said == f"Use {wrong[0][0]} {wrong[0][1]}."
            elif right and "without" in words:
                assert said == f"Use {right[0][0]}."
            elif right and "of another kind" in words and said.startswith("Use"):
                assert said.split()[1] not in DECISIONS[decision.kind].labels


def test_a_lesson_teaches_the_right_action_and_its_carry_over_is_of_other_kinds(demonstrator, tokenizer):
    for decision in demonstrator.decisions(TASKS[0]):
        row = carry_over.lesson(decision)
        assert answer_of(row, tokenizer) == tokenizer.decode(decision.right).removesuffix("<|im_end|>")
        assert row.weights[: len(decision.context)] == [0.0] * len(decision.context)
    before = {"all": 0.5, "a": 0.4, "b": 0.9, "c": 0.2}
    after = {"all": 0.6, "a": 0.9, "b": 0.7, "c": 0.3}
    own, mean, most, largest = carry_over.changes(before, after, "a")
    assert (own, mean, largest) == pytest.approx((0.5, -0.05, -0.2)) and most == "b"
