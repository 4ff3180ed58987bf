# SPDX-License-Identifier: Apache-2.0

"""Short rows of nothing but look-ups, for the warm-up: random numbers in; token ids with loss weights out.

Without them a network of half a million weights does not learn to review: a dense row of look-ups teaches in a few
hundred steps what whole episodes hide among thousands of other tokens.
"""

from __future__ import annotations

import json
import random

from hintsd_jax.envs.desk import feedback
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.envs.desk.reviews import ASKED, GIVEN
from hintsd_jax.envs.desk.tokenizer import MAX_STEPS
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy.demonstrator import CONTEXT_WEIGHT, PROMPTS, WeightedTokens

NAMES_ROWS = 0.65  # of the rows of a copying drill
LARGEST_GAP = 3  # between the step numbers of a drill's decisions
LABELS = [label for kind in DECISIONS.values() for label in kind.labels]
PAIR, LINE = 6, 7  # tokens of a label with its name, said twice, and of a line that compares two names
PROMPT_WEIGHT = CONTEXT_WEIGHT / 2
TOLD, AS_SOLUTION = 0.75, 0.6  # how much of a told drill is told; how often by actions, not by feedback
_WORDS = prompts.shipped("compact").wording.words
OBSERVATION, STEP = _WORDS["observation_mark"], _WORDS["step_mark"]


def copy_drill(chat: ChatFormat, rng: random.Random, length: int) -> WeightedTokens:
    """Random words, then the same words again from a random point on: copying what followed is all there is to learn.
    Most rows are of names, the others of labels and step marks: a policy that copies names alone copies nothing else.
    """
    if rng.random() < NAMES_ROWS:
        words = [f' "{name}' for name in NAMES]
    else:
        words = [form.format(label) for label in LABELS for form in (" {}", ' {} "', ' {} \\"')]
        words += [f"{STEP}{step}" for step in range(1, MAX_STEPS + 1)]
    ids = [chat.encode(word)[-2] for word in rng.choices(words, k=length)]  # the last token before the stop
    first = rng.randrange(length // 4, length // 2)
    ids = (ids[:first] * (length // first + 1))[:length]
    return WeightedTokens(ids, [0.0] * first + [1.0] * (length - first))


def recall_drill(chat: ChatFormat, rng: random.Random, length: int) -> WeightedTokens:
    """Labels with a name each, then the labels again, in another order, as a call or as JSON writes them: whose name is
    whose is all there is to learn. Of two names, as in a review of one decision, the right one is also the one that was
    not taken; of many, only the label tells.
    """
    count = rng.randint(2, length // PAIR)
    pairs = list(zip(rng.sample(LABELS, count), rng.sample(NAMES, count), strict=True))
    listed = ", ".join(f'{label} "{name}"' for label, name in pairs)
    ids = [*chat.encode(f"Found {listed}.\n")[:-1]]  # without the stop
    weights = [0.0] * len(ids)
    for label, name in rng.sample(pairs, count):
        asked = f' {label} "{name}'
        ids += chat.encode(asked if rng.random() < 0.5 else json.dumps(asked)[1:-1])[:-1]
        weights += [0.0, 1.0]
    return WeightedTokens(ids, weights)


def compare_drill(chat: ChatFormat, rng: random.Random, length: int) -> WeightedTokens:
    """A review's lines on names that were asked for and given: whether both are the same is all there is to learn."""
    names, ids, weights = rng.sample(NAMES, length // LINE), [], []
    for step, asked in enumerate(names, 1):
        given = asked if rng.random() < 0.5 else rng.choice(names)
        line = chat.encode(f"{STEP}{step}{ASKED}{asked}{GIVEN}{given} {'ok' if given == asked else 'bad'}\n")[:-1]
        ids += line
        weights += [0.0] * (len(line) - 2) + [1.0, 0.0]  # the verdict stands before the line's end
    return WeightedTokens(ids, weights)


def lab_drill(chat: ChatFormat, rng: random.Random, decisions: int) -> WeightedTokens:
    """Some decisions of any kinds, at most so many, at step numbers of any size, each as a review shows it but for its
    call; then the review: asked, taken and verdict of each, and the JSON with the names that should have been taken.
    """
    decisions = rng.randint(1, decisions)  # of few it is learned first what is looked up, of many where
    names = iter(rng.sample(NAMES, 2 * decisions))
    step, shown, lines, failures = rng.randint(0, MAX_STEPS - LARGEST_GAP * decisions), [], [], []
    for kind in rng.choices(list(DECISIONS), k=decisions):
        step += rng.randint(1, LARGEST_GAP)
        asked = rng.choice(DECISIONS[kind].labels)
        candidates = [(label, next(names)) for label in DECISIONS[kind].labels]
        rng.shuffle(candidates)
        taken, value = rng.choice(candidates)
        listed = ", ".join(f'{label} "{name}"' for label, name in candidates)
        shown.append(
            f"> user: Do, {DECISIONS[kind].which(asked)}.{OBSERVATION}Found {listed}.\n"
            f'{STEP}{step} Take {taken} "{value}".\n'
        )
        lines.append(f"{STEP}{step} {asked} {taken} {'ok' if taken == asked else 'bad'}")
        if taken != asked:
            failures.append({"step": step, "feedback": feedback.use_value(dict(candidates)[asked], asked)})
    prompt = chat.prompt([{"role": "user", "content": "".join(shown)}], tags_stand=True).ids
    answer = chat.encode("\n".join([*lines, json.dumps({"failures": failures})]))
    return WeightedTokens([*prompt, *answer], [PROMPT_WEIGHT] * len(prompt) + [1.0] * len(answer))


def told_drill(chat: ChatFormat, rng: random.Random, decisions: int) -> WeightedTokens:
    """Some decisions of any kinds, at most so many, of which most are told at the start, in actions that worked or in
    feedback: what is told is taken, whatever is asked for, and what is asked for where nothing is told.
    """
    names, told, shown = iter(rng.sample(NAMES, 2 * decisions)), [], []
    for kind in rng.choices(list(DECISIONS), k=rng.randint(1, decisions)):
        asked = rng.choice(DECISIONS[kind].labels)
        candidates = [(label, next(names)) for label in DECISIONS[kind].labels]
        rng.shuffle(candidates)
        taken = rng.choice(candidates) if rng.random() < TOLD else None
        if taken:
            told.append(taken)
        label, name = taken or (asked, dict(candidates)[asked])
        listed = ", ".join(f'{each} "{value}"' for each, value in candidates)
        shown.append((f"Do, {DECISIONS[kind].which(asked)}.{OBSERVATION}Found {listed}.", f'Take {label} "{name}".'))
    rng.shuffle(told)
    if rng.random() < AS_SOLUTION:
        first = PROMPTS.teacher_reprompt((), solution=[f'Take {label} "{name}".' for label, name in told])
    else:
        targets = [Target(step, feedback.use_value(name, label)) for step, (label, name) in enumerate(told, 1)]
        first = PROMPTS.teacher_reprompt((), targets=tuple(targets))
    ids = [*chat.prompt([*first, {"role": "user", "content": shown[0][0]}], tags_stand=True).ids]
    weights = [PROMPT_WEIGHT] * len(ids)
    for number, (question, action) in enumerate(shown):
        read = chat.user_turn(question, tags_stand=True) if number else ()
        answer = chat.encode(action)
        ids += [*read, *answer]
        weights += [PROMPT_WEIGHT] * len(read) + [1.0] * len(answer)
    return WeightedTokens(ids, weights)
