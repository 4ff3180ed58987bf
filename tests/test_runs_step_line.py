"""A step in one line, from rows written by hand: its numbers are the row's, and one that learnt nothing says why."""

import pytest

from hintsd_jax.runs.step_line import describe, is_empty

PLAYED = {"rollout/episodes": 4, "rollout/success": 0.0, "hindsight/failed_episodes": 4, "train/tokens": 0}
PLAYED |= {"train/skipped": 1, "train/loss": 0.0}


@pytest.mark.parametrize(
    "row, says",
    [
        (
            {"hindsight/questions": 3, "hindsight/readable_answers": 0, "hindsight/dropped/truncated": 1}
            | {"hindsight/dropped/unparsable": 2, "hindsight/targets": 0},
            "0 targets named, 3 of 3 answers unreadable (1 truncated, 2 unparsable),"
            " update skipped: nothing to train on",
        ),
        (
            {"hindsight/questions": 16, "hindsight/readable_answers": 6, "hindsight/dropped/bad_step": 4}
            | {"hindsight/dropped/nothing_named": 2, "hindsight/dropped/unparsable": 10},
            "0 targets named, 10 of 16 answers unreadable (10 unparsable), looking back: 4 bad_step, 2 nothing_named,"
            " update skipped: nothing to train on",
        ),
        ({"hindsight/failed_episodes": 0, "rollout/success": 1.0}, "update skipped: no episode failed"),
        (
            {"hindsight/questions": 2, "hindsight/readable_answers": 2, "hindsight/dropped/nothing_named": 2},
            "0 targets named, looking back: 2 nothing_named, update skipped: nothing to train on",
        ),
        (
            {"hindsight/questions": 1, "hindsight/readable_answers": 1, "hindsight/targets": 1}
            | {"train/dropped/teacher_too_long": 3},
            "1 target named, update skipped: not trained on: 3 teacher_too_long",
        ),
        ({"train/dropped/no_advantage": 4}, "update skipped: not trained on: 4 no_advantage"),
        (
            {"rollout/begun": 4, "rollout/episodes": 0, "rollout/dropped/env_error": 3, "rollout/dropped/env_died": 1},
            "no episode was played, 4 of 4 episodes lost (3 env_error, 1 env_died),"
            " update skipped: nothing to train on",
        ),
        ({"train/skipped": 0}, "update without a token (optim.empty_updates = step): nothing to train on"),
    ],
)
def test_a_step_that_learnt_nothing_says_so_and_why(row, says):
    assert is_empty(PLAYED | row)
    head, _, rest = describe(PLAYED | row).partition(", ")
    assert (rest if head.startswith("success") else describe(PLAYED | row)) == says
    assert not is_empty(PLAYED | row | {"train/tokens": 5})


def test_a_step_without_rollouts_says_what_was_learnt_alone():
    row = {"rollout/begun": 0, "rollout/episodes": 0, "rollout/tokens": 0, "hindsight/failed_episodes": 0}
    assert describe(row | {"train/tokens": 5, "train/loss": 0.5, "time/step": 2.0}) == "loss 0.5000"


def test_a_step_that_learnt_something():
    row = {"rollout/episodes": 62, "rollout/success": 0.375, "rollout/begun": 64, "rollout/dropped/env_timeout": 2}
    row |= {"hindsight/questions": 40, "hindsight/readable_answers": 38, "hindsight/dropped/truncated": 2}
    row |= {"hindsight/targets": 31, "train/tokens": 400, "train/skipped": 0, "train/loss": 0.01234}
    row |= {"rollout/failed_calls/close/env_error": 2, "rollout/failed_calls/step/env_timeout": 2}
    row |= {
        "train/dropped/no_feedback": 9,
        "train/dropped/action_too_long": 1,
        "rollout/tokens": 3000,
        "time/step": 2.0,
    }
    assert describe(row) == (
        "success 37.5 %, 2 of 64 episodes lost (2 env_timeout), 2 reports or closings of environments failed,"
        " 31 targets named, 2 of 40 answers unreadable (2 truncated), loss 0.0123,"
        " actions not trained on: 1 action_too_long, 1,500 tokens/s"
    )
    assert describe({"train/loss": None}) == ""


def test_numbers_that_are_not_finite():
    bad = {"rollout/success": 0.5, "train/tokens": 400, "train/nonfinite": 1, "train/loss": None}
    assert describe(bad | {"train/skipped": 1}) == "success 50.0 %, update skipped: a number was not finite"
    assert describe(bad | {"train/skipped": 0}) == "success 50.0 %, update broke the weights: not finite"
