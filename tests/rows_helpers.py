"""Shared by the tests of rows and of packing: episodes of random ids, and stand-ins for the chat format."""

import numpy as np

from hintsd_jax.rollout.chat import Delta
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import rows, target_branches

PROMPT = (7, 8, 9)  # a generation prompt
FEEDBACK = 900  # ids from here on occur in feedback only; 0 occurs in padding only


class Chat:
    """Stands in for ChatFormat: the feedback message is ids that occur nowhere else, then the generation prompt."""

    def feedback(self, text):
        return (*(FEEDBACK + ord(c) % 32 for c in text), *PROMPT)

    def teacher_context(self, dialogue, tools, trunk, text):
        return len(trunk), self.feedback(text)


class Rewriting(Chat):
    """Its template rewrites the second half of what the student read, in one token more."""

    def teacher_context(self, dialogue, tools, trunk, text):
        seen = len(trunk) // 2
        return seen, (*(300 + id for id in trunk[seen:]), 300, *self.feedback(text))


def trunk_rows(episode, targets, chat, **place):
    """The rows of all targets of an episode, feedback right before each."""
    return rows(episode, target_branches(episode, targets, chat), **place)


def trunk_row(episode, targets, chat=Chat(), **place):
    """The row of an episode with one stream."""
    (row,) = trunk_rows(episode, targets, chat, **place)
    return row


def make_episode(seed=0, steps=4, longest=5, rewrites=False):
    """With `rewrites`, some answers begin a new stream."""
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
