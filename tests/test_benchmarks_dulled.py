"""HINT-SD with dulled hindsight: how many targets stand, where the others go, and that nothing else changes."""

from types import SimpleNamespace

import pytest

from benchmarks import dulled
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.targets import Target
from tests.configs import algorithm_config

STEPS, NAMED = 6, (Target(2, "Use b."), Target(3, "Use c."), Target(6, "Use f."))


def analysed(name, targets=NAMED, episodes=400):
    """What an arm makes of the same targets in each of many failed episodes."""
    failed = [
        SimpleNamespace(task_id=f"t{n}", rollout=n % 4, success=False, terminated=True, steps=[None] * STEPS)
        for n in range(episodes)
    ]
    asked = Hindsight([Analysis(episode, targets, "said") for episode in failed], questions=episodes)
    analyser = SimpleNamespace(review=lambda given: asked if list(given) == failed else None)
    algorithm = getattr(dulled, name)(algorithm_config(f"benchmarks.dulled:{name}"))
    hindsight = algorithm.analyse(failed, analyser)
    assert (hindsight.questions, [a.answer for a in hindsight.analyses]) == (episodes, ["said"] * episodes)
    return [analysis.targets for analysis in hindsight.analyses]


@pytest.mark.parametrize("name, share", [("Missed60", 0.6), ("Missed30", 0.3), ("Moved60", 0.6), ("Moved30", 0.3)])
def test_so_many_targets_stand(name, share):
    found = analysed(name)
    assert abs(sum(target in NAMED for targets in found for target in targets) / 1200 - share) < 0.04
    assert found == analysed(name)  # it follows from the run's seed and the episode
    for targets in found:
        assert list(targets) == sorted(targets) and len({target.step for target in targets}) == len(targets)
        if name.startswith("Moved"):  # the words stay, on steps that were not named
            assert sorted(target.feedback for target in targets) == [target.feedback for target in NAMED]
            assert all(target in NAMED or target.step in (1, 4, 5) for target in targets)
        else:
            assert set(targets) <= set(NAMED)


def test_what_is_moved_goes_anywhere_there_is_room():
    places = {target.step for targets in analysed("Moved0", NAMED[:1]) for target in targets}
    assert places == {1, 3, 4, 5, 6}
    everywhere = tuple(Target(step, "Use it.") for step in range(1, STEPS + 1))
    assert set(analysed("Moved0", everywhere)) == {()}
