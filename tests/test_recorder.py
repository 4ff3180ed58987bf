"""What the recorder does about alarms and counts of actions; all else of it is seen in whole runs (test_train.py)."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from hintsd_jax.privacy import Privacy
from hintsd_jax.recorder import Recorder, react
from hintsd_jax.records import rollout_metrics
from hintsd_jax.rollout.episode import Episode, Step
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.runs.alarms import NOT_FINITE, Alarm
from hintsd_jax.runs.counters import Counters
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.sampling import SamplingStats

LOW, BROKEN = Alarm("min_entropy", "low"), Alarm(NOT_FINITE, "nan")


@pytest.mark.parametrize(
    "action, alarms, stops, lr_scale",
    [
        ("warn", [LOW, BROKEN], "", 1.0),
        ("stop", [LOW], "min_entropy (low)", 1.0),
        ("stop", [], "", 1.0),
        ("halve_lr", [LOW], "", 0.5),
        ("halve_lr", [LOW, BROKEN], "", 0.5),
        ("stop", [LOW, BROKEN], "min_entropy (low); not_finite (nan)", 1.0),
        ("halve_lr", [], "", 1.0),
    ],
)
def test_what_alarms_do(action, alarms, stops, lr_scale):
    counters = Counters()
    assert (react(alarms, action, counters), counters.lr_scale) == (stops, lr_scale)


@pytest.mark.parametrize(
    "most, split, kept", [(16, "test", [0, 1, 2, 0]), (2, "test", [0, 1, 0]), (0, "test", None), (16, "secret", None)]
)
def test_held_out_episodes_are_kept_of_the_first_tasks_only_and_never_of_a_split_of_aggregates(
    tmp_path, most, split, kept
):
    recorder = object.__new__(Recorder)
    recorder._config = SimpleNamespace(
        eval=SimpleNamespace(record_tasks=most), tasks=SimpleNamespace(test_split=split), optim=SimpleNamespace(steps=7)
    )
    algorithm = SimpleNamespace(config=SimpleNamespace(hindsight=None))
    recorder._session = SimpleNamespace(privacy=Privacy(aggregate_splits=("secret",)), algorithm=algorithm)
    recorder._folder = Workdir.open(tmp_path / "run", SimpleNamespace(to_dict=dict))
    episodes = [Episode(f"t{n}", 0, (), group=n) for n in range(3)]
    played = Rollouts(episodes, Counter(), SamplingStats(), lost=[Episode("t0", 1, ())])
    recorder.keep_before(None, played)
    recorder.keep_after(None, played)
    recorder._folder.close()
    files = sorted((tmp_path / "run" / "episodes").glob("*"))
    assert [file.name for file in files] == ([] if kept is None else ["after_000007.jsonl", "before_000000.jsonl"])
    for file in files:
        assert [json.loads(line)["group"] for line in file.read_text().splitlines()] == kept


def test_calls_problems_and_cut_actions_are_counted():
    steps = [Step(0, 1, 0, "", calls=2), Step(0, 1, 0, "", problem="json"), Step(0, 1, 0, "", cut=True, problem="cut")]
    steps += [Step(0, 1, 0, "", cut=True, calls=1), Step(0, 1, 0, "", problem="json")]
    episodes = [Episode("a", 0, (), steps=steps[:2]), Episode("a", 1, (), steps=steps[2:])]
    metrics = rollout_metrics(Rollouts(episodes, Counter(), SamplingStats()))
    assert metrics["rollout/calls"] == 1.5 and metrics["rollout/cut_actions"] == 2
    assert {name: value for name, value in metrics.items() if "problems" in name} == {
        "rollout/problems/json": 2,
        "rollout/problems/cut": 1,
    }
