"""Examples as data: parting branches from their trunk, and what an example refuses to be."""

import dataclasses

import pytest

from hintsd_jax.hindsight.targets import Target
from hintsd_jax.training.examples import Branch, Example
from tests.examples_helpers import make_episode, target_example


def test_separated_gives_every_branch_an_example_of_its_own():
    targets = [Target(step, "hm") for step in (1, 3)]
    example = target_example(make_episode(), targets, number=1, micro_step=2, key=(3, 4))
    for part, branch in zip(example.separated(), example.branches, strict=True):
        (own,) = part.branches
        context = example.tokens[: branch.prefix_length] + branch.context
        assert own == dataclasses.replace(branch, prefix_length=0, context=context)
        assert part == Example(1, example.tokens[: branch.stop], (own,), 2, (3, 4))


def test_without_a_trunk_branches_that_read_on_keep_what_they_add():
    first = Branch(
        1, start=2, stop=4, prefix_length=1, context=(9, 8), logprobs=(0.0, 0.0), weights={"divergence": 1.0}
    )
    second = dataclasses.replace(first, step=2, start=5, stop=7, context=(7,), continues=True)
    plain = Branch(3, start=8, stop=9, prefix_length=0, context=(), logprobs=(0.0,), weights={"policy_gradient": 1.0})
    example = Example(0, tuple(range(10, 19)), (first, second, plain))
    alone = example.without_trunk()
    assert [branch.context for branch in alone.branches] == [(10, 9, 8), (7,), ()]
    assert [branch.prefix_length for branch in alone.branches] == [0, 0, 0]
    assert [[branch.step for branch in part.branches] for part in example.separated()] == [[1, 2], [3]]
    assert [len(part.tokens) for part in example.separated()] == [7, 9]
    assert [branch.branch_tokens for branch in alone.branches] == [5, 3, 0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start": 0, "prefix_length": 0}, "out of order"),
        ({"prefix_length": 4}, "out of order"),
        ({"prefix_length": -1}, "out of order"),
        ({"stop": 3, "logprobs": ()}, "out of order"),
        ({"stop": 7, "logprobs": (0.0,) * 4}, "out of order"),
        ({"context": ()}, "no context"),
        ({"continues": True}, "read on from"),
        ({"logprobs": (0.0,)}, "1 log-probs of 2 tokens"),
    ],
)
def test_an_example_has_no_empty_or_misplaced_part(changes, says):
    branch = Branch(step=2, start=3, stop=5, prefix_length=2, context=(9,), logprobs=(0.0, 0.0))
    Example(4, (1,) * 6, (branch,))
    with pytest.raises(ValueError, match=f"episode 4, step 2: .*{says}"):
        Example(4, (1,) * 6, (dataclasses.replace(branch, **changes),))


@pytest.mark.parametrize("before", [{"context": (), "prefix_length": 0}, {"prefix_length": 1}])
def test_a_branch_reads_on_only_from_one_that_the_teacher_reads_in_the_same_place(before):
    first = Branch(1, start=3, stop=4, prefix_length=2, context=(9,), logprobs=(0.0,))
    second = Branch(2, start=4, stop=5, prefix_length=2, context=(9,), logprobs=(0.0,), continues=True)
    Example(4, (1,) * 6, (first, second))
    with pytest.raises(ValueError, match="episode 4, step 2: there is no branch before it to read on from"):
        Example(4, (1,) * 6, (dataclasses.replace(first, **before), second))
