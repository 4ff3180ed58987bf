"""Shared by tests of algorithms, examples and batching: episodes of random ids, stand-ins for the chat format."""

import numpy as np

from hintsd_jax.algorithms.branching import examples, with_feedback
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.prompts import shipped
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import Delta
from hintsd_jax.rollout.episode import Episode

PROMPT = (7, 8, 9)  # a generation prompt
FEEDBACK = 900  # ids from here on occur in feedback only; 0 occurs in padding only


class FakeChat:
    """Stands in for ChatFormat: messages are ids that occur nowhere else, then the generation prompt."""

    follows_template = False

    def __init__(self, begins=()):
        """begins: ids of every first prompt, before its messages."""
        self.begins = tuple(begins)

    def user_turn(self, text):
        return (*(FEEDBACK + ord(c) % 32 for c in text), *PROMPT)

    def prompt(self, messages, tools=(), tags_stand=False):
        ids = (*self.begins, *self.user_turn("".join(message["content"] for message in messages)))
        return Delta(ids, len(ids) - len(PROMPT))

    def delta(self, messages, cut=False):
        return self.prompt(messages)

    def teacher_context(self, dialogue, tools, trunk, text):
        return len(trunk), self.user_turn(text)


class RewritingChat(FakeChat):
    """Its template rewrites the second half of what the student read, in one token more."""

    def teacher_context(self, dialogue, tools, trunk, text):
        prefix_length = len(trunk) // 2
        return prefix_length, (*(300 + id for id in trunk[prefix_length:]), 300, *self.user_turn(text))


FAKE_CHAT, WEIGHTS, COMPACT = FakeChat(), {"divergence": 1.0}, shipped("compact")


def target_branches(episode, targets, chat=FAKE_CHAT, weights=WEIGHTS, position="target"):
    """The branches of all targets of an episode, by default with the bare feedback right before each."""
    return with_feedback(episode, targets, position, COMPACT, chat, weights)


def said(text):
    """One message of a user."""
    return ({"role": "user", "content": text},)


def target_examples(episode, targets, chat=FAKE_CHAT, number=0, **options):
    """The examples of all targets of an episode, feedback right before each; one for each of its streams."""
    return examples(episode, target_branches(episode, targets, chat), number, **options)


def target_example(episode, targets, chat=FAKE_CHAT, **options):
    """The example of an episode with one stream."""
    (example,) = target_examples(episode, targets, chat, **options)
    return example


def make_episode(seed=0, steps=4, longest=5, rewrites=False):
    """With `rewrites`, some observations begin a new stream."""
    rng = np.random.default_rng(seed)
    ids = lambda n: tuple(int(i) for i in rng.integers(10, 200, n))
    delta = lambda n, new_stream=False: Delta(ids(n) + PROMPT, n, new_stream)
    episode = Episode.begin("task", 0, (), delta(4))
    for _ in range(steps):
        action = ids(int(rng.integers(1, longest + 1)))
        episode.append_action(action, -rng.random(len(action)).round(3), "")
        episode.append_observation(
            delta(int(rng.integers(2, 9)), new_stream=True) if rewrites and rng.random() < 0.4 else delta(3)
        )
    return episode


class Keeping(FakeChat):
    """Remembers which feedback was put into words."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def user_turn(self, text):
        self.texts.append(text)
        return super().user_turn(text)


def four_episodes():
    """Two tasks with two rollouts: one success and one failure of "a", two failures of "b"."""
    episodes = [make_episode(seed, steps=3) for seed in range(4)]
    for n, episode in enumerate(episodes):
        episode.task_id, episode.group, episode.rollout = "ab"[n // 2], n // 2, n % 2
        episode.reward, episode.terminated = float(n == 0), True
        for number, step in enumerate(episode.steps, 1):
            step.text = f"deed {n}.{number}"
    return episodes


def experience_of(episodes, analyses=(), chat=None):
    """analyses: (number of the episode, its targets as pairs, its verdicts)."""
    hindsight = Hindsight(
        [
            Analysis(episodes[n], tuple(Target(*target) for target in targets), verdicts=verdicts)
            for n, targets, verdicts in analyses
        ]
    )
    return Experience(episodes, hindsight, chat or Keeping(), seed=42, step=3)
