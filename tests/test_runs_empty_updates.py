"""Why an update had nothing to train on, from rows written by hand."""

import pytest

from hintsd_jax.runs.empty_updates import is_empty, reasons

PLAYED = {"rollout/episodes": 4, "hindsight/failed_episodes": 4, "train/tokens": 0}


@pytest.mark.parametrize(
    "row, says",
    [
        (
            {"hindsight/questions": 3, "hindsight/readable_answers": 0, "hindsight/dropped/truncated": 1}
            | {"hindsight/dropped/unparsable": 2},
            "3 of 3 answers unreadable (1 truncated, 2 unparsable)",
        ),
        ({"hindsight/failed_episodes": 0, "hindsight/questions": 0}, "no episode failed"),
        (
            {"hindsight/questions": 2, "hindsight/readable_answers": 2, "hindsight/dropped/nothing_named": 2},
            "hindsight: 2 nothing_named",
        ),
        (
            {"hindsight/questions": 1, "hindsight/readable_answers": 1, "train/dropped/teacher_too_long": 3},
            "not trained on: 3 teacher_too_long",
        ),
        ({"train/dropped/no_advantage": 4}, "not trained on: 4 no_advantage"),
        ({"rollout/episodes": 0, "rollout/dropped/env_error": 4}, "no episode was played (4 env_error)"),
        ({}, "no action was chosen"),
    ],
)
def test_the_reasons_are_the_rows_own_counts(row, says):
    assert is_empty(PLAYED | row) and reasons(PLAYED | row) == says
    assert not is_empty(PLAYED | row | {"train/tokens": 5})
